"""Images that look alike where it harms: in several splits or classes."""

from collections.abc import Iterator

import numpy as np

from finetune.data.checks.examine import DataReport, Group, harmful, of_all
from finetune.data.checks.looks import near_pairs
from finetune.data.cutting import joined
from finetune.data.split import Source


def find_near_duplicates(source: Source, report: DataReport) -> Iterator[Group]:
    """`find_duplicates` of images that look alike. Groups in which all images have equal bytes are left out.

    `report` comes from `examine(with_looks=True)`.
    """
    looks, first = of_all(report, "look"), of_all(report, "first")
    numbers = joined(len(looks), [near_pairs(looks)])
    if numbers is None:
        return iter(())
    order = np.argsort(numbers, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    several = [group for group in groups if len(np.unique(first[group])) > 1]
    return harmful(source, report, iter(sorted(several, key=lambda group: int(group[0]))))
