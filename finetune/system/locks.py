"""Locks between processes, by `filelock`: one process a run directory, one writer a cache entry.

The operating system holds each lock and frees it when its process dies, also by SIGKILL. Forked children, such as data
workers, do not share a lock of their parent. A file system that knows no locks costs a warning: the work goes on
without the lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from finetune.system.errors import UserError
from finetune.system.files import write_text

logger = logging.getLogger("finetune")

RUN_LOCK = ".lock"
# Says which process holds the run lock. In a file of its own: Windows lets nobody read a file that is locked.
RUN_LOCK_HOLDER = ".lock.json"
# `holder` takes a run lock for an instant, to see whether it is free. A start waits this long, so that a report on
# the folder in that instant does not refuse it.
PATIENCE_S = 0.5
POLL_S = 0.1
# Errors of file systems that have no locks (some network ones).
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class InUseError(UserError):
    """Another process works in the run directory."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory's lock; `since` is an ISO time with its time zone."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        """`process 12 on a.example, since 2026-01-31T12:00:00+00:00`."""
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[Holder | None]:
    """Hold the lock of a run directory; no other process works there meanwhile.

    Yields:
        The process that held the lock before and died without giving it back; None where there is none.

    Raises:
        InUseError: Another process holds the lock.
        OSError: The folder cannot be written.
    """
    record = run_dir / RUN_LOCK_HOLDER
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(run_dir / RUN_LOCK, timeout_s=PATIENCE_S))
        except TimeoutError:
            raise InUseError(_in_use(run_dir, _read(record))) from None
        dead = _read(record)
        own = Holder(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds"))
        write_text(record, json.dumps(asdict(own)))
        try:
            yield dead
        finally:
            # Before the lock is given back: after it these may be another process's files.
            for path in (record, run_dir / RUN_LOCK):
                with contextlib.suppress(OSError):
                    path.unlink()


def _in_use(run_dir: Path, found: Holder | None) -> str:
    if found is None:  # that process has taken the lock just now and not written its record yet
        return f"{run_dir} is being worked in by another process; nothing was changed: wait for it"
    stop = f"kill {found.pid}" if found.host == socket.gethostname() else f"kill {found.pid} on {found.host}"
    return f"{run_dir} is being worked in by {found}; nothing was changed: wait for it, or stop it first ({stop})"


def holder(run_dir: Path) -> Holder | None:
    """The living process that holds the lock of `run_dir`; None where no process does, or where nobody can tell."""
    found = _read(run_dir / RUN_LOCK_HOLDER)
    if found is None or not (run_dir / RUN_LOCK).exists():
        return None
    try:
        with _lock(run_dir / RUN_LOCK).acquire(timeout=0):
            return None
    except (Timeout, PermissionError):  # a folder of another user's: its record is the best that there is
        return found
    except OSError:
        return None


def _read(path: Path) -> Holder | None:
    """The record of a holder; None where there is none, or where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(found["host"]), int(found["pid"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def file_lock(
    path: Path, *, timeout_s: float = math.inf, on_wait: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock file `path`; only one process holds it at a time. The file is made and stays.

    Args:
        path: The lock file; its folder exists.
        timeout_s: Wait this long for another process, in seconds.
        on_wait: Called between two tries, about ten times a second. An error that it raises ends the wait.

    Raises:
        TimeoutError: Another process held the lock all the time.
        OSError: The file cannot be made.
    """
    lock = _lock(path)
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock.acquire(timeout=0))
                break
            except Timeout:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                logger.warning("%s: this file system has no locks, so start nothing else here meanwhile", path)
                break
            on_wait()
            time.sleep(POLL_S)
        yield


def _lock(path: Path) -> FileLock:
    # `fallback_to_soft` would take the mere presence of the file for a lock: one that a killed process never frees.
    return FileLock(path, fallback_to_soft=False)
