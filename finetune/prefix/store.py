"""The activations of one view of a split: how a block is built, in memory or in a file, and read from a file.

A block on disk is a folder whose name changes with everything that its numbers depend on, so an outdated block is never
found. It is written beside its place and then renamed, under a lock: a killed run leaves no half block, and of two runs
that want the same block one waits and then reads. Every row has a checksum, which is compared when the row is first
read: so a block of any size opens at once.
"""

import contextlib
import json
import math
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from finetune.data.caches.entries import begin, beside
from finetune.data.caches.opening import open_entry
from finetune.data.caches.records import CheckedRecords
from finetune.system.errors import UserError
from finetune.system.files import sync_folder, write_text
from finetune.system.reading import DamagedError, read_json
from finetune.system.seals import SealedFile, damaged_if_unreadable, seal_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ActivationBlock:
    """The activations of one view of a split.

    A block has a slot for each time that an epoch can show an image, and a row for each slot whose image can be read.
    """

    values: Tensor  # (rows, ...), in the order of the slots; of a block on disk on the device `meta`: shape and dtype
    present: Tensor  # bool (slots,) on the host: False where the image cannot be read
    native: torch.dtype  # in which the layers above take the activations
    records: CheckedRecords | None = None  # the rows of a block on disk

    def read(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """The activations of `rows`, int64 (n,), as (n, ...), and the indices into `rows` of those that are damaged."""
        if self.records is None:
            return self.values[rows], []
        values = torch.empty(len(rows), *self.values.shape[1:], dtype=self.values.dtype)
        if not len(rows):
            return values, []
        content = values.view(len(rows), -1).view(torch.uint8).numpy()
        return values, [i for i, row in enumerate(rows.tolist()) if not self.records.read(row, content[i])]

    def mend(self, row: int, values: Tensor) -> bool:
        """Put activations, computed again, into a damaged row of the file; whether they are what was written."""
        assert self.records is not None
        return self.records.mend(row, _as_bytes(values))

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
        self.sums = array("I")  # of each row
        self._folder = path.parent.parent
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def _append(self, values: Tensor) -> None:
        self.shape, self.dtype = values.shape[1:], values.dtype
        data = _as_bytes(values).numpy().data
        self.sums.extend(
            zlib.crc32(data[start : start + self.row_bytes]) for start in range(0, len(data), self.row_bytes)
        )
        self._write(data)

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's activations."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _write(self, data: memoryview | bytes) -> None:
        with _write_errors(self._folder):
            while data:
                data = data[self._file.write(data) :]

    def seal(self) -> None:
        """Write the checksums, once all rows are there, and wait until all of it is on the disk."""
        self._write(seal_of(self.sums, self.rows * self.row_bytes, self.row_bytes))
        with _write_errors(self._folder):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
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
    """Open the block in the folder `place`; returns it, and whether `fill` built it since it was missing or damaged.

    `check` is called while another run builds the block; an exception from it ends the wait. Raises OSError if the
    folder cannot be written, or the disk is full or does not give back what was written; UserError as `BlockBuilder`.
    """
    return open_entry(place, lambda: _read(place, slots), lambda: _write(place, slots, fill), check)


def is_whole(place: Path, slots: int) -> bool:
    """Whether the folder `place` holds a block that `open_on_disk` would not build anew; its rows are not read."""
    try:
        _read(place, slots)
    except DamagedError:
        return False
    return True


def _write(place: Path, slots: int, fill: Fill) -> None:
    folder = beside(place)
    try:
        with _write_errors(place.parent):
            begin(place)
            builder = FileBuilder(slots, folder / "activations")
        with contextlib.closing(builder):
            builder.fill(fill)
            builder.seal()
        meta = {
            "shape": [builder.rows, *builder.shape],
            "dtype": str(builder.dtype).removeprefix("torch."),
            "native": str(builder.native).removeprefix("torch."),
            "present": np.packbits(builder.present.numpy()).tobytes().hex(),
        }
        with _write_errors(place.parent):
            write_text(folder / "meta.json", json.dumps({**meta, "own_checksum": _json_checksum(meta)}))
            sync_folder(folder)
            os.rename(folder, place)
            sync_folder(place.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Meta(TypedDict):
    shape: list[Annotated[int, Meta(ge=0)]]
    dtype: Literal["float32", "float16", "bfloat16"]
    native: Literal["float32", "float16", "bfloat16"]
    present: str  # a bit for each slot, hexadecimal
    own_checksum: int


def _read(place: Path, slots: int) -> ActivationBlock:
    """The block; a DamagedError if its description or its size is not what was written. No row is read yet."""
    path, described = place / "activations", place / "meta.json"
    try:
        meta = read_json(described, _Meta)
        sealed = SealedFile(path)
    except FileNotFoundError as error:
        raise DamagedError.because(Path(error.filename), "it is missing") from None
    plain: dict[str, Any] = {name: value for name, value in meta.items() if name != "own_checksum"}
    if meta["own_checksum"] != _json_checksum(plain):
        raise DamagedError.because(described, "its checksum differs from what was written")
    with damaged_if_unreadable(described):
        bits = np.frombuffer(bytes.fromhex(meta["present"]), dtype=np.uint8)
        present = torch.from_numpy(np.unpackbits(bits, count=slots).astype(bool))
    dtype, (rows, *shape) = DTYPES[meta["dtype"]], meta["shape"] or [0]
    row_bytes = math.prod(shape) * dtype.itemsize
    if rows != int(present.sum()) or (sealed.size, sealed.block) != (rows * row_bytes, row_bytes):
        raise DamagedError.because(path, f"it does not hold {rows:,} rows of {row_bytes:,} bytes")
    bounds = np.arange(rows + 1, dtype=np.int64) * row_bytes
    records = CheckedRecords(path, bounds, np.frombuffer(sealed.sums, dtype=np.uint32))
    values = torch.empty(meta["shape"], dtype=dtype, device="meta")
    return ActivationBlock(values, present, DTYPES[meta["native"]], records)


def _as_bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor in host memory, uint8 (bytes,)."""
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _json_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
