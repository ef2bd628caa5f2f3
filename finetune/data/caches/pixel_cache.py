"""Decoded images kept between epochs, in memory or on disk: the same pixels as without, many times faster.

What is kept is the image as the transform first sees it anyway: the square where the transform starts with that resize,
else the whole image. A cache is known by everything its pixels depend on (each file's path, size and time, that first
step, the libraries that decode and resize), so a stale one is never found; it is built beside its place and renamed.
What nobody has used for long makes room for others: `evict`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.config import AugmentConf, CacheKind, DataConf, OnError, Recipe
from finetune.core.preprocess import Preprocess
from finetune.data.cache_dir import cache_folder
from finetune.data.caches.content import content_digest
from finetune.data.caches.evict import Held, bound, evict, made_once
from finetune.data.images.decode import ImageError
from finetune.data.images.transforms import fit_square
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.memory import free_memory
from finetune.system.processors import cores
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

FORMAT = 2  # raised when the files below change their meaning, or `read_image` the pixels
CHUNK = 64  # images decoded between two looks at the free memory
Index = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class FirstStep:
    """What is done to an image before it is kept, and how the transform goes on from there.

    Attributes:
        square: The resize that the transform starts with, or None: whole images are kept.
        rest: The model's preprocessing for what is kept.
    """

    square: Preprocess | None
    rest: Preprocess

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, height, width) -> what is kept, uint8."""
        return image if self.square is None else fit_square(image, self.square)


def first_step(preprocess: Preprocess, augment: AugmentConf | None) -> FirstStep:
    """The resize, where the transform of `augment` starts with it; random crops start from the whole image."""
    if augment is not None and augment.recipe not in (Recipe.none, Recipe.light):
        return FirstStep(None, preprocess)
    # To squash a square of the right size changes nothing.
    return FirstStep(preprocess, replace(preprocess, resize="squash"))


class PixelCache:
    """The kept images of a split: one block of bytes, and where in it each image lies."""

    def __init__(
        self, index: Index, *, pixels: Tensor | None = None, path: Path | None = None, held: Held | None = None
    ) -> None:
        """Hold (offset, height, width) of each image, int64 (n, 3), in `pixels`, uint8 (n,), or in the file `path`.

        `held` keeps other processes from removing that file.
        """
        self._held = held
        self._index = index
        self._path = path
        self._pixels = pixels

    def load(self, sample: int) -> Tensor | None:
        """The image, uint8 (3, height, width); None where it could not be read when the cache was made."""
        offset, height, width = self._index[sample].tolist()
        if not height:
            return None
        if self._pixels is None:
            assert self._path is not None
            # Copy on write: torch wants memory that may be written; nobody writes.
            self._pixels = torch.from_numpy(np.memmap(self._path, dtype=np.uint8, mode="c"))
        flat = self._pixels[offset : offset + height * width * 3]
        return flat.view(height, width, 3).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is not forked opens the file itself."""
        return {**self.__dict__, "_pixels": None if self._path else self._pixels, "_held": None}


def open_cache(split: Split, step: FirstStep, conf: DataConf) -> PixelCache:
    """The cache of `split`, made now if it is not there.

    Raises:
        ImageError: An image cannot be read and `data.on_error=stop`.
        ValueError: Memory or disk is too small.
        OSError: The folder cannot be written.
    """
    if conf.cache == CacheKind.ram:
        memory = io.BytesIO()
        index = _write(split, step, memory, conf, free=free_memory)
        pixels = torch.frombuffer(memory.getbuffer(), dtype=torch.uint8)
        # Forked workers share it as it is; others would be sent a copy each.
        return PixelCache(index, pixels=pixels if sys.platform == "linux" else pixels.clone().share_memory_())  # type: ignore[no-untyped-call]
    place = cache_folder(conf.cache_dir) / "pixels" / _key(split, step)
    held = made_once(place, lambda: _build(split, step, conf, place))
    mend = f"raise data.cache_gib={conf.cache_gib:g}, or use data.cache=none"
    bound(place, conf.cache_gib, holds="decoded images", mend=mend)
    return PixelCache(np.load(place / "index.npy"), path=place / "pixels.u8", held=held)


def _build(split: Split, step: FirstStep, conf: DataConf, place: Path) -> None:
    """Make the folder `place` in one move."""
    if step.square is not None:
        evict(place.parent, place, int(conf.cache_gib * 2**30) - _squares(split, step.square))
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        with open(beside / "pixels.u8", "wb") as file:
            index = _write(split, step, file, conf, free=lambda: shutil.disk_usage(beside).free)
            file.flush()
            os.fsync(file.fileno())
        np.save(beside / "index.npy", index)
        size = (beside / "pixels.u8").stat().st_size
        os.rename(beside, place)
    except OSError as error:
        if not place.is_dir():  # where there are no locks, another run may have been faster
            raise OSError(f"data.cache=disk: cannot write to {place.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    logger.info("kept %s decoded images (%.2f GiB) in %s", f"{len(split):,}", size / 2**30, place)


def _write(split: Split, step: FirstStep, file: IO[bytes], conf: DataConf, *, free: Callable[[], int | None]) -> Index:
    """Decode every image into `file`; where each lies. Memory: a chunk of images."""
    index = np.zeros((len(split), 3), dtype=np.int64)
    offset = 0
    if step.square is not None:
        _check_room(_squares(split, step.square), free(), conf)
    with at_once(), tqdm(total=len(split), desc="decode once", unit=" images", leave=False, disable=None) as bar:
        for sample, made in _decoded(split, step):
            bar.update()
            if isinstance(made, ImageError):
                if conf.on_error == OnError.stop:
                    raise made
                continue  # the loader meets it again, and leaves it out
            if sample % CHUNK == 0:
                _check_room(made.numel() * CHUNK, free(), conf)
            rows = np.ascontiguousarray(made.permute(1, 2, 0).numpy())
            index[sample] = offset, *rows.shape[:2]
            offset += file.write(rows.reshape(-1).data)
    if not offset:
        raise UserError("data.cache: not one image of the split can be read")
    return index


def _squares(split: Split, square: Preprocess) -> int:
    """Bytes of all images as squares."""
    return len(split) * 3 * square.size**2


def _decoded(split: Split, step: FirstStep) -> Iterator[tuple[int, Tensor | ImageError]]:
    """Every image in turn, by as many threads as there are cores: decoders let go of Python's lock."""

    def make(sample: int) -> Tensor | ImageError:
        try:
            return step(split.load(sample))
        except ImageError as error:
            return error

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(split), CHUNK):
            samples = range(start, min(start + CHUNK, len(split)))
            yield from zip(samples, pool.map(make, samples), strict=True)


def _check_room(needed: int, free: int | None, conf: DataConf) -> None:
    if free is not None and needed > free:
        other = "data.cache=disk" if conf.cache == CacheKind.ram else "another data.cache_dir"
        raise UserError(
            f"data.cache={conf.cache}: needs {needed / 2**30:.2f} GiB or more, {free / 2**30:.2f} are free: use"
            f" {other}, or data.cache=none"
        )


def _key(split: Split, step: FirstStep) -> str:
    """A name that changes with everything the kept pixels depend on."""
    libraries = f"{torch.__version__} {torchvision.__version__} {PIL.__version__}"
    square = None if step.square is None else replace(step.square, mean=(0, 0, 0), std=(1, 1, 1))
    state = hashlib.blake2b(f"{FORMAT} {libraries} {square}".encode(), digest_size=16, usedforsecurity=False)
    state.update(content_digest(split))
    return state.hexdigest()
