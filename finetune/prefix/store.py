"""The activations of one view of a split: how a block is built, in memory or in a file, and read from a file.

A block on disk is a folder whose name changes with everything that its numbers depend on, so an outdated block is never
found. It is written beside its place and then renamed, under a lock: a killed run leaves no half block, and of two runs
that want the same block one waits and then reads.
"""

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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ActivationBlock:
    """The activations of one view of a split.

    A block has a slot for each time that an epoch can show an image, and a row for each slot whose image can be read.
    """

    values: Tensor  # (rows, ...), in the order of the slots
    present: Tensor  # bool (slots,) on the host: False where the image cannot be read
    native: torch.dtype  # in which the layers above take the activations

    def rows_of(self, slots: Tensor) -> Tensor:
        """The rows of slots that are present. int64 (n,) -> int64 (n,)."""
        return (self.present.cumsum(0) - 1)[slots]


Fill = Callable[["BlockBuilder"], None]  # puts the activations of all slots into a builder


class BlockBuilder:
    """Takes the activations of one view, batch after batch in the order of the slots."""

    def __init__(self, slots: int) -> None:
        """Begin a block of `slots` slots."""
        self.present = torch.zeros(slots, dtype=torch.bool)
        self.native = torch.float32
        self.slots = self.rows = 0  # so far

    def put(self, values: Tensor | None, present: Tensor, native: torch.dtype) -> None:
        """Add the next m slots; raises UserError if the activations are not finite.

        `present`, bool (m,), is True for the n slots whose image could be read; `values`, (n, ...), are the activations
        of these, None if there is none; `native` is the dtype in which the layers above take them.
        """
        self.present[self.slots : self.slots + len(present)] = present
        self.slots += len(present)
        if values is None:
            return
        if not torch.isfinite(values).all():
            raise UserError("the frozen layers give values that are not finite: look at the weights, and at the images")
        assert len(values) == int(present.sum()), "an image was read once, and a moment later it was not"
        self.native = native
        self._append(values)
        self.rows += len(values)

    def fill(self, fill: Fill) -> None:
        """Let `fill` add the activations of all slots; raises UserError if no image could be read."""
        fill(self)
        assert self.slots == len(self.present)
        if not self.rows:
            raise UserError("not one image of the split can be read")

    def _append(self, values: Tensor) -> None:
        raise NotImplementedError


class MemoryBuilder(BlockBuilder):
    """Builds a block in the memory of a device."""

    def __init__(self, slots: int, device: torch.device) -> None:
        """Begin; memory is taken with the first batch, which shows the size of an image's activations."""
        super().__init__(slots)
        self.values = torch.empty(0, device=device)

    def _append(self, values: Tensor) -> None:
        if not self.rows:
            size = (len(self.present), *values.shape[1:])
            self.values = torch.empty(size, dtype=values.dtype, device=self.values.device)
        self.values[self.rows : self.rows + len(values)] = values


class FileBuilder(BlockBuilder):
    """Builds a block in a file. Plain writes, since a full disk under a memory map kills the process."""

    def __init__(self, slots: int, path: Path) -> None:
        """Create the file `path`, in a folder beside other blocks."""
        super().__init__(slots)
        self.shape: tuple[int, ...] = ()  # of an image's activations
        self.dtype = torch.float32
        self.checksum = 0
        self._folder = path.parent.parent
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def _append(self, values: Tensor) -> None:
        data = values.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data
        self.shape, self.dtype = values.shape[1:], values.dtype
        self.checksum = zlib.crc32(data, self.checksum)
        with _write_errors(self._folder):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Wait until all of it is on the disk."""
        try:
            with _write_errors(self._folder):
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Add to an error of the disk the setting that asked for the file, and the folder of all blocks."""
    try:
        yield
    except OSError as error:
        raise OSError(f"prefix.cache=disk: cannot write to {folder}: {error.strerror or error}") from error


def build_in_memory(slots: int, fill: Fill, device: torch.device) -> ActivationBlock:
    """A block in the memory of `device`, whose activations `fill` computes."""
    builder = MemoryBuilder(slots, device)
    builder.fill(fill)
    return ActivationBlock(builder.values[: builder.rows], builder.present, builder.native)


def open_on_disk(
    place: Path, slots: int, fill: Fill, check: Callable[[], None] = lambda: None
) -> tuple[ActivationBlock, bool]:
    """The block in the folder `place` as a memory map, built by `fill` if it is missing or damaged; whether it was.

    `check` is called while another run builds the block; an exception from it ends the wait. Raises OSError if the
    folder cannot be written, or the disk is full or does not give back what was written; UserError as `BlockBuilder`.
    """
    was_built = False

    def make() -> None:
        nonlocal was_built
        _write(place, slots, fill)
        was_built = True

    while (block := _find(place, slots)) is None:
        if was_built:
            raise OSError(f"{place} was written just now and reads otherwise: is the disk sound?")
        made_once(place, make, check)
    mark_used(place)
    return block, was_built


def _find(place: Path, slots: int) -> ActivationBlock | None:
    """The block in the folder `place`, if it is there; a damaged one is removed, with a warning."""
    if not os.path.isdir(place):  # False, too, for a folder that may not be looked at
        return None
    block, _ = _read(place, slots)
    if block is None:
        with file_lock(lock_of(place)):
            block, reason = _read(place, slots)  # another run may have built it anew meanwhile
            if block is None and place.is_dir():
                logger.warning("the cached activations in %s are damaged (%s): they are computed again", place, reason)
                _remove(place)
    return block


def _remove(place: Path) -> None:
    """Remove a damaged block in one move; only for the process that holds its lock. Runs that have mapped it go on."""
    gone = beside(place)
    try:
        os.rename(place, gone)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{place} is damaged and cannot be removed: {reason}; remove it by hand") from error
    shutil.rmtree(gone, ignore_errors=True)


def _write(place: Path, slots: int, fill: Fill) -> None:
    folder = beside(place)
    try:
        with _write_errors(place.parent):
            folder.mkdir()
            builder = FileBuilder(slots, folder / "activations")
        with contextlib.closing(builder):
            builder.fill(fill)
        meta = {
            "shape": [builder.rows, *builder.shape],
            "dtype": str(builder.dtype).removeprefix("torch."),
            "native": str(builder.native).removeprefix("torch."),
            "checksum": builder.checksum,
            "present": np.packbits(builder.present.numpy()).tobytes().hex(),
        }
        with _write_errors(place.parent):
            write_text(folder / "meta.json", json.dumps({**meta, "own_checksum": _json_checksum(meta)}))
            os.rename(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(place: Path, slots: int) -> tuple[ActivationBlock | None, str]:
    """The block, or None and how it is damaged."""
    path = place / "activations"
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("own_checksum") != _json_checksum(meta):
            return None, "its description is not what was written"
        if _checksum(path) != meta["checksum"]:
            return None, "its content is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, str(error).splitlines()[0]
    bits = np.frombuffer(bytes.fromhex(meta["present"]), dtype=np.uint8)
    present = torch.from_numpy(np.unpackbits(bits, count=slots).astype(bool))
    # Mapped as bytes, because numpy does not know bfloat16. A write would change only this process's copy.
    data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    values = data.view(DTYPES[meta["dtype"]]).view(meta["shape"])
    return ActivationBlock(values, present, DTYPES[meta["native"]]), ""


def _json_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    """CRC-32 of a file. Reading it through also brings it into the system's file cache, as far as that reaches."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(2**26):  # 64 MiB at a time
            value = zlib.crc32(piece, value)
    return value
