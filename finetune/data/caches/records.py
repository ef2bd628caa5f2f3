"""A large file of a cache as memory: its records are compared with their checksums as they are first read.

So a cache of any size opens at once, and no number of it is believed unseen. Each process compares for itself.
"""

import contextlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.system.reading import DamagedError

Integers = np.ndarray[tuple[int, ...], np.dtype[Any]]


class CheckedRecords:
    """The records of a file, one after the other from its first byte on. Other bytes may follow the last one."""

    def __init__(self, path: Path, bounds: Integers, sums: Integers) -> None:
        """Map the file: record i has the bytes from `bounds[i]` up to `bounds[i + 1]`, and the CRC-32 `sums[i]`.

        `bounds` is int64 (n + 1,), `sums` has n numbers. Raises DamagedError if the file is missing or too short.
        """
        self.path = path
        self._bounds, self._sums = bounds, sums
        self._is_checked = np.zeros(len(sums), dtype=bool)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamagedError.because(path, "it is missing") from None
        if size < bounds[-1]:
            raise DamagedError.because(path, f"it has {size:,} bytes, and {bounds[-1]:,} were written")
        self._map()

    def _map(self) -> None:
        # Copy on write: `mend` changes the memory of this process alone, and torch wants memory that may be written.
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c", shape=(int(self._bounds[-1]),))
        self.data: Tensor = torch.from_numpy(self._bytes)  # uint8 (bytes of all records,)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: without the bytes, which it maps itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_bytes", "data")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file again."""
        self.__dict__.update(state)
        self._map()

    def damaged(self, records: Integers) -> list[int]:
        """Those of `records`, int64 (n,), that are not what was written; compares what this process has not read."""
        found = []
        for record in records[~self._is_checked[records]].tolist():
            part = self._bytes[self._bounds[record] : self._bounds[record + 1]]
            if zlib.crc32(part.data) == self._sums[record]:
                self._is_checked[record] = True
            else:
                found.append(record)
        return found

    def mend(self, record: int, content: Tensor) -> bool:
        """Put `content`, uint8 (bytes,), in the place of a damaged record; whether it is what was written.

        If it is, the file is mended, too, where it may be written: then no later run meets the damage.
        """
        start, stop = (int(bound) for bound in self._bounds[record : record + 2])
        assert content.shape == (stop - start,), (content.shape, record)
        data = content.numpy()
        self._bytes[start:stop] = data
        self._is_checked[record] = True
        is_same = bool(zlib.crc32(data.data) == self._sums[record])
        if is_same:
            flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
            with (
                contextlib.suppress(OSError),  # the folder may belong to another user, or be gone by now
                open(self.path, "r+b", opener=lambda name, _: os.open(name, flags), buffering=0) as file,
            ):
                file.seek(start)
                file.write(data.data)
        return is_same
