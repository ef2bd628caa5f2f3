"""What a source holds, in plain text: tables of counts and sizes, and lines of warning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.data.checks.examine import DataReport, UnreadableImage, find_duplicates
from finetune.data.checks.known_images import HEADER, MODES, Records
from finetune.data.split import SPLITS, Source, class_counts
from finetune.system.files import write_text
from finetune.system.tables import table
from finetune.system.terminal import printable

MAX_CLASSES = 40  # shown; of more, the largest and the smallest
IMBALANCE = 10.0  # largest class over smallest, from which a warning is due


def summary(source: Source, report: DataReport) -> str:
    """Counts per split and class, sizes, modes and warnings, as lines of text."""
    lines = [source.description, report.coverage, "", *_classes(source), "", *_sizes(report), *_modes(report)]
    warnings = [*source.warnings, *imbalance(source)]
    return "\n".join([*lines, *(f"warning: {line}" for line in warnings)])


def imbalance(source: Source) -> list[str]:
    """A line where training classes differ much in size and `data.balance` does nothing about it."""
    counts = class_counts(source.splits["train"].labels, len(source.classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    if source.is_multilabel or source.class_weights is not None or counts[large] < IMBALANCE * counts[small]:
        return []
    ends = f"{source.classes[large]} has {counts[large]:,} training images, {source.classes[small]} {counts[small]:,}"
    return [f"classes differ in size: {ends}; data.balance=weights or sampling evens that out"]


def duplicate_lines(source: Source, report: DataReport) -> list[str]:
    """A line for each group of `find_duplicates`: its images with the split and the class of each."""
    lines = []
    for group in find_duplicates(source, report):
        images = [f"{source.splits[name].name_of(i)} [{name}, {_label(source, name, i)}]" for name, i in group]
        lines.append(printable(" = ".join(images)))
    return lines


def unreadable_lines(images: Sequence[UnreadableImage]) -> list[str]:
    """A line for each image: name, split and reason with tabs between them."""
    return ["\t".join(map(printable, (image.name, image.split, image.reason))) for image in images]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file of these lines."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def _label(source: Source, split: str, index: int) -> str:
    """The name of an image's class, or of all its classes."""
    label = source.splits[split].labels[index]
    if label.ndim == 0:
        return source.classes[int(label)]
    return "+".join(name for name, has in zip(source.classes, label.tolist(), strict=True) if has) or "no label"


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
    rows = [
        {"class": source.classes[label], **dict(zip(SPLITS, counts[label].tolist(), strict=True))} for label in shown
    ]
    rows.append({"class": "images", **{name: len(split) for name, split in source.splits.items()}})
    return [table(rows, ("class", *SPLITS)), *note]


def _sizes(report: DataReport) -> list[str]:
    known = _with_header(report)
    if not len(known):
        return []
    lines = []
    for word, values in (("width", known["width"]), ("height", known["height"])):
        low, middle, high = np.percentile(values, (0, 50, 100)).astype(int).tolist()
        lines.append(f"{word}: {low:,} to {high:,} pixels, median {middle:,}")
    return lines


def _modes(report: DataReport) -> list[str]:
    modes, counts = np.unique(_with_header(report)["mode"], return_counts=True)
    order = np.argsort(-counts, kind="stable").tolist()
    words = ", ".join(f"{counts[place]:,} {MODES[modes[place]]}" for place in order)
    return [f"modes: {words}"] if words else []


def _with_header(report: DataReport) -> Records:
    """The records of readable images whose size and mode are known."""
    records: Records = np.concatenate(list(report.records.values()))
    chosen: Records = records[(records["depth"] >= HEADER) & (records["bad"] == 0)]
    return chosen
