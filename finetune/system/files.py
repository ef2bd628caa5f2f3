"""Atomic writes: a file is written beside its place, flushed to the disk, then renamed, so it is whole or not there."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.system.errors import naming
from finetune.system.ours import create_temporary, temporary_of

# What JSON leaves as it is, beside letters. Inside of texts only: JSON has no such characters between them.
_STEERING = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def write_atomic(
    path: Path, write: Callable[[Path], object], *, aside: Path | None = None, is_durable: bool = True
) -> None:
    """Let `write(temporary)` make a file, then put that file in the place of `path` in one move.

    With `aside`, the old file gets that name once the new one is on the disk. Without `is_durable` nothing waits for
    the disk, so a power cut may leave a torn file; call `sync_file` before anything relies on it.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched, as after a kill.
    """
    temporary = create_temporary(path)
    try:
        with naming(path):
            write(temporary)
            if is_durable:
                sync_file(temporary)
        # The old file has a name at every moment; without hard links it lacks one until the next move.
        if aside is not None and path.exists() and not _second_name(path, aside):
            os.replace(path, aside)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    if is_durable:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def link_or_copy(source: Path, path: Path) -> None:
    """Give the file `source` the second name `path`, in one move; copy it where the file system has no hard links.

    Only for files that are replaced and never written into, since both names may share their content.
    """
    if _second_name(source, path):
        sync_folder(path.parent)
    else:
        write_atomic(path, lambda temporary: shutil.copyfile(source, temporary))


def _second_name(path: Path, second: Path) -> bool:
    """Give the file `path` the name `second` too, in one move; False where the file system has no hard links."""
    temporary = temporary_of(second)
    try:
        if second.exists() and path.samefile(second):
            return True  # a rename of a file onto itself does nothing, so it would leave `temporary` there
        if os.path.lexists(temporary):
            temporary.unlink()  # of a killed process with our number
        os.link(path, temporary)
    except OSError:
        return False
    os.replace(temporary, second)
    return True


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a UTF-8 text."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: object) -> None:
    """`write_atomic` of `data` as indented JSON, keys in the order given; see `json_text`."""
    write_text(path, json_text(data, indent=2) + "\n")


def json_text(data: Any, indent: int | None = None) -> str:
    """`data` as strict JSON that any terminal can show, with null for NaN and infinities.

    Letters of all scripts stay. Control characters, text-direction marks, and the lone surrogates of a file name that
    is no UTF-8 become escapes, which a reader turns back.
    """
    text = json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    if os.name != "posix":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
