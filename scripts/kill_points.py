"""Every place where a run writes, renames or removes, found while it runs; and runs that are killed at one of them.

`install` wraps the functions by which Python changes files, in a process that was forked for one run. Each call on a
path below a folder is a point: the function, the name of the file with its numbers masked, and the functions of the
package that asked for it. A point may be reached many times. Linux only, since it asks /proc for names of open files.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.font_manager  # noqa: F401 (makes its list of fonts in the person's own cache, before runs get theirs)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "finetune") + os.sep
LIMIT_S = 1800  # for one run; only a run that hangs takes so long
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Functions of `os` -> which argument is the path or handle of what they change.
CHANGES = {
    **{"replace": 1, "rename": 1, "link": 1, "symlink": 1},
    **{"unlink": 0, "remove": 0, "rmdir": 0, "mkdir": 0, "fsync": 0, "truncate": 0, "ftruncate": 0},
    **{"utime": 0, "chmod": 0, "write": 0, "sendfile": 0},
}
# What differs between equal runs in the names of files: ids, process numbers, keys of caches, epochs and steps.
MASKS = ((r"[0-9a-f]{16,}", "ID"), (r"\d+", "N"))
BEFORE, HALF, AFTER = MOMENTS = ("before", "half", "after")


@dataclass(frozen=True)
class Kill:
    """When a process kills itself: before or after a call, or with half of what it writes."""

    point: str
    occurrence: int  # of the point, from 1
    moment: str  # one of MOMENTS

    def __str__(self) -> str:
        """In words."""
        return f"{self.moment} {self.point} ({self.occurrence})"


class Points:
    """Counts the points that this process reaches, and kills it at one of them."""

    def __init__(self, below: Path, kill: Kill | None) -> None:
        """Look at what lies in the folder `below`."""
        self.done: dict[str, list[int]] = {}  # point -> the times when the call came back without an error
        self._below, self._kill = str(below) + os.sep, kill
        self._begun: Counter[str] = Counter()
        self._lock = threading.Lock()

    def path_of(self, target: Any, folder: int | None = None) -> str:
        """The absolute path of a path, or of an open file; of a relative one in the open `folder`."""
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        path = os.fsdecode(target)
        return os.path.join(os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}"), path)

    def reached(self, operation: str, path: str) -> tuple[str, int] | None:
        """The name of a point, now reached, and the how many-th time this is; None for a path elsewhere."""
        if not path.startswith(self._below):
            return None
        name = path[len(self._below) :]
        for pattern, mask in MASKS:
            name = re.sub(pattern, mask, name)
        point = f"{operation} {name} by {_callers()}"
        with self._lock:
            self._begun[point] += 1
            return point, self._begun[point]

    def is_now(self, moment: str, at: tuple[str, int] | None) -> bool:
        """Whether this process has to be killed now."""
        return at is not None and self._kill == Kill(*at, moment)

    @contextmanager
    def around(self, operation: str, path: str) -> Iterator[tuple[str, int] | None]:
        """Around a call that changes `path`."""
        at = self.reached(operation, path)
        if self.is_now(BEFORE, at):
            die()
        yield at
        if at is not None:
            with self._lock:
                self.done.setdefault(at[0], []).append(at[1])
        if self.is_now(AFTER, at):
            die()


def die() -> NoReturn:
    """Kill this process, as nothing in it can notice."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still there")


def _callers() -> str:
    """The function of the package that changes a file, and the one above the room `system` that asked for it."""
    frame, found = sys._getframe(1), []
    while frame is not None:  # type: ignore[redundant-expr]
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            short = name[len(PACKAGE) :]
            found.append(f"{short}:{frame.f_code.co_name}")
            if not short.startswith("system"):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " for ".join(dict.fromkeys((found[0], found[-1]))) if found else "another program"


def install(below: Path, kill: Kill | None) -> Points:
    """Wrap all that changes files, for the rest of this process's life."""
    points = Points(below, kill)
    for name, place in CHANGES.items():
        setattr(os, name, _wrapped(points, name, getattr(os, name), place))
    os.open = _wrapped_os_open(points, os.open)
    builtins.open = io.open = _wrapped_open(points, builtins.open)  # type: ignore[assignment]
    # These write from C++ and Rust; the second is what `safetensors.torch.save_file` calls.
    for module, name, halve in (
        ("torch", "save", lambda path: os.truncate(path, os.path.getsize(path) // 2)),
        # It writes under a name that it draws, and renames the file at the end.
        ("safetensors.torch", "serialize_file", lambda path: os.rename(path, Path(path).with_name(".tmpHalf12"))),
    ):
        home = importlib.import_module(module)
        setattr(home, name, _wrapped(points, f"{module}.{name}", getattr(home, name), 1, halve))
    return points


def make_quick() -> None:
    """Leave out what takes time and changes nothing here: pictures are files without content, no power is cut."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda self, place, **kwargs: Path(place).write_bytes(b"no picture")  # type: ignore[method-assign]
    os.fsync = lambda handle: None


def _wrapped(
    points: Points,
    operation: str,
    function: Callable[..., Any],
    place: int,
    halve: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """A function of which each call is a point; `halve` makes of what it has written what a kill would have left."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("dst_dir_fd" if place else "dir_fd")
        if len(args) <= place or isinstance(args[place], io.IOBase):  # an open file, whose writes are points
            return function(*args, **kwargs)
        with points.around(operation, points.path_of(args[place], folder)) as at:
            result = function(*args, **kwargs)
            if halve is not None and points.is_now(HALF, at):
                halve(args[place])
                die()
            return result

    return wrapped


def _wrapped_os_open(points: Points, function: Callable[..., int]) -> Callable[..., int]:
    def wrapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & WRITES:
            return function(path, flags, *args, **kwargs)
        with points.around("open", points.path_of(path, kwargs.get("dir_fd"))):
            return function(path, flags, *args, **kwargs)

    return wrapped


def _wrapped_open(points: Points, function: Callable[..., Any]) -> Callable[..., Any]:
    class Raw(io.FileIO):
        """An open file whose every write is a point."""

        def write(self, data: Any) -> int:
            path = points.path_of(self.fileno())
            with points.around("write", path) as at:
                if points.is_now(HALF, at):
                    super().write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                    die()
                return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            with points.around("truncate", points.path_of(self.fileno())):
                return super().truncate(size)

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+"):
            return function(file, mode, buffering, encoding, errors, newline, closefd, opener)
        plain = mode.replace("b", "").replace("t", "")
        if opener is None and not isinstance(file, int):
            with points.around("open", points.path_of(file)):
                raw = Raw(file, plain, closefd)
        else:
            raw = Raw(file, plain, closefd, opener)
        if buffering == 0:
            return raw
        buffer: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, io.text_encoding(encoding), errors, newline, buffering == 1)

    return opened


class Process:
    """A forked child that runs one command line of `finetune` in the folder `home`, with the caches in `home/cache`.

    A fork costs no import of torch. The parent must have run nothing with threads. What the child prints is in
    `home/output.txt`; the points that it reached, if it came to an end and they were counted, in `home/points.json`.
    """

    def __init__(self, words: Sequence[str], home: Path, *, kill: Kill | None = None, counts: bool = False) -> None:
        """Start it, in a process group of its own."""
        self.words, self.home = list(words), home
        home.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(self.words, home, kill, counts)

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that killed it, or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        """The same at its end; a process that hangs is killed with its group."""
        deadline = time.monotonic() + LIMIT_S
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        return code

    def output(self) -> str:
        """What it printed last."""
        return (self.home / "output.txt").read_text(encoding="utf-8", errors="replace")[-3000:]

    def points(self) -> dict[str, list[int]]:
        """The times at which it passed each point, counted from 1; calls that failed are left out."""
        found: dict[str, list[int]] = json.loads((self.home / "points.json").read_text(encoding="utf-8"))
        return found


def _child(words: list[str], home: Path, kill: Kill | None, counts: bool) -> NoReturn:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(home)
        handle = os.open(home / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (for the process's life)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        from finetune.__main__ import main

        make_quick()
        points = install(home, kill) if counts or kill else None
        code = main(words)
        if points is not None and counts:
            (home / "points.json").write_text(json.dumps(points.done), encoding="utf-8")
        (home / "modules.json").write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_as(process: Process) -> None:
    """Import what a finished child has imported, so that later children need not."""
    for name in json.loads((process.home / "modules.json").read_text(encoding="utf-8")):
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # made while the child ran
