"""What a source holds, in plain text: tables of counts and sizes, warnings, and lists of faulty images."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from finetune.data.checks.examine import DataReport, Group, examine, find_duplicates
from finetune.data.checks.known_images import HEADER, MODES, KnownImages
from finetune.data.checks.similar import find_near_duplicates
from finetune.data.split import SPLITS, Source, UnreadableImage, class_counts
from finetune.system.files import write_text
from finetune.system.tables import table
from finetune.system.terminal import counted, printable

MAX_CLASSES = 40  # shown; of more, the largest and the smallest
IMBALANCE = 10.0  # largest class over smallest, from which on there is a warning


def check_source(source: Source, cache_dir: str | None, folder: Path) -> tuple[DataReport, str]:
    """Examine every image of `source`; return what was found, and the same as text for a person.

    Writes `data.txt` into `folder`, and `duplicates.txt`, `similar.txt` and `unreadable.txt` where there is something
    to list.
    """
    report = examine(source, KnownImages(cache_dir, source.location), with_looks=True)
    lines = [source.description, report.coverage, "", *_classes(source), "", *_sizes_and_modes(report)]
    text = "\n".join([*lines, *(f"warning: {line}" for line in [*source.warnings, *imbalance(source)])])
    write_text(folder / "data.txt", text.encode("utf-8", "backslashreplace").decode() + "\n")
    same = "the same image, to the last byte, in several splits or classes"
    text += _write_list(folder / "duplicates.txt", same, _lines_of(source, find_duplicates(source, report)), most=20)
    alike = "images that look alike, in several splits or classes; data.group=similar cuts no such group"
    text += _write_list(folder / "similar.txt", alike, _lines_of(source, find_near_duplicates(source, report)), most=20)
    bad = unreadable_lines(report.unreadable)
    text += _write_list(folder / "unreadable.txt", "images that cannot be read", bad, most=len(bad))
    return report, text


def _write_list(path: Path, title: str, lines: Sequence[str], *, most: int) -> str:
    """Write `lines` to `path`, if there are any; return their number and at most `most` of them as text."""
    if not lines:
        return ""
    write_lines(path, lines)
    shown = [f"\n\n{title}: {counted(len(lines), 'line')} in {path}:", *(f"  {line}" for line in lines[:most])]
    shown += [f"  ... and {len(lines) - most:,} more"] * (len(lines) > most)
    return "\n".join(shown)


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
    return _lines_of(source, find_duplicates(source, report))


def _lines_of(source: Source, groups: Iterable[Group]) -> list[str]:
    lines = []
    for group in groups:
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
    label = source.splits[split].labels[index]
    if label.ndim == 0:
        return source.classes[int(label)]
    return "+".join(name for name, has in zip(source.classes, label.tolist(), strict=True) if has) or "no label"


def _classes(source: Source) -> list[str]:
    """The table of images per class and split; of many classes only the largest and smallest."""
    counts = {name: class_counts(split.labels, len(source.classes)).tolist() for name, split in source.splits.items()}
    rows: list[dict[str, object]] = [
        {"class": word, **{name: counts[name][label] for name in SPLITS}} for label, word in enumerate(source.classes)
    ]
    note = []
    if len(rows) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        rows = [rows[i] for i in np.argsort(-np.array(counts["train"]), kind="stable")]
        rows = rows[:half] + rows[-half:]
        note = [f"(the {half} largest and smallest of {len(source.classes):,} classes)"]
    rows.append({"class": "images", **{name: len(split) for name, split in source.splits.items()}})
    return [table(rows, ("class", *SPLITS)), *note]


def _sizes_and_modes(report: DataReport) -> list[str]:
    records = np.concatenate(list(report.records.values()))
    records = records[(records["depth"] >= HEADER) & (records["bad"] == 0)]
    if not len(records):
        return []
    lines = []
    for word in ("width", "height"):
        low, middle, high = np.percentile(records[word], (0, 50, 100)).astype(int).tolist()
        lines.append(f"{word}: {low:,} to {high:,} pixels, median {middle:,}")
    modes, counts = np.unique(records["mode"], return_counts=True)
    order = np.argsort(-counts, kind="stable").tolist()
    return [*lines, f"modes: {', '.join(f'{counts[place]:,} {MODES[modes[place]]}' for place in order)}"]
