"""Squares, one after the other: the resize that makes them, and the batch that they go into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
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

    torch resizes whole pixels, (height, width, 3) in one block of memory, in about 0.6 of the time that planes take it,
    and 0.7 of a part cut out of a larger image, the copy included. The pixels are the same; the result lies likewise.

    Args:
        image: uint8 (3, height, width), in any layout.
        shape: As above.
        interpolation: A word that torchvision knows.
    """
    height, width = image.shape[-2:]
    rows = image.permute(1, 2, 0).contiguous()
    if interpolation == "bicubic" and len(shape) == 2 and shape != [height, width]:
        # All that torchvision does here in the end; what it does with bilinear depends on the processor.
        return interpolate(rows[None].permute(0, 3, 1, 2), shape, mode="bicubic", antialias=True)[0]
    mode = InterpolationMode(interpolation)
    resized: Tensor = v2.resize(rows.permute(2, 0, 1), shape, interpolation=mode, antialias=True)
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
