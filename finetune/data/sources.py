"""Where images come from: each source is a builder that gives classes and three splits.

The splits are cut class by class by ranking the hash of (split_seed, name of the image): the same on every machine,
whatever `seed` is, and an image that is added later moves hardly any other.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf, SourceKind, choose
from finetune.data.folders import FileStore, list_root
from finetune.data.streams import mix

SPLITS = ("train", "val", "test")


class Store(Protocol):
    """All the images of a source, before they are split. Small to pickle: it travels to every worker."""

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""

    def name_of(self, row: int) -> str:
        """How a message calls the image: its path, or the source and the number."""


class Split:
    """Some rows of a store with their labels: what is trained on, or validated, or tested.

    Attributes:
        labels: Class index of each image, int64 (n,).
    """

    def __init__(self, store: Store, rows: Tensor, labels: Tensor) -> None:
        """Take `rows` of `store`, int64 (n,), labelled `labels`, int64 (n,)."""
        assert rows.shape == labels.shape and rows.ndim == 1
        self._store = store
        self._rows = rows
        self.labels = labels

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB, whatever its size.

        Raises:
            ImageError: It cannot be read.
        """
        return self._store.load(int(self._rows[index]))

    def name_of(self, index: int) -> str:
        """How a message calls the image: its path, or `digits[17]`."""
        return self._store.name_of(int(self._rows[index]))


@dataclass(frozen=True)
class Source:
    """Labelled images in three splits.

    Attributes:
        name: `digits` or `folder`.
        classes: Names; the place in the list is the label.
        splits: `train`, `val` and `test`, none empty.
        description: One line with what was found, for the start of a run.
        is_multilabel: Whether an image may have several labels, or none: labels are then float32 (n, classes), 0 or 1.
        class_weights: Factor on each class's part of the loss, float32 (classes,), mean 1 over the training images.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    description: str
    is_multilabel: bool = False
    class_weights: Tensor | None = None

    def __post_init__(self) -> None:
        """Hold what every builder promises."""
        assert tuple(self.splits) == SPLITS and len(self.classes) > 1
        for split in self.splits.values():
            assert len(split) and set(split.labels.tolist()) <= set(range(len(self.classes)))


def open_source(conf: DataConf) -> Source:
    """Find the images, label and split them. No image file is opened yet.

    Raises:
        ValueError: A source that does not exist, or data that cannot be split.
        FileNotFoundError: `data.root` is missing.
    """
    return _BUILDERS[choose(SourceKind, conf.source, "data.source")](conf)


def cut(names: Sequence[str], labels: Tensor, *, shares: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Split by class: for each class every split of `shares` gets its share, at least one image, and `train` the rest.

    Args:
        names: One for each image, all different, the same wherever the data lies.
        labels: int64 (n,).
        shares: Of each class, for the splits that are cut off, such as `{"val": 0.1, "test": 0.3}`.
        seed: `data.split_seed`.

    Returns:
        For `train` and each name in `shares` the ascending rows, int64.
    """
    ranks = np.array([mix("split", seed, unicodedata.normalize("NFC", name)) for name in names], dtype=np.uint64)
    taken: dict[str, list[Tensor]] = {split: [] for split in ("train", *shares)}
    for label in range(int(labels.max()) + 1):
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.from_numpy(np.argsort(ranks[rows.numpy()], kind="stable"))]
        assert len(rows) > len(shares), "the caller has counted"
        start = 0
        for place, (split, share) in enumerate(shares.items()):
            others = len(shares) - place  # the splits still to come, train among them, need an image each
            count = min(max(1, int(len(rows) * share + 0.5)), len(rows) - start - others)
            taken[split].append(rows[start : start + count])
            start += count
        taken["train"].append(rows[start:])
    return {split: torch.cat(parts).sort().values for split, parts in taken.items()}


class DigitStore:
    """Scikit-learn's handwritten digits in memory: white ink on black."""

    def __init__(self, images: Tensor) -> None:
        """Hold `images`, uint8 (n, 8, 8)."""
        self._images = images

    def load(self, row: int) -> Tensor:
        """The digit, uint8 (3, 8, 8), the same in all three channels."""
        return self._images[row].expand(3, -1, -1)

    def name_of(self, row: int) -> str:
        """Its number in scikit-learn's order."""
        return f"digits[{row}]"


def open_digits(conf: DataConf) -> Source:
    """The 1,797 digits of `sklearn.datasets.load_digits` (the test part of UCI Optical Recognition of Digits)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))  # 0 to 16, the ink in each pixel
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    store = DigitStore(levels)
    names = [store.name_of(row) for row in range(len(labels))]
    rows = cut(names, labels, shares={"val": conf.val_fraction, "test": conf.test_fraction}, seed=conf.split_seed)
    splits = {split: Split(store, rows[split], labels[rows[split]]) for split in SPLITS}
    text = f"digits: {len(labels):,} handwritten digits of 8x8 pixels from scikit-learn, 10 classes; {_counts(splits)}"
    return Source("digits", tuple(str(digit) for digit in range(10)), splits, text)


def open_folder(conf: DataConf) -> Source:
    """One folder of images a class under `data.root`; or such folders under `train/`, `val/` and `test/`.

    Where there is a `train/` without one of the others, that one is cut from `train/` by its share.

    Raises:
        ValueError: The layout is not one of these, or a class is too small to split.
        FileNotFoundError: `data.root` is missing.
    """
    listing = list_root(conf.root or "")
    labels = torch.tensor(listing.labels, dtype=torch.int64)
    given = np.array(listing.splits)
    shares = {"val": conf.val_fraction, "test": conf.test_fraction}
    missing = {split: share for split, share in shares.items() if split not in listing.splits}
    rows = {split: torch.from_numpy(np.flatnonzero(given == split)) for split in SPLITS}
    train = rows["train"]
    counts = labels[train].bincount(minlength=len(listing.classes)).tolist()
    small = [f"{name} ({n})" for name, n in zip(listing.classes, counts, strict=True) if n <= len(missing)]
    if small:
        raise ValueError(
            f"data.root={listing.root}: too few images to give one to each of {', '.join(['train', *missing])}"
            f" in class {', '.join(small)}; add images or move the class away"
        )
    parts = cut([listing.names[row] for row in train.tolist()], labels[train], shares=missing, seed=conf.split_seed)
    rows |= {split: train[part] for split, part in parts.items()}
    store = FileStore(listing.root, listing.names)
    splits = {split: Split(store, rows[split], labels[rows[split]]) for split in SPLITS}
    text = f"folder {listing.root}: {len(labels):,} images in {len(listing.classes)} classes; {_counts(splits)}"
    if missing:
        text += f" ({' and '.join(missing)} cut by data.split_seed={conf.split_seed})"
    return Source("folder", listing.classes, splits, text + listing.left_out)


def _counts(splits: Mapping[str, Split]) -> str:
    return ", ".join(f"{len(split):,} {name}" for name, split in splits.items())


_BUILDERS: dict[SourceKind, Callable[[DataConf], Source]] = {
    SourceKind.digits: open_digits,
    SourceKind.folder: open_folder,
}
