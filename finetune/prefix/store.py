"""Activations of one view of a split, whole or not there: in memory, on the device, or in a file that many runs read.

A file is known by everything its numbers depend on, so a stale one is never found. It is written beside its place and
renamed, under a lock: a kill leaves nothing that counts, and of two runs that want the same one waits and then reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.caches.entries import beside, lock_of, made_once, mark_used
from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.system.locks import file_lock

logger = logging.getLogger("finetune")

PIECE = 64 * 2**20  # bytes that are checked at once
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ActivationBlock:
    """The activations of one view of a split.

    Attributes:
        values: (slots, ...) as kept; a slot is an image, or one of several showings of it in an epoch.
        present: bool (slots,) on the host: False where the image could not be read.
        native: The dtype that the layers above take.
    """

    values: Tensor
    present: Tensor
    native: torch.dtype


class Builder:
    """Takes activations in the order of their slots; where they go, a subclass knows."""

    def __init__(self, slots: int) -> None:
        """For so many of them."""
        self.slots = slots
        self.present = torch.zeros(slots, dtype=torch.bool)
        self.native = torch.float32
        self.filled = 0
        self._nothing = torch.empty(0)  # (0, ...): what an image's activations look like, once that is known
        self._absent = 0  # slots at the end of the filled ones for which there is nothing, and not taken yet

    def put(self, values: Tensor | None, present: Tensor, native: torch.dtype) -> None:
        """Take the next ones.

        Args:
            values: (n, ...) as they are kept, of the slots that are present alone; None where none is.
            present: bool (m,), of which n are True: which of the next m slots have any.
            native: The dtype that the layers above take.

        Raises:
            ValueError: They are not finite.
        """
        count = len(present)
        self.present[self.filled : self.filled + count] = present
        self.filled += count
        if values is None:
            self._absent += count
            return
        if not torch.isfinite(values).all():
            raise UserError("the frozen layers give values that are not finite: look at the weights, and at the images")
        self.native, self._nothing = native, values[:0]
        if self._absent or not present.all():
            full = values.new_zeros(self._absent + count, *values.shape[1:])
            full[self._absent :][present.to(values.device)] = values
            values, self._absent = full, 0
        self._take(values, self.filled - len(values))

    def finish(self) -> None:
        """Every slot was put.

        Raises:
            ValueError: There is nothing for any of them.
        """
        assert self.filled == self.slots
        if self._absent == self.slots:
            raise UserError("not one image of the split can be read")
        if self._absent:
            self._take(self._nothing.new_zeros(self._absent, *self._nothing.shape[1:]), self.slots - self._absent)

    def _take(self, values: Tensor, first: int) -> None:
        """Those of the slots from `first` on, which follow those before."""
        raise NotImplementedError


class MemoryBuilder(Builder):
    """Into one tensor on a device."""

    def __init__(self, slots: int, device: torch.device) -> None:
        """Made at the first batch, which shows how large an image's activations are."""
        super().__init__(slots)
        self._device = device
        self.values = torch.empty(0, device=device)

    def _take(self, values: Tensor, first: int) -> None:
        if not first:
            self.values = torch.empty(self.slots, *values.shape[1:], dtype=values.dtype, device=self._device)
        self.values[first : first + len(values)] = values


class FileBuilder(Builder):
    """Into a file, byte after byte: a full disk is an error, not a crash as it would be through a map."""

    def __init__(self, slots: int, path: Path) -> None:
        """The file is made at once, in a folder beside blocks."""
        super().__init__(slots)
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.checksum = 0
        self._folder = path.parent.parent
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def _take(self, values: Tensor, first: int) -> None:
        data = values.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data
        self.shape, self.dtype = (self.slots, *values.shape[1:]), values.dtype
        self.checksum = zlib.crc32(data, self.checksum)
        with _told_of(self._folder):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """What was taken is on the disk."""
        try:
            with _told_of(self._folder):
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextlib.contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """What keeps a file from being written, with the setting that asks for it and the folder of all blocks."""
    try:
        yield
    except OSError as error:
        raise OSError(f"prefix.cache=disk: cannot write to {folder}: {error.strerror or error}") from error


Fill = Callable[[Builder], None]


def build_in_memory(slots: int, fill: Fill, device: torch.device) -> ActivationBlock:
    """A block in the memory of `device`."""
    builder = MemoryBuilder(slots, device)
    fill(builder)
    builder.finish()
    return ActivationBlock(builder.values, builder.present, builder.native)


def find_on_disk(place: Path, slots: int) -> ActivationBlock | None:
    """The block in the folder `place`; None where it is not there, or is damaged, and then it is said so and it goes.

    Returns:
        A memory map.

    Raises:
        OSError: What is damaged cannot be removed.
    """
    if not os.path.isdir(place):  # nor where it may not be looked at
        return None
    block, _ = _read(place, slots)
    if block is None:
        with file_lock(lock_of(place)):
            block, reason = _read(place, slots)  # another run may have mended it meanwhile
            if block is None and place.is_dir():
                logger.warning("the kept activations in %s are damaged (%s): they are computed again", place, reason)
                _remove(place)
    if block is not None:
        mark_used(place)
    return block


def open_on_disk(
    place: Path, slots: int, fill: Fill, check: Callable[[], None] = lambda: None
) -> tuple[ActivationBlock, bool]:
    """The block in the folder `place`, built now if it is not there or is damaged.

    `check` is called while another run builds it; what it raises ends the wait.

    Returns:
        As of `find_on_disk`; whether it was built now.

    Raises:
        OSError: The folder cannot be written, or is full, or does not give back what was written.
        ValueError: See `BlockBuilder`.
    """
    built = False

    def make() -> None:
        nonlocal built
        _write(place, slots, fill)
        built = True

    while (block := find_on_disk(place, slots)) is None:
        if built:
            raise OSError(f"{place} was written just now and reads otherwise: is the disk sound?")
        made_once(place, make, check)
    return block, built


def _remove(place: Path) -> None:
    """Take a damaged block away, in one move; only for who has its lock. Who reads it still has what it maps."""
    gone = beside(place)
    try:
        os.rename(place, gone)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{place} is damaged and cannot be removed: {reason}; remove it by hand") from error
    shutil.rmtree(gone, ignore_errors=True)


def _write(place: Path, slots: int, fill: Fill) -> None:
    """Make the folder `place` in one move."""
    folder = beside(place)
    try:
        with _told_of(place.parent):
            folder.mkdir()
            builder = FileBuilder(slots, folder / "activations")
        try:
            fill(builder)
            builder.finish()
        finally:
            builder.close()
        meta = {
            "shape": list(builder.shape),
            "dtype": str(builder.dtype).removeprefix("torch."),
            "native": str(builder.native).removeprefix("torch."),
            "checksum": builder.checksum,
            "present": np.packbits(builder.present.numpy()).tobytes().hex(),
        }
        with _told_of(place.parent):
            write_text(folder / "meta.json", json.dumps({**meta, "own_checksum": _words_checksum(meta)}))
            os.rename(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(place: Path, slots: int) -> tuple[ActivationBlock | None, str]:
    """The block, or None and why it is damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("own_checksum") != _words_checksum(meta):
            return None, "its description is not what was written"
        if _checksum(place / "activations") != meta["checksum"]:
            return None, "its content is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, str(error).splitlines()[0]
    bits = np.frombuffer(bytes.fromhex(meta["present"]), dtype=np.uint8)
    present = torch.from_numpy(np.unpackbits(bits, count=slots).astype(bool))
    assert meta["shape"][0] == slots, "the name of a block tells how many there are"
    values = _map(place / "activations", tuple(meta["shape"]), DTYPES[meta["dtype"]])
    return ActivationBlock(values, present, DTYPES[meta["native"]]), ""


def _words_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor, read as it is used. A write would change this process's copy alone; nobody writes."""
    # Bytes first: numpy, which maps for reading alone, does not know bfloat16.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")).view(dtype).view(shape)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read through once, which brings it into memory as far as that reaches."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value
