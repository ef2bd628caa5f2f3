"""An entry of the cache folder is opened, made if it is missing, and made anew if it is damaged."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetune.data.caches.entries import drop, entry_lock, made_once, mark_used
from finetune.system.reading import DamagedError

logger = logging.getLogger("finetune")

T = TypeVar("T")


def open_entry(
    entry: Path, read: Callable[[], T], make: Callable[[], None], check: Callable[[], None] = lambda: None
) -> tuple[T, bool]:
    """What `read` finds in the folder `entry`, and whether `make` made the folder just now.

    `read` raises DamagedError if something is wrong with a file or a file is missing: then the entry is removed, with
    a warning, and made again. For `make` and `check` see `made_once`.

    Raises:
        OSError: The folder cannot be used, or the disk does not give back what was written.
    """
    was_made = False

    def make_now() -> None:
        nonlocal was_made
        make()
        was_made = True

    while (found := _whole(entry, read)) is None:
        if was_made:
            raise OSError(f"{entry} was written just now and reads otherwise: is the disk sound?")
        made_once(entry, make_now, check)
    mark_used(entry)
    return found, was_made


def _whole(entry: Path, read: Callable[[], T]) -> T | None:
    """What `read` finds, None where there is no entry; a damaged one is removed."""
    if not os.path.isdir(entry):  # False, too, for a folder that may not be looked at
        return None
    try:
        return read()
    except DamagedError:
        with entry_lock(entry):
            try:
                return read()  # another run may have made it anew meanwhile
            except DamagedError as error:
                if entry.is_dir():
                    logger.warning("%s: the entry is made anew", error)
                    _remove(entry)
    return None


def _remove(entry: Path) -> None:
    """Remove a damaged entry; only for the process that holds its lock."""
    try:
        drop(entry)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{entry} is damaged and cannot be removed: {reason}; remove it by hand") from error
