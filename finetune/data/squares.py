"""Squares, one after the other: the resize that makes them, and the batch that they go into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2


class Images(Protocol):
    """Images that are read while one goes through them: uint8 (3, height, width) each."""

    def __len__(self) -> int:
        """How many there are at most: some may turn out to be unreadable."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Each in turn."""
        ...


def resize(image: Tensor, shape: list[int], interpolation: str) -> Tensor:
    """To [height, width], or [shorter side] with the other in proportion; antialiased.

    torch resizes whole pixels, (height, width, 3) in one block of memory, in 0.6 of the time that planes take it or a
    part cut out of a larger image, the copy made here included. The pixels are the same. The result lies likewise.

    Args:
        image: uint8 (3, height, width), in any layout.
        shape: As above.
        interpolation: A word that torchvision knows.
    """
    together = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized: Tensor = v2.resize(together, shape, interpolation=InterpolationMode(interpolation), antialias=True)
    return resized


def gather(squares: Iterable[Tensor], most: int) -> Tensor:
    """One batch of at most `most` squares. uint8 (3, size, size) each, one or more -> uint8 (batch, 3, size, size).

    Each is copied while the processor's cache still holds it, and its memory serves the next one: a list of them, to
    be stacked, would be memory that glibc asks the system for, page by page, in every batch.
    """
    batch, number = torch.empty(0), 0
    for number, square in enumerate(squares, 1):
        if number == 1:
            batch = square.new_empty(most, *square.shape)
        batch[number - 1].copy_(square)
    assert number, "no square at all"
    return batch[:number]
