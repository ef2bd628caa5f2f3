"""A large file of a cache: its records are read one at a time, and each is compared with its checksum.

So a cache of any size opens at once, and no number of it is believed unseen. Each process compares for itself, and
compares again once anybody has written to the file. The file is read and not mapped: a map ends the process where
another one cuts the file.
"""

import contextlib
import os
import sys
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from finetune.system.reading import DamagedError, NotRegularError, open_regular

Integers = np.ndarray[tuple[int, ...], np.dtype[Any]]
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class CheckedRecords:
    """The records of a file, one after the other from its first byte on. Other bytes may follow the last one."""

    def __init__(self, path: Path, bounds: Integers, sums: Integers) -> None:
        """Open the file: record i has the bytes from `bounds[i]` up to `bounds[i + 1]`, and the CRC-32 `sums[i]`.

        `bounds` is int64 (n + 1,), `sums` has n numbers. The file stays open, so a folder that is removed meanwhile
        can still be read. Raises DamagedError if the file is missing or too short.
        """
        self.path = path
        self._bounds, self._sums = bounds, sums
        self._open()
        size = os.fstat(self._file.fileno()).st_size
        if size < bounds[-1]:
            raise DamagedError.because(path, f"it has {size:,} bytes, and {bounds[-1]:,} were written")

    def _open(self) -> None:
        try:
            self._file = open_regular(self.path)
        except FileNotFoundError:
            raise DamagedError.because(self.path, "it is missing") from None
        except NotRegularError as error:
            raise DamagedError.because(self.path, str(error)) from None
        # The records that are what was written, as long as nobody writes to the file.
        self._is_checked, self._stamp = np.zeros(len(self._sums), dtype=bool), _stamp(self._file)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: without the open file, which it opens itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        self.__dict__.update(state)
        self._open()

    def read(self, record: int, into: Bytes) -> bool:
        """Read a record into an array of its size; whether it is what was written, else the array holds anything."""
        assert len(into) == self._bounds[record + 1] - self._bounds[record], record
        try:
            is_whole = _read_at(self._file, int(self._bounds[record]), into)
        except OSError:  # a bad sector, or a server that has removed the file: the record is made again
            return False
        # Looked at after the bytes are read: where it has not changed, the bytes are those that were compared.
        stamp = _stamp(self._file)
        is_same = stamp == self._stamp
        if not is_same:
            self._is_checked[:], self._stamp = False, stamp
        if not self._is_checked[record]:
            is_whole = is_whole and zlib.crc32(into.data) == self._sums[record]
            self._is_checked[record] = is_whole and is_same
        return is_whole

    def mend(self, record: int, content: Tensor) -> bool:
        """Take `content`, uint8 (bytes,), for a damaged record; whether it is what was written.

        If it is, the file is mended where it may be written: then no later run meets the damage.
        """
        data = content.numpy().data
        start = int(self._bounds[record])
        assert len(data) == self._bounds[record + 1] - start, (content.shape, record)
        is_same = bool(zlib.crc32(data) == self._sums[record])
        if is_same:
            flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
            with (
                contextlib.suppress(OSError),  # the folder may belong to another user, or be gone by now
                open(self.path, "r+b", opener=lambda name, _: os.open(name, flags), buffering=0) as file,
            ):
                # Another file may lie there by now, with other records.
                if os.path.sameopenfile(file.fileno(), self._file.fileno()):
                    file.seek(start)
                    file.write(data)
        return is_same


def _stamp(file: IO[bytes]) -> tuple[int, int, int]:
    """What changes when anybody writes to an open file; nobody can set the last number."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_at(file: IO[bytes], offset: int, into: Bytes) -> bool:
    """Fill an array from an open file, whose place forked processes share, so it is not used; whether it was filled."""
    if sys.platform == "win32":  # it has no such call, and forks no process
        with open(file.name, "rb", buffering=0) as own:
            own.seek(offset)
            return own.readinto(into.data) == len(into)
    return os.preadv(file.fileno(), [into.data], offset) == len(into)
