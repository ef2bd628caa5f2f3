"""One process a run directory: a small file that says who is at work in it, taken over where that process is dead.

Standard library only. The file names the process by its number and the moment it started, so that a number used again
by another program is not mistaken for it. A process on another machine cannot be looked at: its lock is respected, and
a person removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.system.errors import UserError

LOCK_NAME = ".lock"


class HeldError(UserError):
    """Another process is at work in the run directory."""


class Lock:
    """While entered, this process alone works in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        """Nothing is written yet."""
        self.path = run_dir / LOCK_NAME
        self.taken_over = ""  # whose lock was found stale, in words

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            HeldError: A living process holds it, or one on another machine does.
        """
        with _opened_alone(self.path) as handle:
            found = _read(handle)
            if found is not None:
                if not is_stale(found):
                    raise HeldError(_held(self.path, found))
                self.taken_over = f"process {found['pid']} on {found['host']}, since {found['since']}"
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(_own_name()).encode())
            os.fsync(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        with contextlib.suppress(OSError), _opened_alone(self.path) as handle:
            found = _read(handle)
            if found is None or found["pid"] == os.getpid():  # else a person removed ours, and somebody took it
                self.path.unlink()


def holder(run_dir: Path) -> dict[str, Any] | None:
    """Who holds `run_dir`: host, pid, started, since; None where nobody does, or somebody dead."""
    try:
        found = _parse((run_dir / LOCK_NAME).read_bytes())
    except OSError:
        return None
    return None if found is None or is_stale(found) else found


def is_stale(found: dict[str, Any]) -> bool:
    """Whether the holder is known to be dead; one on another machine never is."""
    if found["host"] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # alive, and somebody else's
    state, started = _process(found["pid"])
    return state in ("Z", "X") or (started != "" and found["started"] != "" and started != found["started"])


def _held(path: Path, found: dict[str, Any]) -> str:
    text = f"{path.parent} is being worked in by process {found['pid']} on {found['host']}, since {found['since']}"
    if found["host"] == socket.gethostname():
        return f"{text}; nothing was changed: wait for it, or stop it first (kill {found['pid']})"
    return (
        f"{text}; nothing was changed. Whether a process on another machine is alive cannot be seen from here:"
        f" if it is not, remove {path} and start again"
    )


def _own_name() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _process(os.getpid())[1],
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _process(pid: int) -> tuple[str, str]:
    """(state, start in clock ticks since boot) as Linux tells them; empty elsewhere, or where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name, in brackets, may hold blanks and brackets
    return fields[0], fields[19]


def _read(handle: int) -> dict[str, Any] | None:
    os.lseek(handle, 0, os.SEEK_SET)
    return _parse(os.read(handle, 4096))


def _parse(data: bytes) -> dict[str, Any] | None:
    """The holder; None for a file that a killed process left half written: it had not begun to work."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"host", "pid", "started", "since"} <= found.keys()
    return found if whole and isinstance(found["pid"], int) else None


@contextmanager
def _opened_alone(path: Path) -> Iterator[int]:
    """The file, made if need be, with every other process kept out of this same moment."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _wait_for(handle)
            # Whoever had it before may have removed it: then this is a file that nobody will find again.
            if _is_still(handle, path):
                yield handle
                return
        finally:
            os.close(handle)  # ends the wait of others, too


def _wait_for(handle: int) -> None:
    if os.name != "posix":
        return
    import fcntl

    with contextlib.suppress(OSError):  # a file system without it: then two in the same instant may slip through
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
