"""The cache folder, and its entries: files that every run may read, made once under a lock and never by two runs.

The folder is ours by its marker, see `system/ours.py`. An entry appears under its name only when it is whole: it is
written under a name with the marker's id and then renamed, by the process that holds the entry's lock. A header inside
says that a run wrote it. Nothing removes an entry but `finetune cache clear`, a run that finds it damaged, and people;
nothing removes what has no such header.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.system.files import write_json
from finetune.system.limits import in_bytes
from finetune.system.locks import file_lock
from finetune.system.ours import MARKER, FolderKind, Marker, RefusedError, claim, look, read_marker
from finetune.system.reading import DamagedError, read_json
from finetune.system.signals import at_once

logger = logging.getLogger("finetune")

GIB = 2**30
# What an entry in the folder of each kind is called, and the files that it holds beside its header (a shard is itself a
# file, and its header lies beside it).
NAMES = {
    "pixels": r"[0-9a-f]{32}",  # decoded images, see pixel_cache.py
    "activations": r"[0-9a-f]{32}-\w+-[0-9a-f]{32}-\d+",  # output of the frozen layers, see prefix/store.py
    "shards": r"[0-9a-f]{16}-.+",  # downloaded, see sources/remote_shards.py
}
FILES = {"pixels": {"pixels.u8", "index.npy"}, "activations": {"activations", "meta.json"}}
HEADER, MAX_HEADER_BYTES = "entry.json", 4096
FOLDER = "finetune-cache"


@dataclass(frozen=True)
class Header:
    """The content of an entry's header."""

    kind: str  # a key of NAMES
    cache: str  # the id in the marker of the cache folder


@dataclass(frozen=True)
class CacheEntry:
    """One entry of the cache folder; `kind` is a key of NAMES."""

    kind: str
    path: Path  # its folder, or the file of a shard
    num_bytes: int
    used: float  # when a run last opened it, seconds since 1970


def cache_folder(cache_dir: str | None) -> Path:
    """The folder `finetune-cache` in `data.cache_dir`, or without one in the folder that XDG's specification gives.

    A `data.cache_dir` that is such a folder itself, by its marker, is returned as it is.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path in XDG_CACHE_HOME is to be ignored.
    default = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    base = Path(cache_dir).expanduser() if cache_dir else default
    return base if os.path.lexists(base / MARKER) else base / FOLDER


def claim_cache(cache: Path) -> Marker:
    """The marker of the cache folder, which is made if it is not there.

    Raises:
        RefusedError: The folder holds files of others with our names.
        OSError: It cannot be made.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return claim(cache, FolderKind.cache)


def known_marker(cache: Path) -> Marker | None:
    """The marker of a cache folder of ours; None where there is none, or a damaged one."""
    with contextlib.suppress(RefusedError, OSError):
        return look(cache, FolderKind.cache)
    return None


def _id_of(entry: Path) -> str:
    marker = read_marker(entry.parent.parent)
    if marker is None:  # somebody removed the cache while a run used it
        raise OSError(f"cannot use {entry.parent}: it is no cache of finetune any more; data.cache_dir names another")
    return marker.id


def lock_of(entry: Path) -> Path:
    """The lock file that a process holds while it makes or removes `entry`."""
    return entry.with_name(f"{entry.name}.{_id_of(entry)}.lock")


@contextlib.contextmanager
def entry_lock(entry: Path, *, timeout_s: float = -1, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock of `entry`, as `file_lock`. What killed processes left of the entry goes first."""
    with file_lock(lock_of(entry), timeout_s=timeout_s, on_wait=on_wait):
        _remove_leftovers(entry)
        yield


def header_of(entry: Path) -> Path:
    """The header of `entry`: in its folder, or beside the file of a shard."""
    return entry.with_name(f"{entry.name}.{_id_of(entry)}.json") if entry.parent.name == "shards" else entry / HEADER


def write_header(entry: Path, path: Path) -> None:
    """Write the header of `entry` to `path`."""
    write_json(path, asdict(Header(entry.parent.name, _id_of(entry))))


def is_own(entry: Path) -> bool:
    """Whether a run wrote the entry at this path, by name, header and files; nobody put anything into it."""
    kind = entry.parent.name
    if kind not in NAMES or not re.fullmatch(NAMES[kind], entry.name) or entry.is_symlink():
        return False
    try:
        header = read_json(header_of(entry), Header, limit=MAX_HEADER_BYTES)
        if header != Header(kind, _id_of(entry)):
            return False
        if kind == "shards":
            return entry.is_file()
        return all(file.is_file(follow_symlinks=False) for file in os.scandir(entry)) and not _foreign(entry, kind)
    except (OSError, DamagedError):  # such as an entry that another process removes
        return False


def _foreign(folder: Path, kind: str) -> list[str]:
    """The names in the folder of an entry that are not ours."""
    temporary = re.compile(rf"\..+\.{_id_of(folder)}-\d+\.tmp")
    return [name for name in os.listdir(folder) if name not in {*FILES[kind], HEADER} and not temporary.fullmatch(name)]


def made_once(entry: Path, make: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
    """Make the folder `entry` unless it exists. One process makes it; others wait, and say so in the log.

    `make` writes the folder that `begin` gives, and renames it. `check` is called while this process waits, and may
    raise. Raises OSError or RefusedError if the folder of entries cannot be used; Interrupted if a signal asks for a
    stop.
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
            claim_cache(entry.parent.parent)
            entry.parent.mkdir(exist_ok=True)
            lock_of(entry).touch()  # the first thing that a folder without the right to write refuses
    except OSError as error:
        problem = f"cannot use {entry.parent}: {error.strerror or error}"
        raise OSError(f"{problem}; data.cache_dir puts caches elsewhere") from error
    if not entry.is_dir():
        with contextlib.ExitStack() as stack:
            with at_once():  # a wait that is broken off loses nothing
                stack.enter_context(entry_lock(entry, on_wait=wait))
            if not entry.is_dir():  # another run may have made it while this one waited
                make()
                assert entry.is_dir(), entry
    mark_used(entry)


def beside(entry: Path) -> Path:
    """Where this process writes `entry` before renaming it, or puts it before removing it."""
    return entry.with_name(f"{entry.name}.{_id_of(entry)}-{os.getpid()}.tmp")


def begin(entry: Path) -> Path:
    """Make the folder `beside(entry)`, with the entry's header in it, and return it."""
    folder = beside(entry)
    folder.mkdir()
    write_header(entry, folder / HEADER)
    return folder


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
    """Every finished entry in the cache folder, the one that was used last first; raises as `look`."""
    if look(cache, FolderKind.cache) is None:
        return []
    found = []
    for path in cache.glob("*/*"):
        if is_own(path):
            with contextlib.suppress(OSError):  # another process removes it
                status = path.stat()
                is_shard = path.parent.name == "shards"
                used = max(status.st_mtime, status.st_atime) if is_shard else status.st_mtime
                size = status.st_size if is_shard else size_of(path)
                found.append(CacheEntry(path.parent.name, path, size, used))
    return sorted(found, key=lambda entry: -entry.used)


def size_line(cache: Path) -> str | None:
    """How large the cache is and how to empty it, for the start of a run; None where there is no entry."""
    if known_marker(cache) is None:
        return None
    sizes = {kind: size_of(cache / kind) for kind in NAMES}
    if not any(sizes.values()):
        return None
    parts = ", ".join(f"{in_bytes(size)} of {kind}" for kind, size in sizes.items() if size)
    return f"{cache} holds {parts}; `finetune cache` lists them and `finetune cache clear` removes them"


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry and its lock file; False where another run is making or removing it, or the folder refuses."""
    try:
        with entry_lock(entry.path, timeout_s=0):
            drop(entry.path)
            with contextlib.suppress(OSError):  # Windows removes no open file
                lock_of(entry.path).unlink()
    except OSError:  # a TimeoutError is one
        return False
    return True


def drop(entry: Path) -> None:
    """Remove an entry of ours, in one move; only for the process that holds its lock.

    Runs that have opened its files go on, and none ever finds half an entry.

    Raises:
        OSError: No run wrote it, somebody put files into it, or the folder refuses.
    """
    refuse_foreign(entry)
    if entry.parent.name == "shards":
        entry.unlink()
        header_of(entry).unlink()
        return
    gone = beside(entry)
    os.rename(entry, gone)
    _remove_folder(gone, entry.parent.name)


def refuse_foreign(entry: Path) -> None:
    """Raise an OSError where no run wrote all of what lies at the place of an entry, so that it may not be removed."""
    if not is_own(entry):
        raise OSError(f"{entry} is in the way, and finetune did not write all of it: move it elsewhere")


def remove_abandoned(cache: Path, kind: str) -> None:
    """Remove half-made entries that killed processes left; those whose lock is held are still being made."""
    marker = look(cache, FolderKind.cache)
    if marker is None or not (cache / kind).is_dir():
        return
    ours = rf"(?:\.{marker.id}\.json)?\.{marker.id}-\d+\.tmp|\.{marker.id}\.(?:json|lock)"
    for left in sorted((cache / kind).iterdir()):
        found = re.fullmatch(rf"\.?([^.].*?)({ours})", left.name)
        entry = left.with_name(found[1]) if found else left
        if found and (found[2].endswith(".tmp") or not entry.exists()):
            with contextlib.suppress(OSError), entry_lock(entry, timeout_s=0):
                if not entry.exists():
                    for path in (header_of(entry), lock_of(entry)):
                        path.unlink(missing_ok=True)


def _remove_leftovers(entry: Path) -> None:
    """Remove what killed processes left of `entry`; only for the process that holds its lock.

    It lies beside the entry: what was to become the entry or, with a dot before it, a file at its place or its header.
    """
    ident = _id_of(entry)
    name = re.compile(rf"\.?{re.escape(entry.name)}(\.{ident}\.json)?\.{ident}-\d+\.tmp")
    for left in [path for path in entry.parent.iterdir() if name.fullmatch(path.name)]:
        if left.is_symlink() or not left.is_dir():
            left.unlink()
        elif entry.parent.name in FILES:
            _remove_folder(left, entry.parent.name)


def _remove_folder(folder: Path, kind: str) -> None:
    """Remove our files in a folder that no run looks into any more, and the folder, unless other files are in it."""
    foreign = _foreign(folder, kind)
    with contextlib.suppress(OSError):
        for name in set(os.listdir(folder)) - set(foreign):
            (folder / name).unlink()
        folder.rmdir()
