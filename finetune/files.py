"""Files that are whole or not there: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` make a file, then put it in the place of `path` in one move.

    A kill, a full disk or an error leaves the old file as it was.

    Args:
        path: The file to make or replace.
        write: Writes the whole content to the path that it is given.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a UTF-8 text."""


    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; where folders cannot be opened (Windows) the rename stands alone."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
