"""Examine the images of a source before training: which can be read, their sizes, and which lie in two splits.

First every file is looked for. Then images are decoded, in an order that is spread over the whole data. When the time
is up, only headers are read. Results are remembered, so the next start continues where this one ended.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.data.checks.known_images import (
    DECODED,
    HEADER,
    MODES,
    PRESENT,
    RECORD,
    UNSEEN,
    KnownImages,
    Records,
    content_hashes,
    stamp_keys,
)  # fmt: skip
from finetune.data.checks.looks import look_of
from finetune.data.cutting import Rows
from finetune.data.images.decode import Header, ImageError, decode_with_header
from finetune.data.split import SPLITS, ImageStore, Source, UnreadableImage
from finetune.data.streams import shuffled
from finetune.system.processors import map_in_threads
from finetune.system.terminal import counted

CHUNK = 4096  # files looked for between two looks at the clock
PIECE = 8  # images handed to a thread at once: handing over a single one costs as much as reading its header
MAX_UNREADABLE = 100_000  # after this number the search ends: the folder is the wrong one
DEPTH_WORDS = {DECODED: "decoded", HEADER: "by their headers only", PRESENT: "only found to be there"}
DEPTH_WORDS[UNSEEN] = "not looked at"


Group = list[tuple[str, int]]  # images that belong together: split, and index there


@dataclass
class DataReport:
    """The result of a check of all images of a source."""

    records: dict[str, Records]  # of each split one RECORD an image
    unreadable: list[UnreadableImage] = field(default_factory=list)  # in the order of splits and indices
    remembered: int = 0  # how many images were known from an earlier check

    @property
    def coverage(self) -> str:
        """How many images were examined and how closely, in one line."""
        total = sum(map(len, self.records.values()))
        good = (records["depth"][records["bad"] == 0] for records in self.records.values())
        counts = np.sum([np.bincount(depths, minlength=DECODED + 1) for depths in good], axis=0)
        parts = [f"{counts[depth]:,} {words}" for depth, words in DEPTH_WORDS.items() if counts[depth]]
        parts += [f"{len(self.unreadable):,} unreadable"] * bool(self.unreadable)
        known = f" ({self.remembered:,} of them known from an earlier look)" if self.remembered else ""
        return f"{counted(total, 'image')} checked: {', '.join(parts)}{known}"


class _Examination:
    """Some images of a store, such as those of all splits, as one list; a position is a place in it."""

    def __init__(self, store: ImageStore, rows: Rows, known: KnownImages) -> None:
        self.store, self.rows = store, rows
        self.records: Records = np.zeros(len(self.rows), RECORD)
        self.known = known
        self.unreadable: dict[int, str] = {}  # position -> reason
        self.reasons: dict[int, str] = {}  # key -> reason, to be remembered
        self.remembered = 0

    def find_all(self, deadline: float) -> None:
        """Look for every image until the time is up, and take over what is known of it."""
        for start in range(0, len(self.rows), CHUNK):
            if start and self._is_over(deadline):
                return
            stamps = [self._stamp(position) for position in range(start, min(start + CHUNK, len(self.rows)))]
            part = self.records[start : start + CHUNK]
            keys = stamp_keys([stamp or "" for stamp in stamps], self.store.max_pixels)
            known, is_known = self.known.find(keys)
            part["depth"] = np.where([stamp is not None for stamp in stamps], PRESENT, HEADER)
            part[is_known] = known[is_known]
            part["key"] = keys
            self.remembered += int((is_known & (known["bad"] == 0) & (known["depth"] >= HEADER)).sum())
            for place in np.flatnonzero(is_known & (known["bad"] != 0)).tolist():
                self.unreadable[start + place] = self.known.reasons.get(int(keys[place]), "unreadable")

    def _stamp(self, position: int) -> str | None:
        try:
            return self.store.stamp(int(self.rows[position]))
        except ImageError as error:
            self.unreadable[position] = error.reason
            self.records[position]["bad"] = 1
            return None

    def read(
        self,
        look: Callable[[ImageStore, int], Records],
        deadline: float,
        *,
        below: int,
        title: str,
        with_looks: bool = False,
    ) -> None:
        """Call `look` on the images that were examined less closely than `below`, in threads, until the time is up.

        `with_looks` calls it on those whose `look` is not known, too.
        """
        if self._is_over(deadline):
            return  # before the shuffle, which takes a second for millions of images
        order = shuffled(len(self.rows), 0, 0).numpy()
        is_bad = self.records["bad"][order] != 0
        is_known = self.records["depth"][order] >= below
        if with_looks:
            is_known &= self.records["look"][order] != 0
        todo = order[~is_known & ~is_bad]
        if below == DECODED:
            # Images that an earlier check could not read come first: a newer Pillow or more memory may decode them. A
            # header does not show that, so without time for decoding they stay unreadable.
            todo = np.concatenate([order[is_bad], todo])

        def pieces() -> Iterator[list[int]]:
            for start in range(0, len(todo), PIECE):
                if self._is_over(deadline):
                    return
                yield todo[start : start + PIECE].tolist()

        def look_at(piece: list[int]) -> list[tuple[int, Records | ImageError]]:
            results: list[tuple[int, Records | ImageError]] = []
            for position in piece:
                try:
                    results.append((position, look(self.store, int(self.rows[position]))))
                except ImageError as error:
                    results.append((position, error))
            return results

        with tqdm(total=len(todo), desc=title, unit=" images", leave=False, disable=None, delay=1) as bar:
            for piece in map_in_threads(look_at, pieces()):
                for position, result in piece:
                    self._note(position, result)
                bar.update(len(piece))

    def _is_over(self, deadline: float) -> bool:
        return time.monotonic() > deadline or len(self.unreadable) > MAX_UNREADABLE

    def _note(self, position: int, result: Records | ImageError) -> None:
        record = self.records[position]
        key = int(record["key"])
        if isinstance(result, ImageError):
            self.unreadable[position] = result.reason
            record["bad"], record["depth"] = 1, DECODED
            cause = result.__cause__
            if isinstance(cause, OSError) and cause.errno is not None:  # decoders raise OSError without a number
                # The file could not be opened: its rights, or a failing disk. That is not remembered, since the stamp
                # stays the same when it is mended.
                record["key"] = 0
            else:
                self.reasons[key] = result.reason
        else:
            self.unreadable.pop(position, None)
            if not result["tail"]:  # a look at the header does not forget what an earlier reading has found
                for name in ("first", "second", "tail", "look"):
                    result[name] = record[name]
            elif not result["look"]:
                result["look"] = record["look"]
            result["key"] = key
            self.records[position] = result


def decode_all(store: ImageStore, rows: Rows, known: KnownImages) -> Records:
    """The records of some images, with their looks; those that cannot be read have none. Also saved in `known`."""
    examination = _Examination(store, rows, known)
    try:
        examination.find_all(math.inf)
        examination.read(_decode_with_look, math.inf, below=DECODED, title="compare looks", with_looks=True)
    finally:
        known.save(examination.records, examination.reasons)
    return examination.records


def examine(source: Source, known: KnownImages, *, budget_s: float = math.inf, with_looks: bool = False) -> DataReport:
    """Examine every image of `source` as closely as the time allows; `with_looks` also computes their looks.

    `budget_s` are seconds for looking for files and decoding; reading headers may take half as many again. New results
    are added to `known` and saved, also when Ctrl-C ends the check.
    """
    began = time.monotonic()
    rows = np.concatenate([source.splits[name].rows.numpy() for name in SPLITS])
    examination = _Examination(source.splits["train"].store, rows, known)
    decoding = _decode_with_look if with_looks else _decode
    try:
        examination.find_all(began + budget_s)
        examination.read(decoding, began + budget_s, below=DECODED, title="check images", with_looks=with_looks)
        examination.read(_look_at_header, began + 1.5 * budget_s, below=HEADER, title="check headers")
    finally:
        known.save(examination.records, examination.reasons)
    report = DataReport({}, remembered=examination.remembered)
    start = 0
    for name in SPLITS:
        split, end = source.splits[name], start + len(source.splits[name])
        report.records[name] = examination.records[start:end]
        for position, reason in sorted(examination.unreadable.items()):
            if start <= position < end:
                index = position - start
                report.unreadable.append(UnreadableImage(name, index, split.name_of(index), reason))
        start = end
    return report


def _decode(store: ImageStore, row: int, *, with_look: bool = False) -> Records:
    data = store.read(row)
    if store.encoded:
        header, pixels = decode_with_header(data, store.name_of(row), store.max_pixels)
    else:
        header = store.header(row)
        pixels = store.load(row)
    record = _record(DECODED, header)
    record["tail"], record["first"], record["second"] = content_hashes(data)
    if with_look:
        record["look"] = look_of(pixels)
    return record


def _decode_with_look(store: ImageStore, row: int) -> Records:
    return _decode(store, row, with_look=True)


def _look_at_header(store: ImageStore, row: int) -> Records:
    return _record(HEADER, store.header(row))


def _record(depth: int, header: Header) -> Records:
    record = np.zeros((), RECORD)
    record["depth"], record["mode"] = depth, MODES.index(header.mode) if header.mode in MODES else 0
    record["height"], record["width"] = header.height, header.width
    return record


def find_duplicates(source: Source, report: DataReport) -> Iterator[Group]:
    """Yield groups of images with equal bytes that lie in several splits or under several labels.

    Such a group leaks training images into the test, or one of its labels is wrong. Only images that were decoded can
    be compared.
    """
    first, second = (of_all(report, half) for half in ("first", "second"))
    read = np.flatnonzero((first != 0) | (second != 0))
    order = read[np.lexsort((second[read], first[read]))]  # equal hashes side by side
    is_equal = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)  # to the next one
    edges = np.flatnonzero(np.diff(is_equal, prepend=False, append=False))  # where a group begins, and its last image
    groups = (np.sort(order[begin : last + 1]) for begin, last in edges.reshape(-1, 2).tolist())
    return harmful(source, report, groups)


def of_all(report: DataReport, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """A field of the records of all splits."""
    return np.concatenate([report.records[split][name] for split in SPLITS])


def harmful(source: Source, report: DataReport, groups: Iterator[Rows]) -> Iterator[Group]:
    """Those of `groups`, as places in all splits one after the other, with several splits or several labels."""
    starts = np.cumsum([0, *(len(report.records[name]) for name in SPLITS)])
    for positions in groups:
        places = np.searchsorted(starts, positions, side="right") - 1
        group = [(SPLITS[place], int(at - starts[place])) for place, at in zip(places, positions, strict=True)]
        labels = [source.splits[split].labels[index].tolist() for split, index in group]
        if len({split for split, _ in group}) > 1 or any(label != labels[0] for label in labels):
            yield group
