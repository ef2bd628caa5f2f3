"""Selects images and divides them into train, val and test: classes, splits, folds, shots, class weights.

`cutting.py` makes the cuts.

All functions are pure. Every choice ranks the images by a hash of seed and image name, so the order of the files does
not matter, an added image moves few others, and `data.shots=1` selects one of the images of `data.shots=2`.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from finetune.config import Balance, DataConf, nearest
from finetune.config.fields import changed
from finetune.data.cutting import Rows, cut, in_fold, ranked_strata
from finetune.data.labels import told_apart
from finetune.data.split import SPLITS, FoundImages, Source, Split, class_counts
from finetune.data.streams import Ranks, ranks
from finetune.system.errors import UserError
from finetune.system.terminal import counted


def split_up(found: FoundImages, conf: DataConf, groups: Rows | None = None) -> Source:
    """Select classes, cut the splits that the data lacks, then draw `data.shots` or `data.fraction` of `train`.

    No cut separates images of one group; `groups` has the number of each image's group, int64 (n,), or is None.
    Raises UserError for an unknown class, too few images, or a setting that does not fit several labels an image.
    """
    found, rows = _select_classes(found, conf.classes)
    several = found.labels.ndim == 2
    if several and conf.balance != Balance.none:
        raise UserError(f"data.balance={conf.balance} works with one label an image; {found.place} has several")
    strata = _strata(found.labels)
    parts, how = _cut_all(found, rows, strata, conf, groups)
    without = [name for name in shares_to_cut(found, conf) if not len(parts[name])]
    parts["train"], drawn = _draw(found, parts["train"], strata, conf)
    chosen = {name: torch.from_numpy(np.sort(parts[name])) for name in SPLITS}
    splits = {name: Split(found.store, part, found.labels[part]) for name, part in chosen.items()}
    stuck = [f"there is no {name}: too few groups of images, which stay together, to cut it off" for name in without]
    warnings = (*found.warnings, *stuck, *_check_classes(found, splits))
    weights = class_weights(splits["train"].labels, len(found.classes)) if conf.balance == Balance.weights else None
    return Source(
        found.classes,
        splits,
        len(rows),
        title=found.title,
        how=f"{how}{drawn}{found.note}",
        is_multilabel=several,
        class_weights=weights,
        location=found.location,
        warnings=warnings,
    )


def _select_classes(found: FoundImages, names: Sequence[str]) -> tuple[FoundImages, Rows]:
    """`found` with the classes `names` only, and the rows of their images; the other rows' labels have no meaning."""
    if not names:
        return found, np.arange(len(found.labels))
    names = [_typed(name, found.classes) for name in names]
    for name in names:
        if name not in found.classes:
            close, known = nearest(name, found.classes), _listed(told_apart(found.classes, [name]))
            raise UserError(f"data.classes: there is no class {name!r}{close}; {found.place} has {known}")
    selected = [label for label, name in enumerate(found.classes) if name in names]
    classes = tuple(found.classes[label] for label in selected)
    if found.labels.ndim == 2:
        labels = found.labels[:, selected]
        rows = torch.nonzero(labels.any(1)).flatten()
    else:
        new_label = torch.full((len(found.classes),), -1, dtype=torch.int64)
        new_label[selected] = torch.arange(len(selected))
        labels = new_label[found.labels]
        rows = torch.nonzero(labels >= 0).flatten()
    return replace(found, classes=classes, labels=labels), rows.numpy()


def _typed(name: str, classes: Sequence[str]) -> str:
    """The class that a person means by `name`: a keyboard gives NFC, and the names of files may be in NFD."""
    plain = unicodedata.normalize("NFC", name)
    same = [known for known in classes if unicodedata.normalize("NFC", known) == plain]
    return same[0] if name not in classes and len(same) == 1 else name


def _strata(labels: Tensor) -> Rows:
    """The stratum of each image, int64 (n,): its class, or the rarest of its labels. Splits preserve their shares."""
    if labels.ndim == 1:
        return labels.numpy()
    rarity = 1 / labels.sum(0).clamp(min=1)
    score, rarest = (labels * rarity).max(dim=1)
    rarest[score == 0] = labels.shape[1]  # images without a label form one more stratum
    return rarest.numpy()


def _cut_all(
    found: FoundImages, rows: Rows, strata: Rows, conf: DataConf, groups: Rows | None
) -> tuple[dict[str, Rows], str]:
    """The rows of each split, and text for the description, such as ` (val cut by ...)`."""
    given = found.given.numpy()[rows]
    parts = {name: rows[given == number] for number, name in enumerate(SPLITS)}
    missing = shares_to_cut(found, conf)
    for name in dict.fromkeys(["train", *found.given_splits]):
        if not len(parts[name]):
            raise UserError(f"{found.place}: no image of {_listed(found.classes)} in the {name} split of the data")
    if not missing and not conf.folds and changed(conf, "split_seed"):
        raise UserError(f"data.split_seed={conf.split_seed} would be ignored: {found.place} is not cut; leave it out")
    _refuse_unseen(found, {name: found.labels[part] for name, part in parts.items()}, is_joined=conf.folds > 0)
    needed = ["train", *missing]
    _check_sizes(found, class_counts(found.labels[parts["train"]], len(found.classes)), needed, conf)
    train = parts["train"]
    if missing:
        order = _ranked(found.names, train, "split", conf.split_seed)
        cut_off = cut(order, strata[train], shares=missing, groups=None if groups is None else groups[train])
        parts |= {name: train[part] for name, part in cut_off.items()}
        for name in missing:
            if not len(parts[name]) and groups is None and not (conf.folds and name == "val"):
                mend = f"add images, or do without by {_without(name, conf)}"
                raise UserError(f"{found.place}: no images left for {name}; there are too few: {mend}")
    if conf.folds:  # after the test images were cut, so that they are the same with folds and without
        both = np.sort(np.concatenate([parts["train"], parts["val"]]))
        _check_sizes(found, class_counts(found.labels[both], len(found.classes)), ["train", "val"], conf)
        order = _ranked(found.names, both, "fold", conf.split_seed)
        of_both = None if groups is None else groups[both]
        inside = in_fold(order, strata[both], folds=conf.folds, fold=conf.fold, groups=of_both)
        parts["train"], parts["val"] = both[~inside], both[inside]
        if not (len(parts["train"]) and len(parts["val"])):
            known = (
                "" if groups is None else f" in {counted(len(np.unique(groups[both])), 'group')}, which stay together"
            )
            where = "no image is in this fold" if len(parts["train"]) else "all images are in this fold"
            mend = "take fewer folds, or data.folds=0"
            raise UserError(f"{found.place}: data.fold={conf.fold}: {where}, of {len(both):,}{known}; {mend}")
    by_seed = [name for name in missing if len(parts[name]) and not (conf.folds and name == "val")]
    how = f" ({' and '.join(by_seed)} cut by data.split_seed={conf.split_seed})" if by_seed else ""
    how += f" (val is fold {conf.fold} of {conf.folds})" if conf.folds else ""
    return parts, how + (_groups_in_words(groups[rows]) if how and groups is not None else "")


def _groups_in_words(groups: Rows) -> str:
    """How many images belong to groups of several, for the description."""
    sizes = np.unique(groups, return_counts=True)[1]
    together = sizes[sizes > 1]
    return (
        f" ({counted(together.sum(), 'image')} of {counted(len(together), 'group')} that stay together)"
        if len(together)
        else ""
    )


def shares_to_cut(found: FoundImages, conf: DataConf) -> dict[str, float]:
    """The splits to cut from train, each with its share of a class. Splits that the data gives stay whole.

    If the data gives val, nothing is cut: there is no test if the data has none. If it gives test, val is cut; if it
    gives neither, both are. A share of 0 cuts nothing. Raises UserError if a share that was asked for would be ignored.
    """
    shares = {"val": conf.val_fraction, "test": conf.test_fraction}
    given = found.given_splits
    typed = changed(conf, "val_fraction", "test_fraction")
    for name in [name for name in shares if name in given or "val" in given]:
        if shares.pop(name) and f"{name}_fraction" in typed:
            why = f"the data gives {name}" if name in given else "the data gives val, so train stays whole"
            key = f"data.{name}_fraction={typed[f'{name}_fraction']}"
            raise UserError(f"{key} would be ignored: {why} ({found.place}); leave it out")
    return {name: share for name, share in shares.items() if share > 0}


def _without(name: str, conf: DataConf) -> str:
    """The words with which no images are taken from train for the split `name`."""
    # Beside folds data.val_fraction would be ignored, and is refused.
    return f"data.{name}_fraction=0" + (" without data.folds" if conf.folds and name == "val" else "")


def _check_sizes(found: FoundImages, counts: Tensor, needed: Sequence[str], conf: DataConf) -> None:
    """Raises UserError if a class has fewer images than there are splits to cut. Not for several labels an image."""
    if found.labels.ndim == 2 or len(needed) == 1:
        return
    pairs = zip(found.classes, counts.tolist(), strict=True)
    small = [f"{name} ({n})" for name, n in pairs if n < len(needed)]
    if small:
        few = f"too few images to give one to each of {', '.join(needed)} in class {_listed(small)}"
        mend = "add images, move the class away (data.classes names those to use)"
        fewer = " and ".join(_without(name, conf) for name in needed[:0:-1])
        raise UserError(f"{found.place}: {few}; {mend}, or cut less: {fewer}")


def _ranked(names: Collection[str], rows: Rows, stream: str, seed: int) -> Ranks:
    if len(rows) == len(names):
        return ranks(stream, seed, names)
    chosen = np.zeros(len(names), dtype=bool)
    chosen[rows] = True
    return ranks(stream, seed, (name for name, wanted in zip(names, chosen.tolist(), strict=True) if wanted))


def _draw(found: FoundImages, train: Rows, strata: Rows, conf: DataConf) -> tuple[Rows, str]:
    """The training rows that `data.shots` or `data.fraction` draws, and text for the description."""
    if not conf.shots and conf.fraction == 1:
        return train, ""
    order = _ranked(found.names, train, "shots", conf.shots_seed)
    if conf.shots and found.labels.ndim == 2:
        by_rank = np.argsort(order, kind="stable")
        columns = found.labels[train].numpy()[by_rank] > 0
        firsts = [by_rank[np.flatnonzero(column)[: conf.shots]] for column in columns.T]
        drawn = np.unique(np.concatenate(firsts))
    elif conf.shots:
        drawn = np.concatenate([rows[: conf.shots] for rows in ranked_strata(order, strata[train])])
    else:
        groups = ranked_strata(order, strata[train])
        drawn = np.concatenate([rows[: max(1, int(len(rows) * conf.fraction + 0.5))] for rows in groups])
    setting = f"data.shots={conf.shots}" if conf.shots else f"data.fraction={conf.fraction:g}"
    return train[drawn], f" (train drawn by {setting}, data.shots_seed={conf.shots_seed})"


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Loss weights n / (num_classes * images of the class), mean 1 over the n images. float32 (num_classes,)."""
    counts = class_counts(labels, num_classes).to(torch.float64)
    return (len(labels) / (num_classes * counts)).to(torch.float32)


def _check_classes(found: FoundImages, splits: Mapping[str, Split]) -> list[str]:
    """A warning for each split that lacks classes; raises UserError where training or a score would have no images."""
    if len(found.classes) < 2:
        raise UserError(f"{found.place}: only one class, {_listed(found.classes)}, so there is nothing to tell apart")
    lacking = {}
    for name, split in splits.items():
        counts = class_counts(split.labels, len(found.classes)).tolist()
        lacking[name] = [word for word, count in zip(found.classes, counts, strict=True) if not count]
    _refuse_unseen(found, {name: split.labels for name, split in splits.items()})
    unseen = lacking["train"] if found.labels.ndim == 1 else []
    if unseen:
        words = _listed(unseen)
        raise UserError(f"{found.place}: no training image of class {words}; add some, or leave it out by data.classes")
    some = {name: words for name, words in lacking.items() if words and len(splits[name])}
    sizes = {name: f"{len(words)} of {counted(len(found.classes), 'class', 'classes')}" for name, words in some.items()}
    return [f"{name} has no image of {size}: {_listed(lacking[name])}" for name, size in sizes.items()]


def _refuse_unseen(found: FoundImages, labels: Mapping[str, Tensor], *, is_joined: bool = False) -> None:
    """Raises UserError if val or test has a class that train has not; `is_joined`: val counts as train.

    `labels` has the labels of each split.
    """
    if found.labels.ndim == 2:
        return
    has = {name: class_counts(part, len(found.classes)) > 0 for name, part in labels.items()}
    of_train = has["train"] | has["val"] if is_joined else has["train"]
    known = [word for word, is_known in zip(found.classes, of_train.tolist(), strict=True) if is_known]
    for name in ("val", "test"):
        lost = [found.classes[label] for label in torch.nonzero(has[name] & ~of_train).flatten().tolist()]
        if lost:
            both = f"{name} has class {_listed(told_apart(lost, known))}, which train has not"
            both += f" (train has {_listed(told_apart(known, lost))})"
            raise UserError(f"{found.place}: {both}: the splits differ")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")
