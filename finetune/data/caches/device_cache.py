"""Decoded squares kept on the device: a batch is an index into them, and nothing travels.

Only where the square is all that the host makes of an image: evaluation and `augment=none`. Random views are drawn and
warped on the host, and another processor's arithmetic would give other last bits.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from finetune.config import CacheKind, DataConf
from finetune.data.caches.pixel_cache import FirstStep, open_cache
from finetune.data.images.decode import ImageError
from finetune.data.split import Split
from finetune.system.errors import UserError

CHUNK = 1024  # images that travel to the device at once


class DeviceSquares:
    """The squares of a split, uint8 (images, 3, size, size), on a device."""

    def __init__(self, split: Split, step: FirstStep, conf: DataConf, device: torch.device) -> None:
        """Decode every image once, in the host's memory, and move them over.

        Raises:
            ImageError: An image cannot be read and `data.on_error=stop`.
            ValueError: The memory of the host or of the device is too small.
        """
        assert step.square is not None, "refused by the configuration"
        self._split = split
        size = step.square.size
        needed = len(split) * 3 * size**2
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if needed > free:
                raise UserError(
                    f"data.cache=device: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free on {device}: use"
                    " data.cache=ram"
                )
        cache = open_cache(split, step, dataclasses.replace(conf, cache=CacheKind.ram))
        kept = [cache.load(sample) for sample in range(len(split))]
        self._present = torch.tensor([image is not None for image in kept])
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        self._squares = torch.empty(len(split), 3, size, size, dtype=torch.uint8, device=device)
        for start in range(0, len(kept), CHUNK):
            part = [blank if image is None else image for image in kept[start : start + CHUNK]]
            self._squares[start : start + len(part)] = torch.stack(part).to(device)

    def take(self, samples: Tensor) -> tuple[Tensor, Tensor, list[ImageError]]:
        """The images of a batch.

        Args:
            samples: int64 (n,).

        Returns:
            uint8 (m, 3, size, size) on the device; which of `samples` they are, int64 (m,); and what could not be read
            when the squares were made: it is left out for the whole run, also if it was repaired meanwhile.
        """
        there = self._present[samples]
        if not there.all():
            names = [self._split.name_of(sample) for sample in samples[~there].tolist()]
            errors = [ImageError(name, "it could not be read when the images were put on the device") for name in names]
            samples = samples[there]
        else:
            errors = []
        return self._squares[sent(samples, self._squares.device)], samples, errors


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on the host as they are on `device`; to a GPU out of pinned memory: any other copy waits for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
    return values.to(device)
