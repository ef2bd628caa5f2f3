"""Resized images on the device: a batch is an index into them, and no pixels travel.

Only for evaluation and `augment=none`, where resizing is all that the host does. Random views are drawn and warped on
the host, since another processor's arithmetic would give other last bits.
"""

import dataclasses

import torch
from torch import Tensor

from finetune.config import CacheKind, DataConf
from finetune.data.caches.pixel_cache import FirstStep, open_cache
from finetune.data.images.decode import ImageError
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.limits import in_bytes

CHUNK = 1024  # images that travel to the device at once


class DeviceCache:
    """All images of a split at the model's size, uint8 (images, 3, size, size), on a device."""

    def __init__(self, split: Split, step: FirstStep, conf: DataConf, device: torch.device) -> None:
        """Decode every image once, in the host's memory, and copy all to the device; raises as `open_cache` does."""
        assert step.square is not None, "refused by the configuration"
        self._split = split
        size = step.square.size
        needed = len(split) * 3 * size**2
        if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
            sizes = f"needs {in_bytes(needed)}, {in_bytes(free)} are free on {device}"
            raise UserError(f"data.cache=device: {sizes}: use data.cache=ram")
        cache = open_cache(split, step, dataclasses.replace(conf, cache=CacheKind.ram))
        images = [cache.load(sample) for sample in range(len(split))]
        self._is_readable = torch.tensor([image is not None for image in images])
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        self._images = torch.empty(len(split), 3, size, size, dtype=torch.uint8, device=device)
        for start in range(0, len(images), CHUNK):
            part = [blank if image is None else image for image in images[start : start + CHUNK]]
            self._images[start : start + len(part)] = torch.stack(part).to(device)

    def take(self, samples: Tensor) -> tuple[Tensor, Tensor, list[ImageError]]:
        """Return the readable images of `samples`, int64 (n,), their indices, and an error for each of the others.

        The images are uint8 (m, 3, size, size) on the device, the indices int64 (m,). An image that could not be read
        at first stays out for the whole run, also if its file is repaired meanwhile.
        """
        readable = self._is_readable[samples]
        names = [self._split.name_of(sample) for sample in samples[~readable].tolist()]
        errors = [ImageError(name, "it could not be read when the images were put on the device") for name in names]
        samples = samples[readable] if errors else samples
        return self._images[sent(samples, self._images.device)], samples, errors


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. To a GPU they go out of pinned memory, since any other copy would wait for the GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)
    return values.to(device)
