"""Image stores that several sources share: files by path, and the parts of a library's data set."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from finetune.data.images.decode import Header, ImageError, error_words, read_file, read_header
from finetune.data.packed import PackedStrings
from finetune.data.split import SPLITS, ImageStore


def file_stamp(path: str) -> str:
    """Path, size and times of the last change; raises ImageError if there is no such file.

    Programs that copy or unpack a file may set its time of change (mtime), so another image may have the same. None
    can set when that was done (ctime): a replaced file has another stamp, and so has one with new rights.
    """
    status = _status(path)
    return f"{status.st_size}:{status.st_mtime_ns}:{_changed_ns(status)}:{path}"


def _changed_ns(status: os.stat_result) -> int:
    return status.st_ctime_ns


def hash_of(content: bytes) -> str:
    """32 hexadecimal digits that change with the content."""
    return hashlib.blake2b(content, digest_size=16, usedforsecurity=False).hexdigest()


def stamp_of_files(paths: Iterable[str]) -> str:
    """A hash of the `file_stamp`s of several files; raises ImageError where one is missing."""
    return hash_of("\n".join(map(file_stamp, paths)).encode("utf-8", "surrogateescape"))


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:
        raise ImageError(path, error_words(error)) from error


class FileStore(ImageStore):
    """Image files under one folder."""

    def __init__(self, root: str, names: PackedStrings) -> None:
        """Take paths relative to `root`, with `/` between folders. An absolute path stays as it is."""
        self._root, self._names = root, names

    def header(self, row: int) -> Header:
        """Size and mode, from the first bytes of the file; raises ImageError."""
        return read_header(self.name_of(row), self.max_pixels)

    def read(self, row: int) -> bytes:
        """The bytes of the file; raises ImageError."""
        return read_file(self.name_of(row), self.max_pixels)

    def size(self, row: int) -> int:
        """The length of the file; raises ImageError if there is no such file."""
        return _status(self.name_of(row)).st_size

    def tail(self, row: int, count: int) -> bytes:
        """The last `count` bytes of the file; raises ImageError."""
        return read_file(self.name_of(row), self.max_pixels, last=count)

    def stamp(self, row: int) -> str:
        """The file's `file_stamp`; raises ImageError if there is no such file."""
        return file_stamp(self.name_of(row))

    def key_of(self, row: int) -> str:
        """The path of the file from the folder of all images."""
        return str(self._names[row])

    def num_bytes(self, row: int) -> int:
        """The size of the file; 0 where there is none."""
        try:
            return os.stat(FileStore.name_of(self, row)).st_size
        except (OSError, ValueError):
            return 0

    def name_of(self, row: int) -> str:
        """The path of the file."""
        return os.path.join(self._root, self._names[row])


class PartsStore(ImageStore):
    """The splits of a library's data set, numbered as one list."""

    def __init__(self, name: str, parts: Mapping[str, tuple[str, Any]]) -> None:
        """Take the data set's name; and of each split the library's word for it and its sequence of images."""
        self._name = name
        self._parts = list(parts.values())
        sizes = torch.tensor([len(part) for _, part in self._parts])
        self._ends = sizes.cumsum(0).numpy()
        # See `FoundImages.given`.
        self.given = torch.tensor([SPLITS.index(name) for name in parts], dtype=torch.uint8).repeat_interleave(sizes)

    def find(self, row: int) -> tuple[str, Any, int]:
        """The library's word for the split, the split, and the index in it."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        word, part = self._parts[number]
        return word, part, row - int(self._ends[number]) + len(part)

    def name_of(self, row: int) -> str:
        """`NAME/word[index]`."""
        word, _, index = self.find(row)
        return f"{self._name}/{word}[{index}]"

    def names(self) -> list[str]:
        """A name of every image without the place of the data set: `word[index]`."""
        words = (f"{word}[{index}]" for word, part in self._parts for index in range(len(part)))
        return list(words)
