"""Look before training: which images can be read, what they are, and which of them lie in two splits.

Files are looked for first, all of them, then decoded in an order that is spread over the whole data, then, when the
time is up, only their first bytes are read. What was seen is remembered, so the next start goes on where this ended.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.data.checks.verdicts import DECODED, HEADER, MODES, PRESENT, RECORD, UNSEEN, Records, Verdicts
from finetune.data.images.decode import ImageError, header_of_whole
from finetune.data.split import SPLITS, Source, Store
from finetune.data.streams import ranks, shuffled
from finetune.system.processors import cores

CHUNK = 4096  # files looked for between two looks at the clock
PIECE = 8  # files handed to a thread at once: handing over a single one costs as much as its header
MAX_THREADS = 16
MAX_BAD = 100_000  # unreadable files from which on no more are looked for: it is the folder that is wrong
_HALVES = ("first", "second")  # of the hash of an image's bytes

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Bad:
    """An image that cannot be read.

    Attributes:
        split: `train`, `val` or `test`.
        index: Into the split.
        name: How it is called.
        reason: Why, in a few words.
    """

    split: str
    index: int
    name: str
    reason: str


@dataclass
class Findings:
    """What a look at a source found.

    Attributes:
        records: Of each split one RECORD an image.
        bad: What cannot be read, in the order of splits and indices.
        remembered: How many images were known from an earlier look.
    """

    records: dict[str, Records]
    bad: list[Bad] = field(default_factory=list)
    remembered: int = 0

    @property
    def coverage(self) -> str:
        """How far the look went, in one line."""
        total = sum(map(len, self.records.values()))
        good = (records["depth"][records["bad"] == 0] for records in self.records.values())
        counts = np.sum([np.bincount(depths, minlength=DECODED + 1) for depths in good], axis=0)
        words = {
            DECODED: "decoded",
            HEADER: "by their headers only",
            PRESENT: "only found to be there",
            UNSEEN: "not looked at",
        }
        parts = [f"{counts[depth]:,} {word}" for depth, word in words.items() if counts[depth]]
        parts += [f"{len(self.bad):,} unreadable"] * bool(self.bad)
        known = f" ({self.remembered:,} of them known from an earlier look)" if self.remembered else ""
        return f"{total:,} images checked: {', '.join(parts)}{known}"


class _Look:
    """One look: all splits as one long list."""

    def __init__(self, source: Source, verdicts: Verdicts) -> None:
        self.store: Store = source.splits["train"].store
        self.rows = np.concatenate([source.splits[name].rows.numpy() for name in SPLITS])
        self.records: Records = np.zeros(len(self.rows), RECORD)
        self.verdicts = verdicts
        self.bad: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.remembered = 0
        # Known to be unreadable, but by whom? A newer Pillow, or a machine with more memory, may read them. So they are
        # looked at again, first of all, and what was known stands where there is no time.
        self.doubted: list[int] = []

    def find_all(self, deadline: float) -> None:
        """Stamp every image until the time is up; take over what is known of it."""
        for start in range(0, len(self.rows), CHUNK):
            if start and self._is_over(deadline):
                return
            stamps = [self._stamp(position) for position in range(start, min(start + CHUNK, len(self.rows)))]
            part = self.records[start : start + CHUNK]
            keys = ranks("stamp", 0, (stamp or "" for stamp in stamps))
            keys[[not stamp for stamp in stamps]] = 0
            known, is_known = self.verdicts.find(keys)
            there = np.array([stamp is not None for stamp in stamps])
            part["depth"] = np.where(there, PRESENT, HEADER)
            part[is_known] = known[is_known]
            part["key"] = keys
            self.remembered += int((is_known & (known["bad"] == 0)).sum())
            for place in np.flatnonzero(is_known & (known["bad"] != 0)).tolist():
                self.bad[start + place] = self.verdicts.reasons.get(int(keys[place]), "unreadable")
                self.doubted.append(start + place)

    def _stamp(self, position: int) -> str | None:
        try:
            return self.store.stamp(int(self.rows[position]))
        except ImageError as error:
            self.bad[position] = error.reason
            self.records[position]["bad"] = 1
            return None

    def go_through(self, look: Callable[[Store, int], Records], deadline: float, *, below: int, title: str) -> None:
        """Call `look` on the images that were seen less than `below`, many at a time, until the time is up."""
        if self._is_over(deadline):
            return  # to shuffle millions takes a second, too
        order = shuffled(len(self.rows), 0, 0).numpy()
        order = order[(self.records["depth"][order] < below) & (self.records["bad"][order] == 0)]
        if below == DECODED:  # a header says nothing of what is behind it
            order = np.concatenate([np.array(self.doubted, order.dtype), order])

        def pieces() -> Iterator[list[int]]:
            for start in range(0, len(order), PIECE):
                if self._is_over(deadline):
                    return
                yield order[start : start + PIECE].tolist()

        def look_at(piece: list[int]) -> list[tuple[int, Records | ImageError]]:
            return [(position, self._seen(look, position)) for position in piece]

        with _bar(title, len(order)) as bar:
            for found in _in_threads(look_at, pieces()):
                for position, seen in found:
                    self._take(position, seen)
                bar.update(len(found))

    def _is_over(self, deadline: float) -> bool:
        return time.monotonic() > deadline or len(self.bad) > MAX_BAD

    def _seen(self, look: Callable[[Store, int], Records], position: int) -> Records | ImageError:
        try:
            return look(self.store, int(self.rows[position]))
        except ImageError as error:
            return error

    def _take(self, position: int, seen: Records | ImageError) -> None:
        record = self.records[position]
        key = int(record["key"])
        if isinstance(seen, ImageError):
            self.bad[position] = seen.reason
            record["bad"], record["depth"] = 1, DECODED
            if _is_of_the_system(seen):
                record["key"] = 0  # not remembered: neither size nor time would change when it is mended
            else:
                self.reasons[key] = seen.reason
        else:
            self.bad.pop(position, None)
            self.records[position] = seen
            self.records[position]["key"] = key


def examine(source: Source, verdicts: Verdicts, *, budget_s: float = math.inf) -> Findings:
    """Look at every image of `source` as closely as the time allows.

    Args:
        source: All of it is looked at, whatever was found before.
        verdicts: What is known; what is learned is added and saved, also when a person stops it.
        budget_s: Seconds for looking for files and decoding; half of that again for headers.
    """
    began = time.monotonic()
    look = _Look(source, verdicts)
    try:
        look.find_all(began + budget_s)
        look.go_through(_decode, began + budget_s, below=DECODED, title="check images")
        look.go_through(_read_header, began + 1.5 * budget_s, below=HEADER, title="check headers")
    finally:
        verdicts.save(look.records, look.reasons)
    findings = Findings({}, remembered=look.remembered)
    start = 0
    for name in SPLITS:
        split = source.splits[name]
        findings.records[name] = look.records[start : start + len(split)]
        places = sorted(position - start for position in look.bad if start <= position < start + len(split))
        findings.bad += [Bad(name, place, split.name_of(place), look.bad[start + place]) for place in places]
        start += len(split)
    return findings


def _is_of_the_system(error: ImageError) -> bool:
    """Whether the file was not to be had (its rights, a disk that failed), which says nothing of what is in it."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno is not None  # decoders raise OSError too, without a number


def _decode(store: Store, row: int) -> Records:
    record = np.zeros((), RECORD)
    data = store.read(row)
    if store.encoded:
        header = header_of_whole(data, store.name_of(row))
    else:
        header = store.header(row)
        store.load(row)
    digest = hashlib.blake2b(data, digest_size=16, usedforsecurity=False).digest()
    record["depth"], record["mode"] = DECODED, _mode(header.mode)
    record["height"], record["width"] = header.height, header.width
    record["first"], record["second"] = np.frombuffer(digest, dtype="<u8")
    return record


def _read_header(store: Store, row: int) -> Records:
    record = np.zeros((), RECORD)
    header = store.header(row)
    record["depth"], record["mode"] = HEADER, _mode(header.mode)
    record["height"], record["width"] = header.height, header.width
    return record


def _in_threads(work: Callable[[_Given], _Made], pieces: Iterator[_Given]) -> Iterator[_Made]:
    """`map(work, pieces)`, by a thread a core; few pieces are asked for ahead, so that whoever gives them can stop."""
    threads = min(MAX_THREADS, cores())
    if threads == 1:
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(work, piece) for piece in islice(pieces, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, piece) for piece in islice(pieces, 1))


def _mode(word: str) -> int:
    return MODES.index(word) if word in MODES else 0


def _bar(title: str, total: int) -> Any:
    """A progress bar on stderr, where that is a terminal; short looks show none."""
    return tqdm(total=total, desc=title, unit=" images", leave=False, disable=None, delay=1)


def duplicates(source: Source, findings: Findings) -> Iterator[list[tuple[str, int]]]:
    """Groups of images that are the same to the last byte, as (split, index), where that harms.

    That is where a group lies in more than one split, or under more than one label. Only images whose bytes were read
    can be told.
    """
    records = findings.records
    starts = np.cumsum([0, *(len(records[name]) for name in SPLITS)])
    # Of millions of images few may have been read at a start, so only these are copied.
    inside = {name: np.flatnonzero((part["first"] != 0) | (part["second"] != 0)) for name, part in records.items()}
    read = np.concatenate([start + inside[name] for start, name in zip(starts[:-1], SPLITS, strict=True)])
    first, second = (np.concatenate([records[name][half][inside[name]] for name in SPLITS]) for half in _HALVES)
    order = np.lexsort((second, first))
    read, first, second = read[order], first[order], second[order]
    splits = np.searchsorted(starts, read, side="right") - 1
    ends = np.flatnonzero((np.diff(first) != 0) | (np.diff(second) != 0)) + 1
    sizes = np.diff(ends, prepend=0, append=len(read))
    begins = np.concatenate([[0], ends])
    for place in np.flatnonzero(sizes > 1).tolist():
        group = slice(begins[place], begins[place] + sizes[place])
        found = sorted(zip(read[group].tolist(), splits[group].tolist(), strict=True))
        members = [(SPLITS[split], position - int(starts[split])) for position, split in found]
        if len({split for split, _ in members}) > 1 or _labels_differ(source, members):
            yield members


def _labels_differ(source: Source, members: Sequence[tuple[str, int]]) -> bool:
    labels = [source.splits[split].labels[index].tolist() for split, index in members]
    return any(label != labels[0] for label in labels)
