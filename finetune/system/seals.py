"""Checksums of binary files of ours: what is read back is compared with what was written before it is believed.

Most files end with a seal: the CRC-32 of each block of the content before it. Readers of zip, tar and npy files stop
before the seal, so the files stay plain ones of their format. Nothing may follow the content of a safetensors file;
there the checksum stands in the metadata. CRC-32 finds damage and no malice; it is the fastest checksum of the
standard library, about 4 GB/s.
"""

import contextlib
import errno
import io
import json
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from finetune.system.errors import UserError
from finetune.system.reading import DamagedError, NotRegularError, open_regular

MAGIC = b"FTSEAL1\n"
# After the checksums: MAGIC, bytes of content, bytes of a block, CRC-32 of the checksums and of these two numbers.
_END = struct.Struct("<8sQQI")
PIECE = 2**20  # bytes that are read at a time
# In the header of a safetensors file, before eight hexadecimal digits. There cannot be such a text inside a value of
# the metadata, where JSON writes a backslash before each quote.
_KEY = b'"finetune_crc32":"'
CHECKSUM_KEY, PLACEHOLDER = "finetune_crc32", "0" * 8
MAX_HEADER = 10**8  # bytes, as in the library


@contextlib.contextmanager
def damaged_if_unreadable(path: Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads the content of `path` into a DamagedError.

    An OSError of the disk (no such file, no right, no room, a bad sector) is no damage and stays as it is, and so do a
    UserError and a lack of memory: sizes are compared with those that were written before a library reads them.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        # Libraries raise it without a number for bad content; a seek to a place that cannot exist is EINVAL.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise DamagedError.unreadable(path, error) from error
    except Exception as error:
        # Zip, pickle, npy and json readers raise nearly any error on damaged bytes: NotImplementedError for a flipped
        # method, UnicodeDecodeError for a name, struct.error, KeyError, RuntimeError for a flag that says `encrypted`.
        raise DamagedError.unreadable(path, error) from error


def crc_of(file: IO[bytes], size: int, value: int = 0) -> int:
    """CRC-32 of the next `size` bytes of a file, or of those that there are, after bytes with the CRC-32 `value`."""
    while size > 0 and (piece := file.read(min(size, PIECE))):
        value = zlib.crc32(piece, value)
        size -= len(piece)
    return value


def seal_of(sums: Iterable[int], size: int, block: int) -> bytes:
    """The seal of a content of `size` bytes whose blocks of `block` bytes have the checksums `sums`."""
    table = _little(array("I", sums)).tobytes()
    return table + _END.pack(MAGIC, size, block, _crc_of_table(table, size, block))


def seal(path: Path, *, block: int | None = None) -> None:
    """Append a seal to a file: checksums of blocks of `block` bytes, by default one of everything."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        step = block or max(size, 1)
        sums = [crc_of(file, min(step, size - start)) for start in range(0, size, step)]
        file.write(seal_of(sums, size, step))


class SealedFile:
    """A file with a seal. The checksum of a block is compared when this process first reads the block."""

    def __init__(self, path: Path) -> None:
        """Read the seal alone, however large the file is.

        Raises:
            DamagedError: The file has no seal, or another size than its seal says.
        """
        self.path = path
        with _opened(path) as file:
            length = file.seek(0, os.SEEK_END)
            end = b"" if length < _END.size else _read_at(file, length - _END.size, _END.size)
            magic, self.size, self.block, checksum = _END.unpack(end) if end else (b"", 0, 1, 0)
            if magic != MAGIC:
                why = "it does not end with a checksum, so it was cut or changed, or an earlier version wrote it"
                raise DamagedError.because(path, why)
            count = -(-self.size // self.block) if self.block else -1
            if length != self.size + 4 * count + _END.size:
                raise DamagedError.because(
                    path, f"it has {length:,} bytes, and its end says that other ones were written"
                )
            table = _read_at(file, self.size, 4 * count)
        if _crc_of_table(table, self.size, self.block) != checksum:
            raise DamagedError.because(path, "its list of checksums differs from what was written")
        self.sums = _little(array("I", table))
        self._is_checked = bytearray(count)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of the content from `offset` on: `size` of them, or as many as there are.

        Raises:
            DamagedError: A block of them differs from what was written.
        """
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        blocks = range(offset // self.block, (offset + size - 1) // self.block + 1)
        with _opened(self.path) as file:
            if all(self._is_checked[number] for number in blocks):
                return _read_at(file, offset, size)
            first = blocks.start * self.block
            data = _read_at(file, first, min(blocks.stop * self.block, self.size) - first)
        view = memoryview(data)
        for number in blocks:
            start = number * self.block - first
            self._compare(number, zlib.crc32(view[start : start + self.block]))
        return data[offset - first : offset - first + size]

    def check(self) -> None:
        """Compare every block; a DamagedError if one differs from what was written."""
        with _opened(self.path) as file:
            for number in range(len(self.sums)):
                self._compare(number, crc_of(file, min(self.block, self.size - number * self.block)))

    def _compare(self, number: int, checksum: int) -> None:
        if checksum != self.sums[number]:
            where = "" if len(self.sums) == 1 else f" of the bytes from {number * self.block:,} on"
            raise DamagedError.because(self.path, f"the checksum{where} differs from what was written")
        self._is_checked[number] = True


def check_seal(path: Path) -> bool:
    """Compare all of a file with its seal; False if it has none, as files of other programs. Raises DamagedError."""
    with _opened(path) as file:
        length = file.seek(0, os.SEEK_END)
        is_sealed = _read_at(file, max(0, length - _END.size), len(MAGIC)) == MAGIC
    if is_sealed:
        SealedFile(path).check()
    return is_sealed


def read_sealed(path: Path) -> bytes:
    """The content of a sealed file, without its seal; raises as `SealedFile` does."""
    file = SealedFile(path)
    return file.read(0, file.size)


class SealedStream(io.RawIOBase):
    """The content of a sealed file as an open file, for readers that want one; each block is compared."""

    def __init__(self, file: SealedFile) -> None:
        """Begin at the first byte."""
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; the new place."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; how many bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        data = self._file.read(self._place, len(view))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file: the library writes them in any order, and equal files are to be equal.

    Where the sorted header would have another length, which no text of ours leads to, the file stays as it is.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        tree = json.loads(file.read(length))
        tree["__metadata__"] = dict(sorted(tree["__metadata__"].items()))
        header = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(header) == length:
            file.seek(8)
            file.write(header)


def put_checksum(path: Path) -> None:
    """Write the checksum of a safetensors file into its metadata, which has `CHECKSUM_KEY: PLACEHOLDER`."""
    with open(path, "r+b") as file:
        place = _place_of_checksum(file)
        assert place is not None, "the metadata has no place for it"
        value = _checksum_without(file, place)
        file.seek(place)
        file.write(b"%08x" % value)


def check_checksum(path: Path) -> bool:
    """Compare a safetensors file with the checksum in its metadata; False if it has none, as other programs' files.

    Raises:
        DamagedError: It differs.
    """
    with _opened(path) as file:
        place = _place_of_checksum(file)
        if place is None:
            return False
        if _read_at(file, place, 8) != b"%08x" % _checksum_without(file, place):
            mend = f"a program that changes such a file leaves {CHECKSUM_KEY} out of its metadata"
            raise DamagedError.because(path, "its checksum differs from what was written", mend)
    return True


def checksum_in(path: Path) -> str | None:
    """The checksum that a safetensors file says it has, without comparing it; None where it has none.

    It tells this file from any other that the program wrote: other weights or other metadata have another one.
    """
    with _opened(path) as file:
        place = _place_of_checksum(file)
        return None if place is None else _read_at(file, place, 8).decode("latin-1")


def _place_of_checksum(file: IO[bytes]) -> int | None:
    """Where the eight digits stand in a safetensors file: in the header, whose length the first eight bytes give."""
    length = int.from_bytes(_read_at(file, 0, 8), "little")
    found = _read_at(file, 8, min(length, MAX_HEADER)).find(_KEY)
    return None if found < 0 else 8 + found + len(_KEY)


def _checksum_without(file: IO[bytes], place: int) -> int:
    """CRC-32 of the file with the placeholder at `place`."""
    file.seek(0)
    value = zlib.crc32(PLACEHOLDER.encode(), crc_of(file, place))
    file.seek(place + 8)
    return crc_of(file, os.fstat(file.fileno()).st_size, value)


def _opened(path: Path) -> IO[bytes]:
    """Open a regular file for reading; a DamagedError where it is none."""
    try:
        return open_regular(path)
    except NotRegularError as error:
        raise DamagedError.because(path, str(error)) from None


def _read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _crc_of_table(table: bytes, size: int, block: int) -> int:
    return zlib.crc32(struct.pack("<QQ", size, block), zlib.crc32(table))


def _little(values: "array[int]") -> "array[int]":
    """Checksums as they stand in files: four bytes each, the lowest first."""
    assert values.itemsize == 4
    if sys.byteorder == "big":
        values.byteswap()
    return values
