"""Image files on a disk, by path."""

from __future__ import annotations

import os

from torch import Tensor

from finetune.data.images.decode import MISSING, Header, ImageError, decode, error_words, read_file, read_header
from finetune.data.packed import PackedStrings


class FileStore:
    """Image files under one root, decoded when asked for."""

    encoded = True

    def __init__(self, root: str, names: PackedStrings) -> None:
        """Hold `names`, relative to `root`, with `/` between folders; absolute ones stay what they are."""
        self._root = root
        self._names = names

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        return decode(self.read(row), self.name_of(row))

    def header(self, row: int) -> Header:
        """Size and mode, from the first bytes of the file; raises ImageError."""
        return read_header(self.name_of(row))

    def read(self, row: int) -> bytes:
        """The file; raises ImageError."""
        return read_file(self.name_of(row))

    def stamp(self, row: int) -> str:
        """Path, size and time of the last change; raises ImageError where there is no such file."""
        path = self.name_of(row)
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            raise ImageError(path, MISSING) from error
        except (OSError, ValueError) as error:
            raise ImageError(path, error_words(error)) from error
        return f"{status.st_size}:{status.st_mtime_ns}:{path}"

    def name_of(self, row: int) -> str:
        """Its path."""
        return os.path.join(self._root, self._names[row])
