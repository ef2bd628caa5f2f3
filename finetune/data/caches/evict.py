"""Caches of bounded size: each entry is a folder, made once, held while it is used, removed when it is the oldest.

An entry `KEY` (no dot in its name) lies beside `KEY.lock`, which whoever makes or removes it has alone. `KEY/.used` is
a lock that all who use the entry share, for as long as they do. `KEY.*.tmp` is an entry that is being made or removed,
or what a killed process left of one. The time of the folder is when it was last used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from finetune.data.checks.verdicts import locked
from finetune.system.signals import at_once

LOCKS: Any = None  # Windows has none: nobody can tell who uses what, so nothing is removed
with contextlib.suppress(ImportError):
    import fcntl

    LOCKS = fcntl

logger = logging.getLogger("finetune")

USED = ".used"
WAIT_S = 0.1  # between two looks at whether another run is done


class Held:
    """An entry that no process removes while this object lives, or a forked child of this process."""

    def __init__(self, file: IO[bytes] | None) -> None:
        """Keep `file`, whose lock is shared; None where the file system knows no locks."""
        self._file = file

    def release(self) -> None:
        """Let go of the entry here; forked children keep it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def lock_of(entry: Path) -> Path:
    """The lock file of an entry, or of its `.tmp`."""
    return entry.with_name(f"{entry.name.partition('.')[0]}.lock")


def made_once(entry: Path, make: Callable[[], None], check: Callable[[], None] = lambda: None) -> Held:
    """The entry for use: made now where it is not there, by one process while the others wait, and say so.

    Args:
        entry: A folder, there only when it is whole.
        make: Makes it, beside its place as `KEY.*.tmp`, and renames it.
        check: Called while waiting; what it raises ends the wait.

    Raises:
        OSError: The folder of entries cannot be made, written or read.
        Interrupted: A signal asked for a stop during the wait.
    """
    told = False

    def wait() -> None:
        nonlocal told
        if not told:
            logger.info("another run is making %s: waiting for it", entry)
            told = True
        check()  # for a signal that came ahead of `at_once`
        time.sleep(WAIT_S)

    try:
        held = hold(entry)
        if held is None:
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock_of(entry).touch()  # the first thing that a folder without the right to write refuses
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot use {entry.parent}: {reason}; data.cache_dir puts caches elsewhere") from error
    while held is None:
        with contextlib.ExitStack() as stack:
            with at_once():  # a wait that is broken off loses nothing
                stack.enter_context(locked(lock_of(entry), poll=wait))
            if not entry.is_dir():  # another run may have made it while this one waited
                remove_left(entry)
                make()
                assert entry.is_dir(), entry
        held = hold(entry)
    return held


def hold(entry: Path) -> Held | None:
    """Keep others from removing `entry`, and note that it is used now; None where it is not there."""
    if not os.path.isdir(entry):  # nor where it may not be looked at
        return None
    try:
        file = _shared(entry / USED)
    except FileNotFoundError:  # removed since the line above
        return None
    if file is not None and not _is_still(file, entry / USED):  # it was removed just now
        file.close()
        return None
    with contextlib.suppress(OSError):  # somebody else's folder: then it is as old as it looks
        os.utime(entry)
    return Held(file)


def _shared(path: Path) -> IO[bytes] | None:
    """The file, its lock shared; None where that cannot be had: then nobody else can tell that it is used, either.

    Raises:
        FileNotFoundError: Its folder is gone.
    """
    if LOCKS is None:
        return None
    for mode in ("ab", "rb"):
        try:
            file = open(path, mode)  # noqa: SIM115 (it lives as long as the entry is used)
        except FileNotFoundError:
            if mode == "ab":  # which would have made it
                raise
            continue
        except OSError:  # somebody else's folder
            continue
        try:
            LOCKS.flock(file, LOCKS.LOCK_SH)
        except OSError:
            file.close()
            continue
        return file
    return None


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_left(entry: Path) -> None:
    """Clear away what killed processes left of `entry`; only for who has its lock.

    Where there are no locks nothing is cleared away: what looks left may be what another run is making.
    """
    if LOCKS is None:
        return
    for left in entry.parent.glob(f"{entry.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def evict(folder: Path, keep: Path, limit_bytes: int) -> list[Path]:
    """Remove least recently used entries of `folder` until the rest fits; what is in use stays, whatever its size.

    What killed processes left half made goes first, and is not waited for. Where the system has no locks (Windows)
    nothing is removed.

    Args:
        folder: Of entries; nothing happens where it does not exist.
        keep: An entry that stays, there or not.
        limit_bytes: For all finished entries together, `keep` among them.

    Returns:
        The entries that were removed.
    """
    if LOCKS is None or not folder.is_dir():
        return []
    for left in folder.glob("*.tmp"):
        with _alone(lock_of(left)) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    entries = sorted(_entries(folder))
    total = sum(size for _, _, size in entries)
    removed: list[Path] = []
    for _, entry, size in entries:
        if total <= limit_bytes:
            break
        if entry != keep and _remove(entry):
            removed.append(entry)
            total -= size
    for entry in removed:
        logger.info("removed %s: least recently used, and the limit is %.1f GiB", entry, limit_bytes / 2**30)
    return removed


def bound(entry: Path, limit_gib: float, *, holds: str, mend: str) -> None:
    """Keep all entries beside `entry`, which stays, under a limit; where too much of it is in use, say so.

    Args:
        entry: Is there.
        limit_gib: Of all of them.
        holds: What they are, in words.
        mend: What to do about too many.
    """
    evict(entry.parent, entry, int(limit_gib * 2**30))
    total = held_bytes(entry.parent)
    if total > int(limit_gib * 2**30):
        why = " that are all in use"
        if LOCKS is None:
            why = ", of which none is removed because this system has no locks that tell which are in use"
        logger.warning(
            "%s holds %.2f GiB of %s%s, more than %.4g: %s", entry.parent, total / 2**30, holds, why, limit_gib, mend
        )


def held_bytes(folder: Path) -> int:
    """Bytes of all finished entries of `folder`."""
    return sum(size for _, _, size in _entries(folder))


def _entries(folder: Path) -> Iterator[tuple[int, Path, int]]:
    """(when it was used, in ns, its folder, its bytes) of every finished entry."""
    for entry in folder.iterdir():
        if entry.suffix or entry.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process removes it, or no entry
            files = [path.stat().st_size for path in entry.rglob("*") if path.is_file()]
            if entry.is_dir():
                yield entry.stat().st_mtime_ns, entry, sum(files)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has or shares the lock; true until the end."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "ab"))
            LOCKS.flock(file, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
        except OSError:  # held, or somebody else's folder
            yield False
            return
        yield True


def _remove(entry: Path) -> bool:
    """Whether the entry could be taken away: in one move, since nobody may find half of it."""
    with _alone(lock_of(entry)) as not_made, _alone(entry / USED) as not_used:
        if not (not_made and not_used):
            return False
        gone = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
        try:
            os.rename(entry, gone)
        except OSError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True
