"""Decoded images, stored in memory or on disk between epochs: the same pixels as without a cache, many times faster.

An image is stored as the transform first uses it: resized to the model's square where the transform starts with that
resize, else whole. The key of a cache on disk covers everything that its pixels depend on (each file's path, size and
time, that resize, and `made_by.decoded_by`), so no run reads pixels that have become wrong. Every image has
a checksum, which is compared when a process first loads it: a damaged one is decoded from its file again.
"""

import hashlib
import io
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.config import AugmentConf, CacheKind, DataConf, OnError, Recipe
from finetune.core.preprocess import Preprocess
from finetune.data.caches.entries import GIB, begin, cache_folder, size_of
from finetune.data.caches.made_by import decoded_by
from finetune.data.caches.opening import open_entry
from finetune.data.caches.records import CheckedRecords
from finetune.data.images.decode import ImageError
from finetune.data.images.transforms import fit_square
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.files import sync_file, sync_folder
from finetune.system.limits import in_bytes
from finetune.system.memory import free_memory
from finetune.system.processors import map_in_threads
from finetune.system.reading import DamagedError
from finetune.system.seals import damaged_if_unreadable, read_sealed, seal
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

CHUNK = 64  # images decoded between two looks at the room that is left
Index = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class FirstStep:
    """The part of preprocessing that is done before an image is stored, and the part that is left for later."""

    square: Preprocess | None  # the resize that the transform starts with; None: whole images are stored
    rest: Preprocess  # the model's preprocessing for a stored image

    def __call__(self, image: Tensor) -> Tensor:
        """A decoded image, uint8 (3, height, width) -> the stored image, uint8."""
        return image if self.square is None else fit_square(image, self.square)


def first_step(preprocess: Preprocess, augment: AugmentConf | None) -> FirstStep:
    """The resize if the transform of `augment` starts with it; random crops start from the whole image."""
    if augment is not None and augment.recipe not in (Recipe.none, Recipe.light):
        return FirstStep(None, preprocess)
    # "squash" leaves a stored square of the right size as it is.
    return FirstStep(preprocess, replace(preprocess, resize="squash"))


class PixelCache:
    """The stored images of a split: their bytes, one image after the other, and an index with the size of each."""

    def __init__(self, index: Index, pixels: Tensor | CheckedRecords) -> None:
        """Read images out of `pixels`: all bytes, uint8 (n,), in memory, or the records of a file, one for each image.

        `index` has height, width and checksum of each image, int64 (images, 3); height 0: it could not be read.
        """
        self._index, self._offsets = index, _bounds(index)
        self._records = pixels if isinstance(pixels, CheckedRecords) else None
        self._pixels = pixels if isinstance(pixels, Tensor) else None

    def load(self, sample: int) -> Tensor | None:
        """The image, uint8 (3, height, width); None where the cache does not have it whole, see `mend`."""
        offset, (height, width, _) = int(self._offsets[sample]), self._index[sample].tolist()
        if not height:
            return None
        if self._records is None:
            assert self._pixels is not None
            pixels = self._pixels[offset : offset + height * width * 3]
        else:
            content = np.empty(height * width * 3, dtype=np.uint8)
            if not self._records.read(sample, content):
                return None
            pixels = torch.from_numpy(content)
        return pixels.view(height, width, 3).permute(2, 0, 1)

    def mend(self, sample: int, image: Tensor) -> bool:
        """Put an image that `load` did not give into its place; False where it could not be read at first, either.

        It is no damage if an image could not be read when the cache was made. Nor is such an image added later.
        """
        height, width, _ = self._index[sample].tolist()
        if not height or self._records is None:
            return False
        if image.shape[1:] == (height, width):  # else the file was replaced by another image of the same size and time
            self._records.mend(sample, image.permute(1, 2, 0).contiguous().view(-1))
        return True


def _bounds(index: Index) -> Index:
    """Where each image begins and the last one ends, int64 (images + 1,)."""
    sizes = index[:, 0] * index[:, 1] * 3
    return np.concatenate([np.zeros(1, dtype=np.int64), sizes.cumsum()])


def open_cache(split: Split, step: FirstStep, conf: DataConf) -> PixelCache:
    """The cache of `split`, made now if it does not exist or is damaged.

    Raises ImageError if an image cannot be read and `data.on_error=stop`; UserError if memory, disk or `data.cache_gib`
    is too small; OSError if the folder cannot be written.
    """
    if conf.cache == CacheKind.ram:
        memory = io.BytesIO()
        index = _write(split, step, memory, conf, free=free_memory)
        pixels = torch.frombuffer(memory.getbuffer(), dtype=torch.uint8)
        # Forked workers share it as it is; others would be sent a copy each.
        return PixelCache(index, pixels if sys.platform == "linux" else pixels.clone().share_memory_())  # type: ignore[no-untyped-call]
    place = cache_folder(conf.cache_dir) / "pixels" / _key(split, step)
    return open_entry(place, lambda: _read(place, len(split)), lambda: _build(split, step, conf, place))[0]


def _read(place: Path, images: int) -> PixelCache:
    """The cache in the folder `place`; a DamagedError if its index or the size of its pixels is not what was written.

    The pixels of an image are compared as it is loaded.
    """
    path = place / "index.npy"
    try:
        content = io.BytesIO(read_sealed(path))
    except FileNotFoundError:
        raise DamagedError.because(path, "it is missing") from None
    with damaged_if_unreadable(path):
        index = np.load(content, allow_pickle=False)
    if index.dtype != np.int64 or index.shape != (images, 3) or (index < 0).any():
        raise DamagedError.because(path, f"it is no list of {images:,} images")
    return PixelCache(index, CheckedRecords(place / "pixels.u8", _bounds(index), index[:, 2]))


def _build(split: Split, step: FirstStep, conf: DataConf, place: Path) -> None:
    folder = begin(place)
    others = size_of(place.parent)

    def free() -> int:
        return min(shutil.disk_usage(folder).free, int(conf.cache_gib * GIB) - others - size_of(folder))

    try:
        with open(folder / "pixels.u8", "wb") as file:
            index = _write(split, step, file, conf, free=free)
        np.save(folder / "index.npy", index)
        seal(folder / "index.npy")
        for name in ("pixels.u8", "index.npy"):
            sync_file(folder / name)
        sync_folder(folder)
        size = (folder / "pixels.u8").stat().st_size
        os.rename(folder, place)
        sync_folder(place.parent)
    except OSError as error:
        raise OSError(f"data.cache=disk: cannot write to {place.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("stored %s decoded images (%s) in %s", f"{len(split):,}", in_bytes(size), place)


def _write(split: Split, step: FirstStep, file: IO[bytes], conf: DataConf, *, free: Callable[[], int | None]) -> Index:
    """Decode every image into `file`, in threads (decoders release Python's lock); return the index of `PixelCache`.

    `free` returns how many bytes may still be written; None where that is unknown.
    """

    def decode(sample: int) -> Tensor | ImageError:
        try:
            return step(split.load(sample))
        except ImageError as error:
            return error

    index = np.zeros((len(split), 3), dtype=np.int64)
    total = 0
    if step.square is not None:
        _check_room(len(split) * 3 * step.square.size**2, free(), conf)
    with at_once(), tqdm(total=len(split), desc="decode once", unit=" images", leave=False, disable=None) as bar:
        for sample, made in enumerate(map_in_threads(decode, range(len(split)))):
            bar.update()
            if isinstance(made, ImageError):
                if conf.on_error == OnError.stop:
                    raise made
                continue  # its row of the index stays 0; the loader meets the error again and leaves the image out
            if sample % CHUNK == 0:
                _check_room(made.numel() * min(CHUNK, len(split) - sample), free(), conf)
            rows = np.ascontiguousarray(made.permute(1, 2, 0).numpy())
            data = rows.reshape(-1).data
            index[sample] = *rows.shape[:2], zlib.crc32(data)
            total += file.write(data)
    if not total:
        raise UserError("data.cache: not one image of the split can be read")
    return index


def _check_room(needed: int, free: int | None, conf: DataConf) -> None:
    if free is None or needed <= free:
        return
    other = "data.cache=disk"
    if conf.cache == CacheKind.disk:
        other = f"a larger data.cache_gib (now {conf.cache_gib:g}), `finetune cache clear`, another data.cache_dir"
    sizes = f"needs {in_bytes(needed)} or more, {in_bytes(max(0, free))} are free"
    raise UserError(f"data.cache={conf.cache}: {sizes}: use {other}, or data.cache=none")


def _key(split: Split, step: FirstStep) -> str:
    """A name that changes with everything the stored pixels depend on."""
    square = None if step.square is None else replace(step.square, mean=(0, 0, 0), std=(1, 1, 1))
    state = hashlib.blake2b(f"{decoded_by()} {square}".encode(), digest_size=16, usedforsecurity=False)
    state.update(split.content_digest())
    return state.hexdigest()
