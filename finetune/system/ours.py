"""Which files are ours: their names in each kind of folder, and the marker that makes a folder ours.

A command writes only into a folder with a marker of its kind, `.finetune.json`. It puts the marker into a folder that
has none, and refuses to do so where a file has one of our names: that file is somebody else's. Files with other names
never matter. A folder with a marker may come from elsewhere, so no link in it is followed.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

import finetune
from finetune.system.errors import UserError, naming
from finetune.system.reading import DamagedError, read_json

MARKER, FORMAT = ".finetune.json", 1
MAX_BYTES = 4096  # of a marker; a larger file is none
SHOWN = 8  # names in a message
COPIED = f"if it is a copy of one of yours, copy the hidden file {MARKER} too"  # `cp -r FOLDER/*` leaves it out
# Windows has neither; links are rare there, and no FIFO lies in a folder.
_SAFE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if sys.platform != "win32" else 0
_ID = "[0-9a-f]{16}"
# What `temporary_folder` adds to the name of a file, and the file in it that a library writes.
PARTS, WHOLE = ".parts", "whole"
HELD: dict[str, str] = {}  # absolute paths of the folders whose lock this process holds -> the ids of their markers


class RefusedError(UserError):
    """A folder is not ours, or holds another run. Nothing there was changed, nor is the failure recorded there."""


class FolderKind(str, Enum):
    """What a folder of ours holds."""

    run = "run"
    sweep = "sweep"
    check = "check"
    cache = "cache"
    table = "table"
    sorted = "sorted"
    export = "export"

    def __str__(self) -> str:
        """The word itself."""
        return str(self.value)


@dataclass(frozen=True)
class OwnNames:
    """The names that are ours in a folder. The value of `folders` has those inside a subfolder."""

    replaced: tuple[str, ...] = ()  # files that are written beside their place and renamed
    in_place: tuple[str, ...] = ()  # files that are written where they are, such as logs
    pattern: str = r"(?!)"  # a regular expression for more names of the first sort; this one matches nothing
    folders: Mapping[str, "OwnNames"] = field(default_factory=dict)

    def has_name(self, name: str) -> bool:
        """Whether `name` is that of a file or folder of ours here."""
        return name in (*self.replaced, *self.in_place, *self.folders) or self.has_pattern(name)

    def has_pattern(self, name: str) -> bool:
        """Whether `name` fits `pattern`."""
        return re.fullmatch(self.pattern, name) is not None


LOCK, LOCK_HOLDER = ".lock", ".lock.json"
OWN: dict[FolderKind, OwnNames] = {
    FolderKind.run: OwnNames(
        replaced=(
            *("config.yaml", "result.json", "rates.json", "metrics.json", LOCK_HOLDER, "unreadable.txt"),
            *("duplicates.txt", "confusion.csv", "confusion_val.csv", "confusion.png", "lr.png", "curves.png"),
        ),
        in_place=("run.log", "history.jsonl", "skipped.txt", LOCK),
        folders={
            "checkpoints": OwnNames(
                replaced=("last.pt", "previous.pt", "damaged.pt", "best.safetensors", "last.safetensors"),
                pattern=r"epoch_\d{4,}\.safetensors",
            ),
            "bad_batch": OwnNames(pattern=r"step_\d+\.(pt|json)"),
        },
    ),
    # Its jobs are runs in folders of their own. Hydra writes the last file.
    FolderKind.sweep: OwnNames(
        replaced=("summary.csv", "sweep.png", LOCK_HOLDER), in_place=("jobs.jsonl", "multirun.yaml", LOCK)
    ),
    FolderKind.check: OwnNames(
        replaced=("data.txt", "contact_sheet.png", "unreadable.txt", "duplicates.txt", "similar.txt", LOCK_HOLDER),
        in_place=(LOCK,),
    ),
    FolderKind.table: OwnNames(pattern=r"part-\d{5,}\.parquet"),
    # Each class has a subfolder, whose files are named after a person's images: so no name in it is ours.
    FolderKind.sorted: OwnNames(),
    # It has the marker while it is being written under a name of our own; another library's files lie there.
    FolderKind.export: OwnNames(),
    # Every entry in these has a header, see data/caches/entries.py.
    FolderKind.cache: OwnNames(folders=dict.fromkeys(("pixels", "activations", "shards", "checks"), OwnNames())),
}


@dataclass(frozen=True)
class Marker:
    """The content of `.finetune.json`."""

    kind: FolderKind
    format: int  # of the names above
    finetune: str  # the version that made the folder
    id: Annotated[str, Meta(pattern=f"^{_ID}$")]  # drawn for this folder; its temporary files carry it


def claim(folder: Path, kind: FolderKind) -> Marker:
    """Make the existing folder ours, or find that it is; its marker. Writes nothing where it raises.

    What broken off claims left in it goes.

    Raises:
        RefusedError: As `look`.
        OSError: The folder cannot be written.
    """
    while (found := look(folder, kind)) is None:
        marker = Marker(kind, FORMAT, finetune.__version__, secrets.token_hex(8))
        try:
            _write_marker(folder / MARKER, marker)
        except (FileExistsError, FileNotFoundError):
            # Another process claimed the folder at the same moment, and perhaps swept our temporary file: look again.
            if not folder.is_dir():
                raise
    _sweep_claims(folder)
    return found


def look(folder: Path, kind: FolderKind) -> Marker | None:
    """The marker of a folder of ours; None where `claim` would put one. Writes nothing.

    Raises:
        RefusedError: The folder is of another kind, or has files with our names and no marker, or a marker and links,
            FIFOs or folders in the place of our files.
    """
    marker = read_marker(folder)
    if marker is None:
        found = [path.relative_to(folder).as_posix() for path, _ in _existing(folder, OWN[kind])]
        if found:
            raise RefusedError(
                f"{folder} has {_listed(found)} but no {MARKER}, so finetune did not make it; nothing was changed:"
                f" choose another folder for the {kind}, or move what is there elsewhere; {COPIED}"
            )
        return None
    if marker.kind != kind:
        raise RefusedError(f"{folder} holds a {marker.kind} ({MARKER}); nothing was changed: a {kind} needs another")
    for path, sort in _existing(folder, OWN[kind]):
        refuse_unless(sort, path)
    return marker


def read_marker(folder: Path) -> Marker | None:
    """The marker in a folder, None where there is none; a RefusedError where it is damaged, or other than in `HELD`."""
    path = folder / MARKER
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, Marker, limit=MAX_BYTES, mend=f"without it nobody knows whose {folder} is")
    except DamagedError as error:
        raise RefusedError(f"{error}; nothing was changed: choose another folder") from None
    if found.format != FORMAT:
        made = f"finetune {found.finetune} made {folder}, in format {found.format}"
        raise RefusedError(f"{made}; this version knows format {FORMAT}: choose another folder")
    if HELD.get(os.path.abspath(folder), found.id) != found.id:
        raise RefusedError(f"{folder} was moved during the work in it; the one that is there now was not changed")
    return found


def _write_marker(path: Path, marker: Marker) -> None:
    """Put the marker at `path`, whole at once; a FileExistsError if there is one already."""
    temporary = path.with_name(f".{path.name}.{marker.id}-{os.getpid()}.tmp")
    # The id first, so that the beginning of a text that was cut tells whose it was.
    text = json.dumps({"id": marker.id, **asdict(marker)}) + "\n"
    try:
        _write_new(temporary, text)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT):
                raise
            _write_new(path, text)  # a file system without hard links
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _write_new(path: Path, text: str) -> None:
    with naming(path), open(path, "x", encoding="utf-8", opener=_open_safely) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _existing(folder: Path, own: OwnNames) -> Iterator[tuple[Path, str]]:
    """Every path with one of our names, be it a file, a link or anything; and its sort, see `refuse_unless`."""
    plain = {**dict.fromkeys(own.replaced, "replaced"), **dict.fromkeys(own.in_place, "in place")}
    for name, sort in {**plain, **dict.fromkeys(own.folders, "folder")}.items():
        if os.path.lexists(folder / name):
            yield folder / name, sort
    if folder.is_dir():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if own.has_pattern(entry.name):
                yield folder / entry.name, "replaced"
    for name, inside in own.folders.items():
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            yield from _existing(folder / name, inside)


def own_files(folder: Path, kind: FolderKind) -> list[Path]:
    """Every existing file with one of our names, also in subfolders; `look` has found no links among them."""
    return [path for path, sort in _existing(folder, OWN[kind]) if sort != "folder"]


def refuse_links(top: Path, folder: Path) -> None:
    """Raise a RefusedError if a folder below `top` on the way to `folder` is a symbolic link, which leads elsewhere."""
    above = [part for part in (folder, *folder.parents) if part.absolute().is_relative_to(top.absolute())]
    for part in above:
        if part.absolute() != top.absolute():
            refuse_unless("folder", part)


def refuse_unless(sort: str, path: Path) -> None:
    """Raise a RefusedError unless `path` is missing, or is what we make there: a file, or where `sort` says a folder.

    A file that is written `in place` must have no second name, since that name may be of somebody else's file.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    is_right = stat.S_ISDIR(status.st_mode) if sort == "folder" else stat.S_ISREG(status.st_mode)
    if is_right and (sort != "in place" or status.st_nlink == 1):
        return
    found = "a hard link, a second name of a file" if is_right else _type_name(status.st_mode)
    wanted = "a folder" if sort == "folder" else "a file of its own"
    mend = "put a copy in its place (cp X Y; mv Y X)" if is_right else "remove or move it"
    raise RefusedError(f"{path} is {found}, expected {wanted}; nothing was changed: {mend}")


def _type_name(mode: int) -> str:
    names = {stat.S_ISLNK: "a symbolic link", stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO"}
    names |= {stat.S_ISSOCK: "a socket", stat.S_ISREG: "a file"}
    return next((name for is_so, name in names.items() if is_so(mode)), "a device")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def open_own(path: Path, mode: str, **kwargs: Any) -> Any:
    """`open` for a file of ours that is written in place: it follows no link, and never waits for a FIFO's reader.

    Raises:
        RefusedError: Something else than a file with one name is there, or the folder is another's by now.
    """
    _marker_above(path.parent)

    def opener(name: str, flags: int) -> int:
        handle = _open_safely(name, flags & ~os.O_TRUNC)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(handle)
            refuse_unless("in place", path)
            raise RefusedError(f"{path} was exchanged while it was opened; nothing was written: try again")
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
        return handle

    try:
        return open(path, mode, opener=opener, **kwargs)
    except OSError:
        refuse_unless("in place", path)
        raise


def _open_safely(name: str, flags: int) -> int:
    return os.open(name, flags | _SAFE_FLAGS, 0o666)


def temporary_of(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`: `.name.<id>-<process>.tmp`.

    The id is that of the marker in the file's folder, or in one of the two above. Elsewhere it is drawn anew each time.
    """
    marker = _marker_above(path.parent)
    return path.with_name(f".{path.name}.{marker.id if marker else secrets.token_hex(8)}-{os.getpid()}.tmp")


def _marker_above(folder: Path) -> Marker | None:
    """The marker of the folder of ours that `folder` belongs to; an entry of a cache lies two levels below it."""
    near = [folder, *folder.absolute().parents[:2]]
    return next((marker for place in near if (marker := read_marker(place)) is not None), None)


def create_temporary(path: Path) -> Path:
    """Make the empty file `temporary_of(path)`. What a killed process with our number left under that name goes."""
    temporary, flags = temporary_of(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        handle = _open_safely(str(temporary), flags)
    except FileExistsError:
        temporary.unlink()  # a link goes itself, and not what it names
        handle = _open_safely(str(temporary), flags)
    os.close(handle)
    return temporary


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder for a library that writes the file `path`, and gives names to temporary files of its own.

    A kill leaves these inside, where `sweep_temporaries` finds them. The library writes `WHOLE`; move it away.
    """
    folder = temporary_of(path.with_name(path.name + PARTS))
    _remove_parts(folder)  # of a killed process with our number
    folder.mkdir()
    try:
        yield folder
    finally:
        _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    """Remove such a folder and what libraries write there; it stays if somebody put something else into it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if re.fullmatch(rf"{WHOLE}|\.tmp\w+", path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def sweep_temporaries(folder: Path, kind: FolderKind) -> None:
    """Remove the temporary files that killed processes left in a folder of ours and in its subfolders of our names.

    The caller holds the folder's lock. Those with another id are somebody else's.
    """
    marker = read_marker(folder)
    if marker is None:
        return
    for place in (folder, *_own_folders(folder, OWN[kind])):
        for path, name, ident in temporaries(place):
            if ident != marker.id:
                continue
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif name.endswith(PARTS):
                _remove_parts(path)


def _own_folders(folder: Path, own: OwnNames) -> list[Path]:
    """The existing subfolders with our names, and theirs; no links."""
    found = [(folder / name, inside) for name, inside in own.folders.items()]
    found = [(path, inside) for path, inside in found if path.is_dir() and not path.is_symlink()]
    return [path for top, inside in found for path in (top, *_own_folders(top, inside))]


def _sweep_claims(folder: Path) -> None:
    """Remove the markers that killed processes had not put into their place yet; `folder` has one by now.

    This takes no lock: a living process that loses its file here finds the other's marker.
    """
    for path, name, ident in temporaries(folder):
        with contextlib.suppress(OSError):  # another process took its file away, or it is another user's
            if name == MARKER and _begins_marker(path, ident):
                path.unlink()


def temporaries(folder: Path) -> list[tuple[Path, str, str]]:
    """All that is named as a temporary file of ours: its path, the name that it was to get, the id in its name."""
    found = [(path, re.fullmatch(rf"\.(.+)\.({_ID})-\d+\.tmp", path.name)) for path in folder.iterdir()]
    return [(path, parts[1], parts[2]) for path, parts in found if parts is not None]


def _begins_marker(path: Path, ident: str) -> bool:
    """Whether a file holds a marker with this id, or the beginning of one, perhaps nothing."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    text, beginning = path.read_text(encoding="utf-8", errors="replace"), _beginning(ident)
    return text.startswith(beginning) or beginning.startswith(text)


def _beginning(ident: str) -> str:
    """How the text of the marker with this id begins."""
    return f'{{"id": "{ident}"'
