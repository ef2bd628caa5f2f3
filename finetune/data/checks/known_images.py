"""A memory of earlier checks: which images were readable, by path, size and times. So a second check decodes nothing.

One file a data set, `checks/<key>-<id>.npz` in the cache folder. Where it is damaged, missing, or made by another
version of the program or of a library, images are read again.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.caches.entries import cache_folder, claim_cache, entry_lock, known_marker
from finetune.data.caches.made_by import decoded_by
from finetune.data.split import ImageStore
from finetune.data.streams import Ranks, mix, ranks
from finetune.system.files import write_atomic
from finetune.system.ours import Marker, RefusedError
from finetune.system.reading import DamagedError
from finetune.system.seals import damaged_if_unreadable, read_sealed, seal

logger = logging.getLogger("finetune")

# One image. `key`: hash of its stamp (path, size, time), 0 where it has none; `depth`: how closely it was examined, see
# below; `bad`: 1 where it cannot be read; `mode`: place in MODES; `first`, `second`: hash of its bytes, 0 if not read;
# `tail`: hash of its last TAIL_BYTES bytes, 0 if not read; `look`: see `looks.look_of`, 0 if not computed.
RECORD = np.dtype([
    ("key", "<u8"), ("depth", "u1"), ("bad", "u1"), ("mode", "u1"), ("height", "<i4"), ("width", "<i4"),
    ("first", "<u8"), ("second", "<u8"), ("tail", "<u8"), ("look", "<u8"),
])  # fmt: skip
Records = np.ndarray[tuple[int, ...], np.dtype[Any]]

TAIL_BYTES = 4096  # of a file; compressed images that differ nearly always differ there

# Depths: not looked at; the file exists; its header was read; all of it was decoded.
UNSEEN, PRESENT, HEADER, DECODED = range(4)
# Pillow's names. Files hold places in this list: append, never reorder.
MODES = tuple(
    ["?", "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B", "RGBX"]
)


def stamp_keys(stamps: Sequence[str], max_pixels: int) -> Ranks:
    """`key` of images with these stamps, of which none may have more than `max_pixels`; 0 for an empty stamp."""
    keys = ranks(f"stamp {max_pixels}", 0, stamps)
    keys[[not stamp for stamp in stamps]] = 0
    return keys


def tail_of(data: bytes) -> int:
    """`tail` of an image with these bytes; never 0."""
    return int.from_bytes(_digest(data[-TAIL_BYTES:], 8), "little") or 1


def content_of(store: ImageStore, row: int) -> tuple[int, int, int]:
    """(`tail`, `first`, `second`) of an image; raises ImageError."""
    return content_hashes(store.read(row))


def content_hashes(data: bytes) -> tuple[int, int, int]:
    """(`tail`, `first`, `second`) of an image with these bytes."""
    first, second = np.frombuffer(_digest(data, 16), dtype="<u8").tolist()
    return tail_of(data), first, second


def _digest(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size, usedforsecurity=False).digest()


class KnownImages:
    """The results of earlier checks: RECORDs sorted by key, and the key of each unreadable image -> the reason."""

    def __init__(self, cache_dir: str | None, location: str) -> None:
        """Load the memory of the data set at `location`, see `Source.location`; empty where there is none."""
        self._cache, self._name = cache_folder(cache_dir), f"{mix('verdicts', location):016x}"
        marker = known_marker(self._cache)
        self.records, self.reasons = _nothing() if marker is None else _read(self._path(marker))

    def _path(self, marker: Marker) -> Path:
        # With the id of the cache: a file of somebody else's has another name, and is never replaced.
        return self._cache / "checks" / f"{self._name}-{marker.id}.npz"

    def find(self, keys: Ranks) -> tuple[Records, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        """The record of each key, and whether there is one, bool; there is none for key 0."""
        if not len(self.records):
            return np.zeros(len(keys), RECORD), np.zeros(len(keys), dtype=bool)
        places = np.searchsorted(self.records["key"], keys).clip(max=len(self.records) - 1)
        found = self.records[places]
        return found, (found["key"] == keys) & (keys != 0)

    def save(self, records: Records, reasons: Mapping[int, str]) -> None:
        """Add `records` and `reasons` to the file, if it can be written; what other processes wrote meanwhile stays."""
        learned = records[(records["key"] != 0) & ((records["depth"] >= HEADER) | (records["tail"] != 0))]
        if not len(learned):
            return
        try:
            path = self._path(claim_cache(self._cache))
        except OSError:
            return
        except RefusedError as error:
            logger.warning("%s. What this check found is not remembered", error)
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with entry_lock(path):
                before, reasons_before = _read(path)
                everything = np.concatenate([learned, before])  # `unique` takes the first of one key: the new one
                _, firsts = np.unique(everything["key"], return_index=True)
                self.records = everything[firsts]
                self.reasons = {**reasons_before, **reasons}
                write_atomic(path, self._write)

    def _write(self, path: Path) -> None:
        text = json.dumps(self.reasons).encode()
        with open(path, "wb") as file:
            reasons, by = (np.frombuffer(data, dtype=np.uint8) for data in (text, decoded_by().encode()))
            np.savez(file, records=self.records, reasons=reasons, by=by)
        seal(path)


def _read(path: Path) -> tuple[Records, dict[int, str]]:
    """Records and reasons of the file; none of either where it is missing, damaged or of another version."""
    with contextlib.suppress(OSError, DamagedError):
        content = io.BytesIO(read_sealed(path))
        with damaged_if_unreadable(path), np.load(content, allow_pickle=False) as file:
            records, reasons = file["records"], json.loads(file["reasons"].tobytes())
            is_same = "by" in file and file["by"].tobytes() == decoded_by().encode()
            if is_same and records.dtype == RECORD and records.ndim == 1:
                return records, {int(key): str(reason) for key, reason in reasons.items()}
    return _nothing()


def _nothing() -> tuple[Records, dict[int, str]]:
    return np.zeros(0, RECORD), {}
