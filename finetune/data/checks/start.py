"""The check of the images at every start of a run, and the list of images that a run leaves out."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta

from finetune.config import DataConf, OnError
from finetune.data.caches.entries import cache_folder, size_line
from finetune.data.checks.examine import examine
from finetune.data.checks.known_images import KnownImages
from finetune.data.checks.summary import duplicate_lines, imbalance, unreadable_lines, write_lines
from finetune.data.images.decode import ImageError
from finetune.data.split import Source, UnreadableImage
from finetune.system.errors import UserError, naming
from finetune.system.files import write_text
from finetune.system.ours import open_own
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, parse_json_lines, read_file
from finetune.system.terminal import counted, printable

logger = logging.getLogger("finetune")


MEND = "restore the file, or start a new run"


class _SkippedImage(TypedDict):
    """A line of `skipped.txt`."""

    when: Literal["start", "later"]
    split: Literal["train", "val", "test", ""]  # empty, with index -1, where `when` is `later`
    index: Annotated[int, Meta(ge=-1, le=2**53)]
    name: str
    reason: str


class SkippedList:
    """`skipped.txt` in a run directory: each image that the run leaves out, why, and since when.

    A continued run leaves out the same images as its first start, and no others. So images and order are those of an
    uninterrupted run, whatever happened to the files or to `data.on_error` meanwhile.
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the file. It exists, perhaps empty, as soon as the images of the run have been checked."""
        self.path = run_dir / "skipped.txt"
        self._later: set[str] = set()

    def start(self, images: Sequence[UnreadableImage]) -> None:
        """Begin the list with the images that the first check could not read."""
        write_text(self.path, "".join(_line("start", image) for image in images))

    def from_start(self) -> list[UnreadableImage] | None:
        """The images that were left out at the first start; None where the run was not started before."""
        if not self.path.exists():
            return None
        rows = [row for row in self._rows() if row["when"] == "start"]
        if any(row["split"] == "" or row["index"] < 0 for row in rows):
            raise DamagedError.because(self.path, "an image has no place in a split", MEND)
        return [UnreadableImage(row["split"], row["index"], row["name"], row["reason"]) for row in rows]

    def _rows(self) -> list[_SkippedImage]:
        """All lines, without a last one that a kill left half written; none where there is no file."""
        if not self.path.exists():
            return []
        try:
            text = read_file(self.path, limit=MAX_BYTES)
            return parse_json_lines(text[: text.rfind(b"\n") + 1], _SkippedImage)
        except UnfitError as error:
            raise DamagedError.because(self.path, str(error), MEND) from None

    def add(self, error: ImageError) -> None:
        """Note an image that became unreadable during the run, once; its batch was trained without it."""
        if error.path in self._later:
            return
        if not self._later:  # a kill may have left half a line, which the next one must not be written behind
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self._rows()))
        self._later.add(error.path)
        logger.warning("left out: %s", error)
        with naming(self.path), open_own(self.path, "a", encoding="utf-8") as file:
            file.write(_line("later", UnreadableImage("", -1, error.path, error.reason)))


def _line(when: str, image: UnreadableImage) -> str:
    # JSON with escapes: a name may hold a line break, or bytes that are no text.
    return json.dumps({"when": when, **asdict(image)}) + "\n"


def check_at_start(source: Source, conf: DataConf, run_dir: Path) -> Source:
    """Examine the images for `data.check_budget_s`, log their faults; return the source without those to leave out.

    Raises UserError if images cannot be read and `data.on_error=stop`; the full list is in `unreadable.txt`.
    """
    if cache := size_line(cache_folder(conf.cache_dir)):
        logger.info("%s", cache)
    report = examine(source, KnownImages(conf.cache_dir, source.location), budget_s=conf.check_budget_s)
    logger.info("%s", report.coverage)
    for line in [*source.warnings, *imbalance(source)]:
        logger.warning("%s", line)
    duplicates = duplicate_lines(source, report)
    if duplicates:
        path = run_dir / "duplicates.txt"
        write_lines(path, duplicates)
        number = counted(len(duplicates), "image that comes", "images that come")
        title = f"{number} more than once, to the last byte, in several splits or classes"
        logger.warning("%s (all in %s): %s", title, path, _first(duplicates, 3))
    skipped = SkippedList(run_dir)
    earlier = skipped.from_start()
    if conf.on_error == OnError.stop:
        left_out = {(image.split, image.index) for image in earlier or ()}
        new = [image for image in report.unreadable if (image.split, image.index) not in left_out]
        if new:
            path = run_dir / "unreadable.txt"
            write_lines(path, unreadable_lines(new))
            found = f"{counted(len(new), 'image')} cannot be read: {_names(new)}. The list: {path}"
            raise UserError(f"{found}. Repair or remove them, or train without them by data.on_error=skip")
    if earlier is None:
        skipped.start(report.unreadable)
        earlier = report.unreadable
    for image in earlier:
        split = source.splits[image.split]
        if image.index >= len(split) or split.name_of(image.index) != image.name:
            listed = f"{skipped.path} lists {image.name} as number {image.index} of {image.split}"
            other = "where another image is now: the data has changed since this run was started"
            raise UserError(f"{listed}, {other}; start a new run")
    # In a continued run an image that became unreadable since its first start is left out when its batch is made.
    if not earlier:
        return source
    logger.warning("left out: %s (listed in %s): %s", counted(len(earlier), "image"), skipped.path, _names(earlier))
    return source.without(earlier)


def _first(lines: Sequence[str], most: int) -> str:
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most:,} more" if len(lines) > most else "")


def _names(images: Sequence[UnreadableImage]) -> str:
    return printable(_first([f"{image.name} ({image.reason})" for image in images], 10))
