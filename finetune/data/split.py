"""The types of a data source: its stored images, the labels, and the three splits train, val and test."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from finetune.data.images.decode import MAX_PIXELS, Header, ImageError, decode, header_of
from finetune.system.errors import UserError
from finetune.system.terminal import counted, printable

SPLITS = ("train", "val", "test")


class ImageStore(ABC):
    """All images of a source, by row number. A store pickles small, since every worker process gets a copy.

    A store of image files defines `read`, `stamp` and `name_of`. A store of decoded images sets `encoded` to False and
    defines `load` and `header`, too.
    """

    max_pixels = MAX_PIXELS  # of an image; `open_source` sets it by data.max_image_mib
    encoded = True  # whether `read` returns an image file, of which `decode` makes the pixels that `load` returns

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        return decode(self.read(row), self.name_of(row), self.max_pixels)

    def header(self, row: int) -> Header:
        """Size and mode, for which as little as possible is read; raises ImageError."""
        return header_of(self.read(row), self.name_of(row), self.max_pixels)

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The stored bytes: two images with the same bytes are the same image; raises ImageError."""

    def size(self, row: int) -> int | None:
        """The number of bytes that `read` gives, None where only reading shows it; raises ImageError."""
        return None

    def tail(self, row: int, count: int) -> bytes:
        """The last `count` bytes of `read`; raises ImageError."""
        return self.read(row)[-count:]

    @abstractmethod
    def stamp(self, row: int) -> str:
        """A text that changes when the image does: path, size and times; empty if there is none; raises ImageError."""

    def key_of(self, row: int) -> str:
        """The image's name without the place where the data lies."""
        return self.name_of(row)

    def num_bytes(self, row: int) -> int:
        """The size of the stored image where it is quickly known, else 0."""
        return 0

    @abstractmethod
    def name_of(self, row: int) -> str:
        """The image's name in messages: its path, or the source and the row, such as `digits[17]`."""


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a store with their labels: the training, validation or test images."""

    store: ImageStore  # all images of the source
    rows: Tensor  # of the store, int64 (n,)
    labels: Tensor  # class index of each image, int64 (n,); with several labels an image float32 (n, classes), 0 or 1

    def __post_init__(self) -> None:
        """Check the promises above."""
        assert self.rows.ndim == 1 and len(self.rows) == len(self.labels) and self.labels.ndim in (1, 2)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def load(self, index: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB, of any size; raises ImageError."""
        return self.store.load(int(self.rows[index]))

    def name_of(self, index: int) -> str:
        """The image's name in messages, see `ImageStore`."""
        return self.store.name_of(int(self.rows[index]))

    def content_digest(self) -> bytes:
        """16 bytes that change with the images and their order: a hash of each image's stamp, or else of its bytes."""
        state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
        for row in self.rows.tolist():
            try:
                stamp = self.store.stamp(row)
                mark = stamp.encode("utf-8", "surrogateescape") if stamp else self.store.read(row)
            except ImageError:
                mark = b"unreadable"
            state.update(len(mark).to_bytes(8, "little"))
            state.update(mark)
        return state.digest()


@dataclass(frozen=True)
class UnreadableImage:
    """An image that cannot be read: its split, its index there, its name in messages, and the reason in a few words."""

    split: str
    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Labelled images in three splits."""

    classes: tuple[str, ...]  # the index of a name is its label
    splits: Mapping[str, Split]  # `train`, `val` and `test`; `val` and `test` may be empty
    num_images: int  # of these classes in the data, before `data.shots` or `data.fraction` drew some of `train`
    title: str = ""  # the data in a few words
    how: str = ""  # how the splits were made, and what was left out
    is_multilabel: bool = False  # whether an image may have several labels, or none, see `Split`
    # Factor on each class's part of the loss, float32 (classes,), mean 1 over the training images.
    class_weights: Tensor | None = None
    location: str = ""  # where the images lie; results of checks are remembered under it
    warnings: tuple[str, ...] = ()  # lines that a person should read before training

    def __post_init__(self) -> None:
        """Check the promises above."""
        assert tuple(self.splits) == SPLITS and len(self.classes) > 1
        assert len(self.splits["train"])
        for split in self.splits.values():
            assert split.labels.dtype == (torch.float32 if self.is_multilabel else torch.int64)
            assert split.labels.shape[1:] == ((len(self.classes),) if self.is_multilabel else ())

    def has(self, name: str) -> bool:
        """Whether there are images of this split."""
        return len(self.splits[name]) > 0

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of `description`: `images`, `classes`, and the images of each split."""
        sizes = {name: len(split) for name, split in self.splits.items()}
        return {"images": self.num_images, "classes": len(self.classes), **sizes}

    @property
    def description(self) -> str:
        """One line for the start of a run: counts, and how the splits were made."""
        labels = " (several labels an image)" if self.is_multilabel else ""
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        size = f"{counted(self.num_images, 'image')} in {counted(len(self.classes), 'class', 'classes')}{labels}"
        return printable(f"{self.title}: {size}; {sizes}{self.how}")

    def without(self, images: Collection[UnreadableImage]) -> Source:
        """The source without these images; raises UserError if a split or a training class would become empty."""
        splits = {}
        for name, split in self.splits.items():
            keep = torch.ones(len(split), dtype=torch.bool)
            keep[torch.tensor([image.index for image in images if image.split == name], dtype=torch.int64)] = False
            splits[name] = Split(split.store, split.rows[keep], split.labels[keep])
            if len(split) and not len(splits[name]):
                raise UserError(f"no image of the {name} split can be read; see the list of unreadable files")
        before, after = (class_counts(part["train"].labels, len(self.classes)) for part in (self.splits, splits))
        lost = [self.classes[label] for label in torch.nonzero((before > 0) & (after == 0)).flatten().tolist()]
        if lost:
            names = ", ".join(lost)
            raise UserError(f"no training image of class {names} can be read; see the list of unreadable files")
        return replace(self, splits=splits, num_images=self.num_images - len(images))


@dataclass(frozen=True)
class Groups:
    """The groups of `data.group`, such as the pictures of one patient, which no cut may separate."""

    numbers: np.ndarray[tuple[int, ...], np.dtype[np.int64]]  # place in `names` of each image's group; -1: alone
    names: Sequence[str]

    @classmethod
    def of(cls, cells: Iterable[object]) -> Groups:
        """The groups that a cell for each image names; an image with an empty cell, None or NaN, is alone."""
        known: dict[str, int] = {}
        numbers = array("q")
        for cell in cells:
            if isinstance(cell, float) and cell.is_integer():
                cell = int(cell)  # Parquet gives a column of whole numbers with gaps as 3.0
            is_empty = cell is None or cell != cell
            name = "" if is_empty else unicodedata.normalize("NFC", str(cell).strip())
            numbers.append(known.setdefault(name, len(known)) if name else -1)
        return cls(np.frombuffer(numbers, dtype=np.int64) if numbers else np.empty(0, dtype=np.int64), list(known))


@dataclass(frozen=True)
class FoundImages:
    """The images that a builder of `data/sources` finds, before images are selected and split."""

    store: ImageStore
    # The name by which an image is split. Builders leave the folder of the data out of it, so that splits do not depend
    # on it. Absolute paths in a table that lead elsewhere stay in it.
    names: Collection[str]
    classes: tuple[str, ...]
    labels: Tensor  # see `Split`
    given: Tensor  # index into SPLITS of each image, uint8 (n,), as the data gives it; 0 if the data gives no splits
    place: str  # the data's name in messages: `data.root=PATH`
    title: str  # start of the description: `folder PATH`
    note: str = ""  # end of the description
    location: str = ""  # see `Source`
    warnings: tuple[str, ...] = ()
    groups: Groups | None = None  # of `data.group`

    @property
    def given_splits(self) -> tuple[str, ...]:
        """The splits that the data gives, `train` among them."""
        counts = np.bincount(self.given.numpy(), minlength=len(SPLITS))
        return tuple(name for name, count in zip(SPLITS, counts.tolist(), strict=True) if count)


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Images of each class, int64 (num_classes,); labels as in `Split`."""
    return labels.sum(0).to(torch.int64) if labels.ndim == 2 else labels.bincount(minlength=num_classes)
