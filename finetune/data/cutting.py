"""Cuts train, val and test, and deals folds: each class keeps its share, and images of one group stay together.

All functions are pure. An image's rank is a hash of seed and name, so the order of the files does not matter. A group
has the lowest rank of its images. Images that are alone are cut as if there were no groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.streams import Ranks

Rows = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Pairs = tuple[Rows, Rows]  # images that belong together, as two lists of equal length
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def cut(order: Ranks, strata: Rows, *, shares: Mapping[str, float], groups: Rows | None = None) -> dict[str, Rows]:
    """Cut each stratum: every split of `shares` gets its share, but at least one image, and `train` gets the rest.

    A stratum with too few images, or groups of images, to give one to each split goes to `train` as a whole. `order`
    holds the images' ranks (n,), `groups` the number of each one's group (n,), `shares` is such as
    `{"val": 0.1, "test": 0.3}`. Groups of several images bring a split as near to its share as whole groups allow, in
    every stratum that they touch. Returns split name -> ascending indices into `order`.
    """
    taken: dict[str, list[Rows]] = {split: [] for split in ("train", *shares)}
    grouped = _touched(strata, groups)
    if groups is not None and grouped.any():
        rows = np.flatnonzero(grouped)
        splits = _cut_units(_Units.of(order[rows], strata[rows], groups[rows]), shares)
        for number, split in enumerate(taken):
            taken[split].append(rows.compress(splits == number))
    alone = np.flatnonzero(~grouped)
    for places in ranked_strata(order[alone], strata[alone]):
        rows, start = alone[places], 0
        for place, (split, share) in enumerate(shares.items()):
            if len(rows) > len(shares):
                count = _target(len(rows), share, start, others=len(shares) - place)
                taken[split].append(rows[start : start + count])
                start += count
        taken["train"].append(rows[start:])
    nothing = np.empty(0, dtype=np.int64)
    return {split: np.sort(np.concatenate([nothing, *parts])) for split, parts in taken.items()}


def in_fold(order: Ranks, strata: Rows, *, folds: int, fold: int, groups: Rows | None = None) -> Mask:
    """Whether each image belongs to fold number `fold`, bool (n,). The images of a stratum go to the folds in turn.

    `order`, `strata` and `groups` are as in `cut`. The groups of several images, largest first, go to the fold that has
    the smallest share of their strata so far.
    """
    inside = np.zeros(len(order), dtype=bool)
    grouped = _touched(strata, groups)
    if groups is not None and grouped.any():
        units = _Units.of(order[grouped], strata[grouped], groups[grouped])
        inside[grouped] = _deal_units(units, folds) == fold
    alone = np.flatnonzero(~grouped)
    dealt = 0
    for rows in ranked_strata(order[alone], strata[alone]):
        inside[alone[rows[(fold - dealt) % folds :: folds]]] = True
        dealt += len(rows)  # the next stratum begins at the next fold, or the first folds would become the largest
    return inside


def ranked_strata(order: Ranks, strata: Rows) -> Iterable[Rows]:
    """The indices of the images of each stratum, ordered by rank."""
    # numpy sorts numbers of 16 bits in linear time. One sort by (stratum, rank) would take four times as long.
    narrow = strata.astype(np.min_scalar_type(strata.max(initial=0)))
    by_stratum = np.argsort(narrow, kind="stable")
    ends = np.flatnonzero(np.diff(strata[by_stratum])) + 1
    return (rows[np.argsort(order[rows], kind="stable")] for rows in np.split(by_stratum, ends))


def joined(count: int, pairs: list[Pairs]) -> Rows | None:
    """The number of the group of each of `count` images, where `pairs` belong together; None without any pair."""
    firsts, seconds = (np.concatenate([np.empty(0, dtype=np.int64), *(pair[i] for pair in pairs)]) for i in (0, 1))
    if not len(firsts):
        return None
    from scipy.sparse import coo_array  # type: ignore[import-untyped, unused-ignore]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped, unused-ignore]

    graph = coo_array((np.ones(len(firsts), dtype=np.int8), (firsts, seconds)), shape=(count, count))
    numbers: Rows = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


def _touched(strata: Rows, groups: Rows | None) -> Mask:
    """Whether each image lies in a stratum that a group of several images touches, bool (n,)."""
    if groups is None:
        return np.zeros(len(strata), dtype=bool)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.isin(strata, strata[sizes[group] > 1])


def _target(size: int, share: float, start: int, *, others: int) -> int:
    """Images of a stratum of `size` for a split; `start` are gone, and each of `others` splits still needs one."""
    return max(0, min(max(1, int(size * share + 0.5)), size - start - others))


@dataclass(frozen=True)
class _Units:
    """The groups of some images, an image alone among them, ordered by rank."""

    group: Rows  # place in `parts` of each image's group
    parts: Sequence[Sequence[tuple[int, int]]]  # of each group (stratum, images there), strata counted from 0
    sizes: Sequence[int]  # images of each stratum

    @classmethod
    def of(cls, order: Ranks, strata: Rows, groups: Rows) -> "_Units":
        """Order the groups by their lowest rank."""
        known, stratum = np.unique(strata, return_inverse=True)
        found, group = np.unique(groups, return_inverse=True)
        lowest = np.full(len(found), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(lowest, group, order)
        place = np.empty(len(found), dtype=np.int64)
        place[np.argsort(lowest, kind="stable")] = np.arange(len(found))
        group = place[group]
        pairs, counts = np.unique(group * len(known) + stratum, return_counts=True)
        parts: list[list[tuple[int, int]]] = [[] for _ in found]
        for pair, images in zip(pairs.tolist(), counts.tolist(), strict=True):
            parts[pair // len(known)].append((pair % len(known), images))
        return cls(group, parts, np.bincount(stratum).tolist())


def _cut_units(units: _Units, shares: Mapping[str, float]) -> Rows:
    """The split of each image, 0 for train, else the place in `shares` from 1."""
    split_of = [0] * len(units.parts)
    left = [0] * len(units.sizes)  # groups of each stratum that are still in train
    for part in units.parts:
        for stratum, _ in part:
            left[stratum] += 1
    is_small = [count <= len(shares) for count in left]
    gone = [0] * len(units.sizes)
    for number, share in enumerate(shares.values(), start=1):
        others = len(shares) - number + 1
        sizes = enumerate(units.sizes)
        targets = [0 if is_small[s] else _target(size, share, gone[s], others=others) for s, size in sizes]
        for unit in _chosen(units.parts, split_of, targets, left, others):
            split_of[unit] = number
            for stratum, images in units.parts[unit]:
                gone[stratum] += images
    return np.array(split_of, dtype=np.int64)[units.group]


def _chosen(
    parts: Sequence[Sequence[tuple[int, int]]],
    split_of: Sequence[int],
    targets: Sequence[int],
    left: list[int],
    others: int,
) -> list[int]:
    """The groups of train that one split gets, for `targets` images of each stratum; lowers `left`.

    First groups that fit, by rank. Then groups that bring the split nearer to its targets, although one is exceeded.
    At last the group that exceeds least, for a stratum that would have no image. Each stratum keeps `others` groups.
    """
    missing = list(targets)
    chosen: dict[int, None] = {}

    def is_free(unit: int) -> bool:
        return not split_of[unit] and unit not in chosen and all(left[stratum] > others for stratum, _ in parts[unit])

    def cost(unit: int) -> float:
        """How much further from its targets the split would be, each stratum by its own target."""
        changes = ((abs(missing[s] - images) - abs(missing[s])) / max(1, targets[s]) for s, images in parts[unit])
        return sum(changes)

    def choose(unit: int) -> None:
        chosen[unit] = None
        for stratum, images in parts[unit]:
            missing[stratum] -= images
            left[stratum] -= 1

    for unit, part in enumerate(parts):
        if all(images <= missing[stratum] for stratum, images in part) and is_free(unit):
            choose(unit)
    for unit in range(len(parts)):
        if is_free(unit) and cost(unit) < -1e-9:
            choose(unit)
    of_stratum: dict[int, list[int]] = {}
    empty = {stratum for stratum, target in enumerate(targets) if target and missing[stratum] == target}
    for unit, part in enumerate(parts if empty else []):
        for stratum in empty.intersection(stratum for stratum, _ in part):
            of_stratum.setdefault(stratum, []).append(unit)
    for stratum, candidates in sorted(of_stratum.items()):
        free = [unit for unit in candidates if is_free(unit)]
        if free and missing[stratum] == targets[stratum]:
            choose(min(free, key=cost))
    return list(chosen)


def _deal_units(units: _Units, folds: int) -> Rows:
    """The fold of each image: groups, largest first, go where their strata have the fewest images."""
    loads = [[0] * len(units.sizes) for _ in range(folds)]
    totals = [0] * folds
    fold_of = [0] * len(units.parts)
    for unit in sorted(range(len(units.parts)), key=lambda unit: -sum(images for _, images in units.parts[unit])):
        part = units.parts[unit]

        def load(fold: int, part: Sequence[tuple[int, int]] = part) -> tuple[float, int]:
            shares = (images * loads[fold][stratum] / units.sizes[stratum] for stratum, images in part)
            return sum(shares), totals[fold]

        fold = min(range(folds), key=load)
        fold_of[unit] = fold
        for stratum, images in part:
            loads[fold][stratum] += images
            totals[fold] += images
    return np.array(fold_of, dtype=np.int64)[units.group]
