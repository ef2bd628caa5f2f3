"""Files that are whole or not there: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], None], *, aside: Path | None = None) -> None:
    """Let `write(temporary)` make a file, then put it in the place of `path` in one move.

    A kill, a full disk or an error leaves the old file as it was.

    Args:
        path: The file to make or replace.
        write: Writes the whole content to the path that it is given.
        aside: Where the old file is kept, once the new one is whole and on the disk.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if aside is not None and path.exists():
            _put_aside(path, aside)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(path.parent)


def _put_aside(path: Path, aside: Path) -> None:
    """Give the file a second name, so that it never lacks one; where the file system cannot, rename it."""
    if not _second_name(path, aside):
        os.replace(path, aside)


def _second_name(path: Path, second: Path) -> bool:
    """Give the file `path` the name `second` too, in one move; False where the file system has no such thing."""
    temporary = second.with_name(f".{second.name}.{os.getpid()}.tmp")
    try:
        if second.exists() and path.samefile(second):
            return True  # as a kill between two renames leaves it; and renaming a file onto itself would do nothing
        os.link(path, temporary)
    except OSError:
        return False
    os.replace(temporary, second)
    return True


def link(source: Path, path: Path) -> bool:
    """Put a second name of the file `source` in the place of `path`, in one move; False where file systems cannot.

    Files that are replaced, never written into, may share their content so.
    """
    if not _second_name(source, path):
        return False
    _sync_folder(path.parent)
    return True


def sweep_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left half done in `folder`; only for who works in it alone."""
    for path in folder.glob(".*.tmp"):
        if path.name.split(".")[-2].isdigit():  # of a process, see `write_atomic`
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a UTF-8 text."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_bytes(path: Path, data: bytes) -> None:
    """`write_atomic` of bytes."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

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
