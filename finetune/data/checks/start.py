"""The check at every start of a run, and what becomes of images that cannot be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from finetune.config import DataConf, OnError
from finetune.data.cache_dir import cache_folder
from finetune.data.caches.entries import size_line
from finetune.data.checks.examine import Bad, Findings, duplicates, examine
from finetune.data.checks.verdicts import Verdicts
from finetune.data.images.decode import ImageError
from finetune.data.split import Source, class_counts
from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")

MAX_SHOWN = 10
IMBALANCE = 10.0  # times the smallest class, from which the largest is worth a word


class SkippedList:
    """`skipped.txt` in a run directory: which images a run goes without, why, and since when.

    What was left out at the first start stays left out when the run is continued, and nothing else does: the images
    and their order are those of an uninterrupted run, whatever has become of the files meanwhile, and whatever
    `data.on_error` says by now.
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the file; it is there, perhaps empty, as soon as the images of the run have been checked."""
        self.path = run_dir / "skipped.txt"
        self._later: set[str] = set()

    def start(self, bad: Sequence[Bad]) -> None:
        """Begin the list with what the check found."""
        write_text(self.path, "".join(_line("start", item.split, item.index, item.name, item.reason) for item in bad))

    def from_start(self) -> list[Bad] | None:
        """What was left out at the first start, or None where the run was not started before."""
        if not self.path.exists():
            return None
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [Bad(row["split"], row["index"], row["name"], row["reason"]) for row in rows if row["when"] == "start"]

    def add(self, error: ImageError) -> None:
        """Note an image that went bad during the run, once; its batch was trained without it."""
        if error.path in self._later:
            return
        self._later.add(error.path)
        logger.warning("left out: %s", error)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line("later", "", -1, error.path, error.reason))


def _line(when: str, split: str, index: int, name: str, reason: str) -> str:
    # JSON with escapes: a name may hold a line break, or bytes that are no text.
    return json.dumps({"when": when, "split": split, "index": index, "name": name, "reason": reason}) + "\n"


def check_at_start(source: Source, conf: DataConf, run_dir: Path) -> Source:
    """Look at the images for `data.check_budget_s`, say what is wrong, and apply `data.on_error`.

    Returns:
        The source without what is skipped.

    Raises:
        ValueError: Images cannot be read and `data.on_error=stop`; the full list is in `unreadable.txt`.
    """
    line = size_line(cache_folder(conf.cache_dir))
    if line is not None:
        logger.info("%s", line)
    findings = examine(source, Verdicts(conf.cache_dir, source.location), budget_s=conf.check_budget_s)
    logger.info("%s", findings.coverage)
    for line in [*source.warnings, *imbalance(source)]:
        logger.warning("%s", line)
    _warn_of_duplicates(source, findings, run_dir)
    skipped = SkippedList(run_dir)
    earlier = skipped.from_start()
    known = {(item.split, item.index) for item in earlier or ()}
    if conf.on_error == OnError.stop:
        news = [item for item in findings.bad if (item.split, item.index) not in known]
        if news:
            raise UserError(_refusal(news, run_dir))
    if earlier is None:
        skipped.start(findings.bad)
        earlier = findings.bad
    # Else the run is continued; what has gone bad since is met, and left out, batch by batch.
    return _leave_out(source, earlier, skipped)


def _refusal(bad: Sequence[Bad], run_dir: Path) -> str:
    path = run_dir / "unreadable.txt"
    lines = ("\t".join(map(printable, (item.name, item.split, item.reason))) for item in bad)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return (
        f"{len(bad):,} images cannot be read: {_first(bad)}. All of them are in {path}. Repair or remove them,"
        " or train without them by data.on_error=skip"
    )


def _first(bad: Sequence[Bad]) -> str:
    """The first of them in a line, whatever their names hold."""
    shown = printable("; ".join(f"{item.name} ({item.reason})" for item in bad[:MAX_SHOWN]))
    return shown + (f"; and {len(bad) - MAX_SHOWN:,} more" if len(bad) > MAX_SHOWN else "")


def _leave_out(source: Source, bad: Sequence[Bad], skipped: SkippedList) -> Source:
    moved = [item for item in bad if item.index >= len(source.splits[item.split])]
    moved = moved or [item for item in bad if source.splits[item.split].name_of(item.index) != item.name]
    if moved:
        raise UserError(
            f"{skipped.path} lists {moved[0].name} as number {moved[0].index} of {moved[0].split}, where another image"
            " is now: the data has changed since this run was started; start a new run"
        )
    if not bad:
        return source
    logger.warning("%d images are left out (all in %s): %s", len(bad), skipped.path, _first(bad))
    return source.without({name: [item.index for item in bad if item.split == name] for name in source.splits})


def _warn_of_duplicates(source: Source, findings: Findings, run_dir: Path) -> None:
    """The same image in two splits makes a test that was learned by heart; under two labels one label is wrong."""
    lines = duplicate_lines(source, findings)
    if not lines:
        return
    path = run_dir / "duplicates.txt"
    write_text(path, "".join(f"{line}\n" for line in lines))
    more = f"; and {len(lines) - 3:,} more" if len(lines) > 3 else ""
    logger.warning(
        "%d images come more than once, to the last byte, in several splits or classes (all in %s): %s%s",
        len(lines), path, "; ".join(islice(lines, 3)), more,
    )  # fmt: skip


def duplicate_lines(source: Source, findings: Findings) -> list[str]:
    """Each group of the same images in a line, with the split and the class of each."""
    lines = []
    for group in duplicates(source, findings):
        words = [f"{source.splits[name].name_of(i)} [{name}, {label_of(source, name, i)}]" for name, i in group]
        lines.append(printable(" = ".join(words)))
    return lines


def label_of(source: Source, split: str, index: int) -> str:
    """The class of an image in words; of several, all."""
    label = source.splits[split].labels[index]
    if label.ndim == 0:
        return source.classes[int(label)]
    return "+".join(name for name, has in zip(source.classes, label.tolist(), strict=True) if has) or "no label"


def imbalance(source: Source) -> list[str]:
    """A line where training classes differ a lot in size and nothing is done about it."""
    counts = class_counts(source.splits["train"].labels, len(source.classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    if source.is_multilabel or source.class_weights is not None or counts[large] < IMBALANCE * counts[small]:
        return []
    ends = f"{source.classes[large]} has {counts[large]:,} training images, {source.classes[small]} {counts[small]:,}"
    return [f"classes differ in size: {ends}; data.balance=weights or sampling evens that out"]
