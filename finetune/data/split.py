"""What a source is: stored images, labels, and three splits of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.data.images.decode import Header
from finetune.system.errors import UserError

SPLITS = ("train", "val", "test")


class Store(Protocol):
    """All the images of a source, before they are split. Small to pickle: it travels to every worker."""

    @property
    def encoded(self) -> bool:
        """Whether `read` gives an image file, which `decode` turns into what `load` gives."""

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""

    def header(self, row: int) -> Header:
        """Size and mode, with as little reading as can be; raises ImageError."""

    def read(self, row: int) -> bytes:
        """What is stored, undecoded: two images with the same bytes are the same image; raises ImageError."""

    def stamp(self, row: int) -> str:
        """What changes when the image does (path, size, time), read in microseconds; empty: there is no such thing.

        Raises ImageError where the image is not there at all.
        """

    def name_of(self, row: int) -> str:
        """How a message calls the image: its path, or the source and the number."""


class Split:
    """Some rows of a store with their labels: what is trained on, or validated, or tested.

    Attributes:
        store: All images of the source.
        rows: Which of them, int64 (n,).
        labels: Class index of each image, int64 (n,); with several labels an image float32 (n, classes), 0 or 1.
    """

    def __init__(self, store: Store, rows: Tensor, labels: Tensor) -> None:
        """Take `rows` of `store`, int64 (n,), labelled `labels`, one each."""
        assert rows.ndim == 1 and len(rows) == len(labels) and labels.ndim in (1, 2)
        self.store = store
        self.rows = rows
        self.labels = labels

    def __len__(self) -> int:
        """How many images."""
        return len(self.rows)

    def load(self, index: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB, whatever its size.

        Raises:
            ImageError: It cannot be read.
        """
        return self.store.load(int(self.rows[index]))

    def name_of(self, index: int) -> str:
        """How a message calls the image: its path, or `digits[17]`."""
        return self.store.name_of(int(self.rows[index]))

    def without(self, indices: Collection[int]) -> Split:
        """The same split with these images left out."""
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[torch.tensor(sorted(indices), dtype=torch.int64)] = False
        return Split(self.store, self.rows[keep], self.labels[keep])


@dataclass(frozen=True)
class Source:
    """Labelled images in three splits.

    Attributes:
        name: The word behind `data.source`.
        classes: Names; the place in the list is the label.
        splits: `train`, `val` and `test`, none empty.
        description: One line with what was found, for the start of a run.
        is_multilabel: Whether an image may have several labels, or none: labels are then float32 (n, classes), 0 or 1.
        class_weights: Factor on each class's part of the loss, float32 (classes,), mean 1 over the training images.
        location: Where the images lie: what is known of them is remembered under it.
        warnings: What a person should know before training, a line each.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    description: str
    is_multilabel: bool = False
    class_weights: Tensor | None = None
    location: str = ""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Hold what every builder promises."""
        assert tuple(self.splits) == SPLITS and len(self.classes) > 1
        for split in self.splits.values():
            assert len(split)
            if self.is_multilabel:
                assert split.labels.shape == (len(split), len(self.classes)) and split.labels.dtype == torch.float32
            else:
                assert split.labels.dtype == torch.int64
                assert split.labels.min() >= 0 and split.labels.max() < len(self.classes)

    def without(self, left_out: Mapping[str, Collection[int]]) -> Source:
        """The same source, some images of its splits left out.

        Args:
            left_out: Of each split the indices.

        Raises:
            ValueError: A split would be empty, or a class would have no training image left.
        """
        splits = {name: split.without(left_out.get(name, ())) for name, split in self.splits.items()}
        for name, split in splits.items():
            if not len(split):
                raise UserError(f"no image of the {name} split can be read; see the list of unreadable files")
        gone = class_counts(splits["train"].labels, len(self.classes)) == 0
        gone &= class_counts(self.splits["train"].labels, len(self.classes)) > 0
        if gone.any():
            names = ", ".join(name for name, lost in zip(self.classes, gone.tolist(), strict=True) if lost)
            raise UserError(f"no training image of class {names} can be read; see the list of unreadable files")
        return replace(self, splits=splits)


@dataclass(frozen=True)
class Found:
    """What a builder finds, before it is selected from and split.

    Attributes:
        kind: The word behind `data.source`.
        store: The images.
        names: One for each image, the same wherever the data lies: images are split by them.
        classes: Names in their order.
        labels: int64 (n,), or float32 (n, classes) where an image may have several labels.
        given: Index into SPLITS of each image, uint8 (n,): as the data itself says; 0 where it says nothing.
        place: How a message calls the data: `data.root=PATH`.
        title: Start of the description: `folder PATH`.
        note: End of the description.
        location: See `Source`.
        warnings: See `Source`.
    """

    kind: str
    store: Store
    names: Collection[str]
    classes: tuple[str, ...]
    labels: Tensor
    given: Tensor
    place: str
    title: str
    note: str = ""
    location: str = ""
    warnings: tuple[str, ...] = field(default=())


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Images of each class, int64 (num_classes,); labels as in `Split`."""
    return labels.sum(0).to(torch.int64) if labels.ndim == 2 else labels.bincount(minlength=num_classes)


def no_split(count: int) -> Tensor:
    """`Found.given` where the data says nothing about splits."""
    return torch.from_numpy(np.zeros(count, dtype=np.uint8))
