"""The check of the images at every start of a run, and the list of images that a run leaves out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from finetune.config import DataConf, OnError
from finetune.data.caches.entries import cache_folder, size_line
from finetune.data.checks.examine import DataReport, UnreadableImage, examine
from finetune.data.checks.known_images import KnownImages
from finetune.data.checks.summary import duplicate_lines, imbalance, unreadable_lines, write_lines
from finetune.data.images.decode import ImageError
from finetune.data.split import Source
from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")

MAX_SHOWN = 10  # unreadable images that a message names


class SkippedList:
    """`skipped.txt` in a run directory: each image that the run leaves out, why, and since when.

    Images that were left out at the first start stay left out when the run is continued, and no others do. So the
    images and their order are those of an uninterrupted run, whatever became of the files or of `data.on_error`.
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the file. It exists, perhaps empty, as soon as the images of the run have been checked."""
        self.path = run_dir / "skipped.txt"
        self._later: set[str] = set()

    def start(self, images: Sequence[UnreadableImage]) -> None:
        """Begin the list with the images that the first check could not read."""
        lines = (_line("start", image.split, image.index, image.name, image.reason) for image in images)
        write_text(self.path, "".join(lines))

    def from_start(self) -> list[UnreadableImage] | None:
        """The images that were left out at the first start; None where the run was not started before."""
        if not self.path.exists():
            return None
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [
            UnreadableImage(row["split"], row["index"], row["name"], row["reason"])
            for row in rows
            if row["when"] == "start"
        ]

    def add(self, error: ImageError) -> None:
        """Note an image that became unreadable during the run, once; its batch was trained without it."""
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
    """Examine the images for `data.check_budget_s`, log what is wrong with them, and apply `data.on_error`.

    Returns:
        The source without the images that the run leaves out.

    Raises:
        UserError: Images cannot be read and `data.on_error=stop`; the full list is in `unreadable.txt`.
    """
    cache = size_line(cache_folder(conf.cache_dir))
    if cache is not None:
        logger.info("%s", cache)
    report = examine(source, KnownImages(conf.cache_dir, source.location), budget_s=conf.check_budget_s)
    logger.info("%s", report.coverage)
    for line in [*source.warnings, *imbalance(source)]:
        logger.warning("%s", line)
    _warn_of_duplicates(source, report, run_dir)
    skipped = SkippedList(run_dir)
    earlier = skipped.from_start()
    if conf.on_error == OnError.stop:
        left_out = {(image.split, image.index) for image in earlier or ()}
        new = [image for image in report.unreadable if (image.split, image.index) not in left_out]
        if new:
            raise UserError(_refusal(new, run_dir))
    if earlier is None:
        skipped.start(report.unreadable)
        earlier = report.unreadable
    # In a run that is continued, an image that became unreadable since is left out when its batch is made.
    return _leave_out(source, earlier, skipped)


def _refusal(images: Sequence[UnreadableImage], run_dir: Path) -> str:
    path = run_dir / "unreadable.txt"
    write_lines(path, unreadable_lines(images))
    return (
        f"{len(images):,} images cannot be read: {_first(images)}. All of them are in {path}. Repair or remove them,"
        " or train without them by data.on_error=skip"
    )


def _first(images: Sequence[UnreadableImage]) -> str:
    """Name and reason of the first images, in one line."""
    shown = printable("; ".join(f"{image.name} ({image.reason})" for image in images[:MAX_SHOWN]))
    return shown + (f"; and {len(images) - MAX_SHOWN:,} more" if len(images) > MAX_SHOWN else "")


def _leave_out(source: Source, images: Sequence[UnreadableImage], skipped: SkippedList) -> Source:
    """The source without `images`, which must still be where they were at the first start."""
    for image in images:
        split = source.splits[image.split]
        if image.index >= len(split) or split.name_of(image.index) != image.name:
            raise UserError(
                f"{skipped.path} lists {image.name} as number {image.index} of {image.split}, where another image is"
                " now: the data has changed since this run was started; start a new run"
            )
    if not images:
        return source
    logger.warning("%d images are left out (all in %s): %s", len(images), skipped.path, _first(images))
    return without_images(source, images)


def without_images(source: Source, images: Sequence[UnreadableImage]) -> Source:
    """The source without these images; raises UserError where a split or a class would lose all of its images."""
    return source.without({name: [image.index for image in images if image.split == name] for name in source.splits})


def _warn_of_duplicates(source: Source, report: DataReport, run_dir: Path) -> None:
    lines = duplicate_lines(source, report)
    if not lines:
        return
    path = run_dir / "duplicates.txt"
    write_lines(path, lines)
    more = f"; and {len(lines) - 3:,} more" if len(lines) > 3 else ""
    logger.warning(
        "%d images come more than once, to the last byte, in several splits or classes (all in %s): %s%s",
        len(lines), path, "; ".join(islice(lines, 3)), more,
    )  # fmt: skip
