"""What a source holds, in plain tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.data.checks.examine import Findings
from finetune.data.checks.start import imbalance
from finetune.data.checks.verdicts import HEADER, MODES, Records
from finetune.data.split import SPLITS, Source, class_counts

MAX_CLASSES = 40  # shown; of more, the largest and the smallest


def summary(source: Source, findings: Findings) -> str:
    """Counts per split and class, sizes, modes, and warnings, as lines of text."""
    lines = [source.description, findings.coverage, "", *_classes(source), "", *_sizes(findings), *_modes(findings)]
    warnings = [*source.warnings, *imbalance(source)]
    return "\n".join([*lines, *(f"warning: {line}" for line in warnings)])


def _classes(source: Source) -> list[str]:
    counts = np.stack(
        [class_counts(source.splits[name].labels, len(source.classes)).numpy() for name in SPLITS], axis=1
    )
    shown = list(range(len(source.classes)))
    note = []
    if len(shown) > MAX_CLASSES:
        by_size = np.argsort(-counts[:, 0], kind="stable").tolist()
        shown = by_size[: MAX_CLASSES // 2] + by_size[-MAX_CLASSES // 2 :]
        note = [f"(the {MAX_CLASSES // 2} largest and smallest of {len(source.classes):,} classes)"]
    rows = [[source.classes[label], *(f"{count:,}" for count in counts[label])] for label in shown]
    totals = ["images", *(f"{len(source.splits[name]):,}" for name in SPLITS)]
    return [*_aligned([["class", *SPLITS], *rows, totals]), *note]


def _sizes(findings: Findings) -> list[str]:
    seen = _seen(findings)
    if not len(seen):
        return []
    lines = []
    for word, values in (("width", seen["width"]), ("height", seen["height"])):
        low, middle, high = np.percentile(values, (0, 50, 100)).astype(int).tolist()
        lines.append(f"{word}: {low:,} to {high:,} pixels, median {middle:,}")
    return lines


def _modes(findings: Findings) -> list[str]:
    seen = _seen(findings)
    modes, counts = np.unique(seen["mode"], return_counts=True)
    order = np.argsort(-counts, kind="stable").tolist()
    words = ", ".join(f"{counts[place]:,} {MODES[modes[place]]}" for place in order)
    return [f"modes: {words}"] if words else []


def _seen(findings: Findings) -> Records:
    """The records of images whose size is known."""
    records: Records = np.concatenate(list(findings.records.values()))
    chosen: Records = records[(records["depth"] >= HEADER) & (records["bad"] == 0)]
    return chosen


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, the first leaning left and numbers right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
