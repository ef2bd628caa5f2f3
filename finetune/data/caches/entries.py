"""The cache folder, and its entries: files that every run may read, made once under a lock and never by two runs.

An entry appears under its name only when it is whole: it is written as `<key>.<process>.tmp` and then renamed, by the
process that holds `<key>.lock`. Nothing removes an entry but `finetune cache clear` and people.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.system.limits import in_bytes
from finetune.system.locks import file_lock
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

GIB = 2**30
# What an entry in the folder of each kind is called, and the only files that it holds (a shard is itself a file).
# Whatever looks different is not ours and is never removed.
NAMES = {
    "pixels": r"[0-9a-f]{32}",  # decoded images, see pixel_cache.py
    "activations": r"[0-9a-f]{32}-\w+-[0-9a-f]{32}-\d+",  # output of the frozen layers, see prefix/store.py
    "shards": r"[0-9a-f]{16}-.+(?<!\.lock)(?<!\.part)(?<!\.tmp)",  # downloaded, see sources/remote_shards.py
}
FILES = {"pixels": {"pixels.u8", "index.npy"}, "activations": {"activations", "meta.json"}}


@dataclass(frozen=True)
class CacheEntry:
    """One entry of the cache folder; `kind` is a key of NAMES."""

    kind: str
    path: Path  # its folder, or the file of a shard
    num_bytes: int
    used: float  # when a run last opened it, seconds since 1970


def cache_folder(cache_dir: str | None) -> Path:
    """Return `data.cache_dir`, or without one the `finetune` folder that the XDG base directory specification gives."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path in XDG_CACHE_HOME is to be ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "finetune"


def lock_of(entry: Path) -> Path:
    """The lock file that a process holds while it makes or removes `entry`."""
    return entry.with_name(f"{entry.name}.lock")


def made_once(entry: Path, make: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
    """Make the folder `entry` unless it exists. One process makes it; others wait, and say so in the log.

    `make` writes the folder `beside(entry)` and renames it. `check` is called while this process waits, and may raise.
    Raises OSError if the folder of entries cannot be used; Interrupted if a signal asks for a stop.
    """
    told = False

    def wait() -> None:
        nonlocal told
        if not told:
            logger.info("another run is making %s: waiting for it", entry)
            told = True
        check()  # for a signal that came before `at_once` below

    try:
        if not entry.is_dir():
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock_of(entry).touch()  # the first thing that a folder without the right to write refuses
    except OSError as error:
        problem = f"cannot use {entry.parent}: {error.strerror or error}"
        raise OSError(f"{problem}; data.cache_dir puts caches elsewhere") from error
    if not entry.is_dir():
        with contextlib.ExitStack() as stack:
            with at_once():  # a wait that is broken off loses nothing
                stack.enter_context(file_lock(lock_of(entry), on_wait=wait))
            if not entry.is_dir():  # another run may have made it while this one waited
                _remove_leftovers(entry)
                make()
                assert entry.is_dir(), entry
    mark_used(entry)


def beside(entry: Path) -> Path:
    """Where this process writes `entry` before renaming it, or puts it before removing it."""
    return entry.with_name(f"{entry.name}.{os.getpid()}.tmp")


def mark_used(entry: Path) -> None:
    """Note that a run uses `entry` now: the time of its folder."""
    with contextlib.suppress(OSError):  # the folder may belong to another user
        os.utime(entry)


def size_of(folder: Path) -> int:
    """Bytes of all files in `folder`, those that are being written among them; 0 where it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process renames or removes it
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def find_entries(cache: Path) -> list[CacheEntry]:
    """Every finished entry in the cache folder, the one that was used last first."""
    found = []
    for path in cache.glob("*/*"):
        kind = path.parent.name
        if kind not in NAMES or not re.fullmatch(NAMES[kind], path.name) or path.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process removes it
            status = path.stat()
            if kind == "shards" and path.is_file():
                found.append(CacheEntry(kind, path, status.st_size, max(status.st_mtime, status.st_atime)))
            elif kind != "shards":
                files = {file.name: file.stat().st_size for file in path.iterdir()}
                if files.keys() - {".used"} == FILES[kind]:  # earlier versions put the file `.used` into an entry
                    found.append(CacheEntry(kind, path, sum(files.values()), status.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def size_line(cache: Path) -> str | None:
    """How large the cache is and how to empty it, for the start of a run; None where there is no entry."""
    sizes = {kind: size_of(cache / kind) for kind in NAMES}
    if not any(sizes.values()):
        return None
    parts = ", ".join(f"{in_bytes(size)} of {kind}" for kind, size in sizes.items() if size)
    return f"{cache} holds {parts}; `finetune cache` lists them and `finetune cache clear` removes them"


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry and its lock file; False where another run is making or removing it, or the folder refuses."""
    gone = beside(entry.path)
    try:
        with file_lock(lock_of(entry.path), timeout_s=0):
            if entry.path.is_dir():
                os.rename(entry.path, gone)  # in one move: no run ever finds half an entry, and mapped files stay
                shutil.rmtree(gone)
                _remove_leftovers(entry.path)
            else:
                entry.path.unlink()
            with contextlib.suppress(OSError):  # Windows removes no open file
                lock_of(entry.path).unlink()
    except OSError:  # a TimeoutError is one
        return False
    return True


def remove_abandoned(cache: Path, kind: str) -> None:
    """Remove half-made entries that killed processes left; those whose lock is held are still being made."""
    for left in (cache / kind).glob("*"):
        name = re.sub(r"\.\d+\.tmp$|\.part$", "", left.name)
        if name != left.name and re.fullmatch(NAMES[kind], name):
            with contextlib.suppress(OSError), file_lock(lock_of(left.with_name(name)), timeout_s=0):
                _remove_leftovers(left.with_name(name))
                lock_of(left.with_name(name)).unlink()


def _remove_leftovers(entry: Path) -> None:
    """Remove what killed processes left of `entry`; only for the process that holds its lock."""
    entry.with_name(f"{entry.name}.part").unlink(missing_ok=True)  # of a shard
    for left in entry.parent.glob(f"{entry.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
