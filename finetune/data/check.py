"""Look before training: which images can be read, what they are, and which of them lie in two splits.

Files are looked for first, all of them, then decoded in an order that is spread over the whole data, then, when the
time is up, only their first bytes are read. What was seen is remembered, so the next start goes on where this ended.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.data.cores import cores
from finetune.data.images import ImageError, decode, header_of
from finetune.data.split import SPLITS, Source, Store
from finetune.data.streams import ranks, shuffled
from finetune.data.verdicts import DECODED, HEADER, MODES, PRESENT, RECORD, UNSEEN, Records, Verdicts

CHUNK = 4096  # files looked for between two looks at the clock
BATCH = 64  # files decoded between two looks at the clock
MAX_THREADS = 16
MAX_BAD = 100_000  # unreadable files from which on no more are looked for: it is the folder that is wrong


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

    def count(self, depth: int) -> int:
        """How many good images were looked at this far, and no further."""
        return sum(
            int(((records["depth"] == depth) & (records["bad"] == 0)).sum()) for records in self.records.values()
        )

    @property
    def coverage(self) -> str:
        """How far the look went, in one line."""
        total = sum(map(len, self.records.values()))
        parts = [
            f"{self.count(depth):,} {word}"
            for depth, word in (
                (DECODED, "decoded"),
                (HEADER, "by their headers only"),
                (PRESENT, "only found to be there"),
                (UNSEEN, "not looked at"),
            )
            if self.count(depth)
        ]
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

    def find_all(self, deadline: float) -> None:
        """Stamp every image until the time is up; take over what is known of it."""
        for start in range(0, len(self.rows), CHUNK):
            if (start and time.monotonic() > deadline) or len(self.bad) > MAX_BAD:
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
            self.remembered += int(is_known.sum())
            for place in np.flatnonzero(is_known & (known["bad"] != 0)).tolist():
                self.bad[start + place] = self.verdicts.reasons.get(int(keys[place]), "unreadable")

    def _stamp(self, position: int) -> str | None:
        try:
            return self.store.stamp(int(self.rows[position]))
        except ImageError as error:
            self.bad[position] = error.reason
            self.records[position]["bad"] = 1
            return None

    def go_through(self, look: Callable[[Store, int], Records], deadline: float, *, below: int, title: str) -> None:
        """Call `look` on the images that were seen less than `below`, many at a time, until the time is up."""
        order = shuffled(len(self.rows), 0, 0).numpy()
        order = order[(self.records["depth"][order] < below) & (self.records["bad"][order] == 0)]
        threads = min(MAX_THREADS, cores())
        with ThreadPoolExecutor(threads) as pool, _bar(title, len(order)) as bar:
            each = map if threads == 1 else pool.map  # handing a single image over costs as much as its header
            for start in range(0, len(order), BATCH):
                if time.monotonic() > deadline or len(self.bad) > MAX_BAD:
                    return
                positions = order[start : start + BATCH].tolist()
                for position, seen in zip(positions, each(self._guarded(look), positions), strict=True):
                    self._take(position, seen)
                bar.update(len(positions))

    def _guarded(self, look: Callable[[Store, int], Records]) -> Callable[[int], Records | ImageError]:
        def guarded(position: int) -> Records | ImageError:
            try:
                return look(self.store, int(self.rows[position]))
            except ImageError as error:
                return error

        return guarded

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
        name = store.name_of(row)
        header = header_of(data, name)
        decode(data, name)
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
    records = np.concatenate([findings.records[name] for name in SPLITS])
    splits = np.repeat(np.arange(len(SPLITS)), [len(findings.records[name]) for name in SPLITS])
    starts = np.cumsum([0] + [len(findings.records[name]) for name in SPLITS])
    read = np.flatnonzero((records["first"] != 0) | (records["second"] != 0))
    read = read[np.lexsort((records["second"][read], records["first"][read]))]
    first, second = records["first"][read], records["second"][read]
    ends = np.flatnonzero((np.diff(first) != 0) | (np.diff(second) != 0)) + 1
    sizes = np.diff(ends, prepend=0, append=len(read))
    begins = np.concatenate([[0], ends])
    for place in np.flatnonzero(sizes > 1).tolist():
        group = np.sort(read[begins[place] : begins[place] + sizes[place]]).tolist()
        members = [(SPLITS[splits[position]], position - int(starts[splits[position]])) for position in group]
        if len({split for split, _ in members}) > 1 or _labels_differ(source, members):
            yield members


def _labels_differ(source: Source, members: Sequence[tuple[str, int]]) -> bool:
    labels = [source.splits[split].labels[index].tolist() for split, index in members]
    return any(label != labels[0] for label in labels)
