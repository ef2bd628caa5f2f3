"""What is known of images that were looked at before: by path, size and time, so that a second start reads no file."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.cache_dir import cache_folder
from finetune.data.caches.entries import lock_of
from finetune.data.streams import Ranks, mix
from finetune.system.files import write_atomic
from finetune.system.locks import file_lock

# One image. `key`: hash of its stamp; `depth`: how far it was looked at; `first`, `second`: hash of its bytes.
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("depth", "u1"),
        ("bad", "u1"),
        ("mode", "u1"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("first", "<u8"),
        ("second", "<u8"),
    ]
)
Records = np.ndarray[tuple[int, ...], np.dtype[Any]]

UNSEEN, PRESENT, HEADER, DECODED = range(4)  # depths
MODES = (
    "?",
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "RGBX",
)


class Verdicts:
    """The memory of checks of one place, in one file; damage to it costs a second look and nothing else."""

    def __init__(self, cache_dir: str | None, location: str) -> None:
        """Read what is known of the images at `location`."""
        self._path = cache_folder(cache_dir) / "checks" / f"{mix('verdicts', location):016x}.npz"
        self.records, self.reasons = _read(self._path)

    def find(self, keys: Ranks) -> tuple[Records, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        """What is known under each key, and whether anything is; key 0 is never known."""
        if not len(self.records):
            return np.zeros(len(keys), RECORD), np.zeros(len(keys), dtype=bool)
        places = np.searchsorted(self.records["key"], keys).clip(max=len(self.records) - 1)
        found = self.records[places]
        return found, (found["key"] == keys) & (keys != 0)

    def save(self, records: Records, reasons: Mapping[int, str]) -> None:
        """Add to the file what was learned; what another process wrote meanwhile stays.

        A folder that cannot be written is no reason to stop: the next start looks again.
        """
        learned = records[(records["key"] != 0) & (records["depth"] >= HEADER)]
        if not len(learned):
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(lock_of(self._path)):
                before, reasons_before = _read(self._path)
                everything = np.concatenate([learned, before])  # of two with one key the first stays: the newer
                _, firsts = np.unique(everything["key"], return_index=True)
                self.records = everything[firsts]
                self.reasons = {**reasons_before, **reasons}
                write_atomic(self._path, self._write)

    def _write(self, path: Path) -> None:
        words = json.dumps({str(key): reason for key, reason in self.reasons.items()}).encode()
        with open(path, "wb") as file:
            np.savez(file, records=self.records, reasons=np.frombuffer(words, dtype=np.uint8))


def _read(path: Path) -> tuple[Records, dict[int, str]]:
    """The file, or nothing where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            records, words = file["records"], json.loads(file["reasons"].tobytes())
        if records.dtype == RECORD:
            return records, {int(key): str(reason) for key, reason in words.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError):
        pass  # written by another version, or torn
    return np.zeros(0, RECORD), {}
