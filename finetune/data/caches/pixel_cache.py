"""Decoded images, stored in memory or on disk between epochs: the same pixels as without a cache, many times faster.

An image is stored as the transform first uses it: resized to the model's square where the transform starts with that
resize, else whole. The key of a cache on disk covers everything that its pixels depend on (each file's path, size and
time, that resize, the libraries that decode and resize), so no run reads pixels that have become wrong.
"""

import hashlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
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
from finetune.data.caches.entries import GIB, beside, cache_folder, made_once, size_of
from finetune.data.images.decode import ImageError
from finetune.data.images.transforms import fit_square
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.limits import in_bytes
from finetune.system.memory import free_memory
from finetune.system.processors import map_in_threads
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

FORMAT = 2  # raised when the files below change their meaning, or `read_image` the pixels
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
    """The stored images of a split: one block of bytes, and an index that says where in it each image lies."""

    def __init__(self, index: Index, *, pixels: Tensor | None = None, path: Path | None = None) -> None:
        """Read images out of the bytes of all images, `pixels`, uint8 (n,), or out of the file `path` that holds them.

        `index` has offset, height and width of each image, int64 (images, 3); height 0: it could not be read.
        """
        self._index, self._path = index, path
        self._pixels = pixels if path is None else _mapped(path)

    def load(self, sample: int) -> Tensor | None:
        """The image, uint8 (3, height, width); None where it could not be read when the cache was made."""
        offset, height, width = self._index[sample].tolist()
        if not height:
            return None
        assert self._pixels is not None
        return self._pixels[offset : offset + height * width * 3].view(height, width, 3).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: the path of the file in the place of its bytes."""
        return {**self.__dict__, "_pixels": None if self._path else self._pixels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        self.__dict__.update(state)
        if self._path is not None:
            self._pixels = _mapped(self._path)


def _mapped(path: Path) -> Tensor:
    # Copy on write, since torch wants memory that may be written; no code writes to it.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))


def open_cache(split: Split, step: FirstStep, conf: DataConf) -> PixelCache:
    """The cache of `split`, made now if it does not exist.

    Raises ImageError if an image cannot be read and `data.on_error=stop`; UserError if memory, disk or `data.cache_gib`
    is too small; OSError if the folder cannot be written.
    """
    if conf.cache == CacheKind.ram:
        memory = io.BytesIO()
        index = _write(split, step, memory, conf, free=free_memory)
        pixels = torch.frombuffer(memory.getbuffer(), dtype=torch.uint8)
        # Forked workers share it as it is; others would be sent a copy each.
        return PixelCache(index, pixels=pixels if sys.platform == "linux" else pixels.clone().share_memory_())  # type: ignore[no-untyped-call]
    place = cache_folder(conf.cache_dir) / "pixels" / _key(split, step)
    made_once(place, lambda: _build(split, step, conf, place))
    return PixelCache(np.load(place / "index.npy"), path=place / "pixels.u8")


def _build(split: Split, step: FirstStep, conf: DataConf, place: Path) -> None:
    folder = beside(place)
    folder.mkdir()
    others = size_of(place.parent)

    def free() -> int:
        return min(shutil.disk_usage(folder).free, int(conf.cache_gib * GIB) - others - size_of(folder))

    try:
        with open(folder / "pixels.u8", "wb") as file:
            index = _write(split, step, file, conf, free=free)
            file.flush()
            os.fsync(file.fileno())
        np.save(folder / "index.npy", index)
        size = (folder / "pixels.u8").stat().st_size
        os.rename(folder, place)
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
    offset = 0
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
            index[sample] = offset, *rows.shape[:2]
            offset += file.write(rows.reshape(-1).data)
    if not offset:
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
    libraries = f"{torch.__version__} {torchvision.__version__} {PIL.__version__}"
    square = None if step.square is None else replace(step.square, mean=(0, 0, 0), std=(1, 1, 1))
    state = hashlib.blake2b(f"{FORMAT} {libraries} {square}".encode(), digest_size=16, usedforsecurity=False)
    state.update(split.content_digest())
    return state.hexdigest()
