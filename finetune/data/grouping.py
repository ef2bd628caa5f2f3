"""Which images stay together when splits are cut: those of equal bytes, and those of one `data.group`.

The answer depends on the images alone: never on the time that is left, on a cache, or on where the data lies.
"""

from collections.abc import Callable

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.config import DataConf
from finetune.config.data import SIMILAR
from finetune.data.checks.examine import decode_all
from finetune.data.checks.known_images import (
    PRESENT,
    RECORD,
    TAIL_BYTES,
    KnownImages,
    Records,
    content_of,
    stamp_keys,
    tail_of,
)  # fmt: skip
from finetune.data.checks.looks import near_pairs
from finetune.data.cutting import Mask, Pairs, Rows, joined
from finetune.data.images.decode import ImageError
from finetune.data.selection import shares_to_cut
from finetune.data.split import SPLITS, FoundImages, ImageStore
from finetune.system.errors import UserError
from finetune.system.processors import map_in_threads
from finetune.system.terminal import counted

CHUNK, PIECE = 4096, 64  # images handed to a thread at once, to be looked for and to be read
LISTED = 10  # groups that a message names


def find_groups(found: FoundImages, conf: DataConf) -> Rows | None:
    """The number of each image's group, int64 (n,); None where every image is alone.

    Equal images are looked for among those that the program cuts. Raises UserError if a group of `data.group` lies in
    several of the splits that the data gives.
    """
    pairs: list[Pairs] = []
    given = found.given.numpy()
    if found.groups is not None:
        _check_given(found, np.where(given == 1, 0, given) if conf.folds else given)
        pairs.append(_first_of_each(found.groups.numbers))
    if conf.folds or shares_to_cut(found, conf):
        rows, known = (
            np.flatnonzero(given <= 1 if conf.folds else given == 0),
            KnownImages(conf.cache_dir, found.location),
        )
        if conf.group == SIMILAR:
            firsts, seconds = near_pairs(decode_all(found.store, rows, known)["look"])
            pairs.append((rows[firsts], rows[seconds]))
        pairs.append(equal_images(found.store, rows, known))
    elif conf.group == SIMILAR:
        instead = "finetune check lists images that look alike"
        raise UserError(f"data.group=similar would be ignored: no split of {found.place} is cut; {instead}")
    return joined(len(given), pairs)


def _first_of_each(numbers: Rows) -> Pairs:
    """Each image paired with the first one of its number; images with number -1 are alone."""
    rows = np.flatnonzero(numbers >= 0)
    _, firsts, number = np.unique(numbers[rows], return_index=True, return_inverse=True)
    first = rows[firsts[number]]
    return first[first != rows], rows[first != rows]


def _check_given(found: FoundImages, given: Rows) -> None:
    """Raises UserError if images of one group are in several of the splits `given`."""
    assert found.groups is not None
    numbers, names = found.groups.numbers, found.groups.names
    pairs = np.unique(np.stack([numbers, given])[:, numbers >= 0], axis=1)
    group, counts = np.unique(pairs[0], return_counts=True)
    shared = group[counts > 1].tolist()
    if shared:
        shown = [
            f"{names[number]} ({', '.join(SPLITS[split] for split in pairs[1][pairs[0] == number].tolist())})"
            for number in shared[:LISTED]
        ]
        more = f" and {len(shared) - LISTED:,} more" if len(shared) > LISTED else ""
        mend = "move each into one split, or leave data.group out"
        raise UserError(
            f"{found.place}: {counted(len(shared), 'group')} in several splits: {', '.join(shown)}{more}; {mend}"
        )


def equal_images(store: ImageStore, rows: Rows, known: KnownImages) -> Pairs:
    """Pairs of images of `rows` that have equal bytes, each with the first of its kind.

    Only images of equal size are read: first their last bytes, then the whole of those that agree in them. `known`
    spares the reading of images that were read before. An image that cannot be read equals no other. Nothing is
    compared in a store of decoded images without sizes, since all of them would have to be decoded.
    """
    nothing = np.empty(0, dtype=np.int64)
    if not len(rows) or (not store.encoded and store.size(int(rows[0])) is None):
        return nothing, nothing
    sizes, records = _look(store, rows, known)
    before = records.copy()
    likely = sizes >= 0
    likely[likely] = _is_shared(sizes[likely])
    _read(store, rows, records, likely & (records["tail"] == 0), _tail_alone)
    likely &= records["tail"] != 0
    likely[likely] = _is_shared(np.stack([sizes[likely], records["tail"][likely].view(np.int64)], axis=1))
    _read(store, rows, records, likely & (records["first"] == 0) & (records["second"] == 0), content_of)
    likely &= (records["first"] != 0) | (records["second"] != 0)
    if (records != before).any():
        known.save(records, {})
    both = np.stack([records[half][likely] for half in ("first", "second")], axis=1)
    numbers = np.full(len(rows), -1, dtype=np.int64)
    numbers[likely] = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1) if len(both) else 0
    firsts, seconds = _first_of_each(numbers)
    return rows[firsts], rows[seconds]


def _is_shared(values: Rows) -> Mask:
    """Whether each value, or row of values, occurs more than once."""
    if not len(values):
        return np.zeros(0, dtype=bool)
    _, number, counts = np.unique(values, axis=0, return_inverse=True, return_counts=True)
    return np.asarray(counts[number.reshape(-1)] > 1)


def _look(store: ImageStore, rows: Rows, known: KnownImages) -> tuple[Rows, Records]:
    """Size and record of each image; the size is 0 where it is unknown, -1 where the image is missing."""

    def look(chunk: list[int]) -> tuple[list[int], list[str]]:
        sizes, stamps = [], []
        for row in chunk:
            try:
                size, stamp = store.size(row) or 0, store.stamp(row)
            except ImageError:
                size, stamp = -1, ""
            sizes.append(size)
            stamps.append(stamp)
        return sizes, stamps

    sizes = np.empty(len(rows), dtype=np.int64)
    records: Records = np.zeros(len(rows), RECORD)
    chunks = (rows[start : start + CHUNK].tolist() for start in range(0, len(rows), CHUNK))
    for number, (some, stamps) in enumerate(map_in_threads(look, chunks)):
        part = slice(number * CHUNK, number * CHUNK + len(some))
        keys = stamp_keys(stamps, store.max_pixels)
        found, is_known = known.find(keys)
        sizes[part] = some
        records[part] = np.where(is_known, found, np.zeros((), RECORD))
        records["key"][part] = keys
    records["depth"] = np.maximum(records["depth"], PRESENT)
    return sizes, records


def _tail_alone(store: ImageStore, row: int) -> tuple[int, int, int]:
    """`content_of` an image of which only the last bytes are read, if it has many."""
    size = store.size(row)
    return (
        content_of(store, row) if size is None or size <= TAIL_BYTES else (tail_of(store.tail(row, TAIL_BYTES)), 0, 0)
    )


def _read(
    store: ImageStore,
    rows: Rows,
    records: Records,
    wanted: Mask,
    read: Callable[[ImageStore, int], tuple[int, int, int]],
) -> None:
    """Put what `read` gives of each wanted image into its record; an image that cannot be read keeps its record."""

    def look(piece: list[int]) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for place in piece:
            try:
                found.append(read(store, int(rows[place])))
            except ImageError:
                found.append(None)
        return found

    places = np.flatnonzero(wanted)
    pieces = [places[start : start + PIECE].tolist() for start in range(0, len(places), PIECE)]
    with tqdm(total=len(places), desc="compare images", unit=" images", leave=False, disable=None, delay=1) as bar:
        for piece, results in zip(pieces, map_in_threads(look, pieces), strict=True):
            for place, result in zip(piece, results, strict=True):
                if result is not None:
                    records["tail"][place], records["first"][place], records["second"][place] = result
            bar.update(len(piece))
