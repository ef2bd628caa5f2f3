"""Locks between processes, by `filelock`: one process a run directory, one writer a cache entry.

The operating system frees a lock when its process dies, also by SIGKILL. Forked children, such as data workers, do not
share their parent's lock. On a file system without locks the work goes on without one, after a warning.
"""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from msgspec import Meta

from finetune.system import ours
from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.system.reading import DamagedError, read_json

logger = logging.getLogger("finetune")

RUN_LOCK = ours.LOCK
RUN_LOCK_HOLDER = ours.LOCK_HOLDER  # names the process; a file of its own, as Windows lets nobody read a locked file
# `holder` takes a free lock for an instant. A run that starts in this instant waits so long, and is not refused.
PATIENCE_S = 0.5


class InUseError(UserError):
    """Another process works in the run directory."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory's lock; `since` is an ISO time with its time zone."""

    host: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    since: str

    def __str__(self) -> str:
        """`process 12 on a.example, since 2026-01-31T12:00:00+00:00`."""
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def working_in(folder: Path, kind: ours.FolderKind, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """`run_lock` of a folder of ours; at its begin the temporary files that killed processes left there go."""
    with run_lock(folder, patience_s):
        ours.sweep_temporaries(folder, kind)
        yield


@contextmanager
def run_lock(run_dir: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of a run directory, or of a sweep's or check's folder; no other process works there meanwhile.

    It waits `patience_s` seconds for another process. A folder that takes the place of this one meanwhile, while this
    one was moved, is somebody else's: nothing is written into it, see `ours.HELD`.

    Raises:
        InUseError: Another process holds the lock.
        OSError: The folder cannot be written.
    """
    record = run_dir / RUN_LOCK_HOLDER
    if not run_dir.is_dir():  # the library would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run_dir))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(run_dir / RUN_LOCK, timeout_s=patience_s))
        except TimeoutError:
            found = _read(record)
            stop = f", or stop it first (kill {found.pid})" if found and found.host == socket.gethostname() else ""
            who = found or "another process"
            raise InUseError(f"{run_dir} is being worked in by {who}; nothing was changed: wait for it{stop}") from None
        own = Holder(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds"))
        write_text(record, json.dumps(asdict(own)))
        place, marker = os.path.abspath(run_dir), ours.read_marker(run_dir)
        if marker is not None:
            ours.HELD[place] = marker.id
        try:
            yield
        finally:
            # Before the lock is given back: after that these may be another process's files.
            for path in (record, run_dir / RUN_LOCK):
                with contextlib.suppress(OSError, ours.RefusedError):
                    ours.read_marker(run_dir)
                    path.unlink()
            ours.HELD.pop(place, None)


def holder(run_dir: Path) -> Holder | None:
    """The living process that holds the lock of `run_dir`; None where there is none, or no way to know."""
    found = _read(run_dir / RUN_LOCK_HOLDER)
    if found is None or not (run_dir / RUN_LOCK).exists():
        return None
    try:
        with _lock(run_dir / RUN_LOCK).acquire(timeout=0):
            return None
    except (Timeout, PermissionError):  # in another user's folder, the record alone has to be trusted
        return found
    except OSError:
        return None


def _read(record: Path) -> Holder | None:
    """The process that a record names; None where there is no record, or a damaged one."""
    try:
        return read_json(record, Holder, limit=4096)
    except (FileNotFoundError, DamagedError):
        return None


@contextmanager
def file_lock(path: Path, *, timeout_s: float = -1, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`, which is made and stays; only one process holds it at a time.

    It waits `timeout_s` seconds for another process, -1 without end, and calls `on_wait` about ten times a second; an
    error of `on_wait` ends the wait.

    Raises:
        TimeoutError: Another process held the lock all the time.
        OSError: The file cannot be made.
    """

    def is_cancelled() -> bool:
        on_wait()
        return False

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_lock(path).acquire(timeout_s, poll_interval=0.1, cancel_check=is_cancelled))
        except Timeout:
            raise TimeoutError(f"{path} is locked by another process") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            logger.warning("%s: this file system has no locks, so start nothing else here meanwhile", path)
        yield


def _lock(path: Path) -> FileLock:
    # `fallback_to_soft` would take the presence of the file for a lock, which a killed process never frees.
    return FileLock(path, fallback_to_soft=False)
