"""Files that grow block by block, and are continued after a kill as if there had been none.

While an output is unfinished, a marker lies beside it: `.NAME.finetune.json`. It says which request the output answers,
how many images are done, and size and checksum of each file at that moment. What a killed process wrote beyond is cut
off. A finished output has no marker, so nobody takes it, or somebody else's file, for one that may be continued.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta

import finetune
from finetune.system.errors import naming
from finetune.system.files import sync_folder, write_atomic, write_json
from finetune.system.locks import file_lock
from finetune.system.ours import FolderKind, RefusedError, claim, look, open_own, own_files, refuse_unless, temporaries
from finetune.system.reading import DamagedError, open_regular, read_json
from finetune.system.seals import crc_of
from finetune.system.terminal import printable

FORMAT = 1
MAX_BYTES = 2**16  # of a marker
PATIENCE_S = 0.5  # for the lock of a process that is just ending
_Count = Annotated[int, Meta(ge=0, le=2**53)]


@dataclass
class _Grown:
    """A file that grows: the bytes that count, and their CRC-32 without the first `spare` ones, which may change."""

    size: _Count = 0
    crc: _Count = 0
    spare: _Count = 0


@dataclass
class _Progress:
    """The content of the marker."""

    format: _Count
    finetune: str  # the version
    request: str  # digest of the request
    done: _Count = 0  # images
    failed: _Count = 0  # images that could not be read, of `done`
    rows: _Count = 0
    parts: _Count = 0  # files in the folder, of Parquet
    files: dict[str, _Grown] = field(default_factory=dict)  # by the file's name


class Record:
    """An output that is being written, and how far it is; `open_record` makes it."""

    def __init__(self, out: Path, progress: _Progress) -> None:
        """Take the place of the output."""
        self._out, self._progress = out, progress

    @property
    def done(self) -> int:
        """Images that need no more work."""
        return self._progress.done

    @property
    def failed(self) -> int:
        """How many of them could not be read."""
        return self._progress.failed

    @property
    def rows(self) -> int:
        """Rows that were written."""
        return self._progress.rows

    def append(self, path: Path, data: bytes, *, head: bytes = b"", spare: int = 0) -> None:
        """Write to the end of a file of the output; a new one gets `head` first, of which `spare` bytes may change."""
        grown = self._progress.files.setdefault(path.name, _Grown())
        if not grown.size:
            data, grown.spare = head + data, spare
        with naming(path), open_own(path, "ab" if grown.size else "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        grown.crc = zlib.crc32(data[spare if not grown.size else 0 :], grown.crc)
        grown.size += len(data)

    def size_of(self, path: Path) -> int:
        """The bytes that were written to a file of the output."""
        return self._progress.files[path.name].size

    def replace_head(self, path: Path, head: bytes) -> None:
        """Write other bytes of the same number over the head of a file."""
        with naming(path), open_own(path, "r+b") as file:
            file.write(head)
            file.flush()
            os.fsync(file.fileno())

    def add_part(self, data: bytes) -> None:
        """Write the next file of the output's folder."""
        path = self._out / f"part-{self._progress.parts:05d}.parquet"
        write_atomic(path, lambda temporary: temporary.write_bytes(data))
        self._progress.parts += 1

    def commit(self, done: int, *, rows: int, failed: int) -> None:
        """From now on `done` images need no more work: `rows` and `failed` were added since the last call."""
        self._progress.done = done
        self._progress.rows += rows
        self._progress.failed += failed
        write_json(marker_of(self._out), asdict(self._progress))

    def finish(self) -> None:
        """The output is whole."""
        marker_of(self._out).unlink()
        sync_folder(self._out.parent)


def marker_of(out: Path) -> Path:
    """The file that says how far an unfinished output is."""
    return out.with_name(f".{out.name}.finetune.json")


@contextmanager
def open_record(out: Path, beside: Sequence[Path], request: str, *, overwrite: bool) -> Iterator[Record]:
    """Begin the output `out` with the files `beside` it, or continue it; no other process writes it meanwhile.

    `request` is a digest of everything that the output depends on. An output that ends in `.parquet` is a folder of
    numbered files.

    Raises:
        RefusedError: Something of the name is there that is finished, somebody else's, another request's, or was
            changed; nothing was changed. `overwrite` takes what is there away first.
        FileNotFoundError: There is no such folder.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{printable(str(out))}: the folder {printable(str(out.parent))} does not exist")
    lock = out.with_name(f".{out.name}.finetune.lock")
    refuse_unless("in place", lock)
    if lock.exists() and lock.stat().st_size:
        raise RefusedError(
            f"{printable(str(lock))} is no lock of finetune, since it holds something; move it elsewhere"
        )
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, timeout_s=PATIENCE_S))
        except TimeoutError:
            raise RefusedError(f"{printable(str(out))} is being written by another process; wait for it") from None
        try:
            _sweep(marker_of(out))
            yield Record(out, _begun(out, beside, request, overwrite=overwrite))
        finally:
            with suppress(OSError):  # before the lock is given back: then it may be another process's
                lock.unlink()


def _begun(out: Path, beside: Sequence[Path], request: str, *, overwrite: bool) -> _Progress:
    """The progress of an output that is there, or of a new one."""
    shown, marker = printable(str(out)), marker_of(out)
    there = [path for path in (out, *beside) if os.path.lexists(path)]
    if overwrite:
        for path in there:
            _take_away(path, is_folder=path == out and out.suffix == ".parquet")
        refuse_unless("replaced", marker)
        marker.unlink(missing_ok=True)
    elif os.path.lexists(marker):
        progress = _read(marker)
        if progress.request != request:
            which = "was begun with other images, another model or other options"
            raise RefusedError(f"{shown} is unfinished, and {which}: repeat that command, or add --overwrite")
        for path in (out, *beside):
            _cut(path, progress)
        return progress
    elif there:
        problem = f"{printable(str(there[0]))} is there already, finished or somebody else's; nothing was changed"
        raise RefusedError(f"{problem}: choose another name, or add --overwrite")
    progress = _Progress(FORMAT, finetune.__version__, request)
    write_json(marker, asdict(progress))
    if out.suffix == ".parquet":
        out.mkdir(exist_ok=True)
        claim(out, FolderKind.table)
    return progress


def _read(marker: Path) -> _Progress:
    try:
        progress = read_json(marker, _Progress, limit=MAX_BYTES)
    except DamagedError as error:
        raise RefusedError(f"{error}; nothing was changed: add --overwrite to begin anew") from None
    if progress.format != FORMAT:
        raise RefusedError(
            f"{printable(str(marker))} is of finetune {progress.finetune}; add --overwrite to begin anew"
        )
    return progress


def _cut(path: Path, progress: _Progress) -> None:
    """Compare a file with what was written, and cut off what a killed process wrote beyond."""
    shown = printable(str(path))
    if path.suffix == ".parquet":
        path.mkdir(exist_ok=True)
        claim(path, FolderKind.table)
        parts = (path / f"part-{number:05d}.parquet" for number in range(progress.parts))
        if lost := next((part.name for part in parts if not part.is_file()), None):
            raise RefusedError(f"{shown} lacks {lost}, which was written; add --overwrite to begin anew")
        return
    grown = progress.files.get(path.name, _Grown())
    if not os.path.lexists(path) and not grown.size:
        return
    refuse_unless("in place", path)
    try:
        with open_regular(path, follow=False) as file:
            file.seek(grown.spare)
            is_same = os.fstat(file.fileno()).st_size >= grown.size and (
                not grown.size or crc_of(file, grown.size - grown.spare) == grown.crc
            )
    except FileNotFoundError:
        is_same = False
    if not is_same:
        raise RefusedError(f"{shown} is not what was written there; nothing was changed: add --overwrite to begin anew")
    with open_own(path, "r+b") as file:
        file.truncate(grown.size)


def _take_away(path: Path, *, is_folder: bool) -> None:
    """Remove a file, or the numbered files of a folder of ours."""
    if not is_folder:
        refuse_unless("replaced", path)
        path.unlink()
        return
    refuse_unless("folder", path)
    if look(path, FolderKind.table) is None:
        raise RefusedError(f"{printable(str(path))} is a folder that finetune did not make; choose another name")
    for part in own_files(path, FolderKind.table):
        part.unlink()


def _sweep(marker: Path) -> None:
    """Remove the temporary files that killed processes left of this very marker."""
    for path, name, _ in temporaries(marker.parent):
        if name == marker.name:
            path.unlink()
