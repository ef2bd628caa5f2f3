"""Where an export goes: it is made in a hidden folder beside its place, and moved there when it is whole and proven."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.system.errors import naming
from finetune.system.files import sync_folder
from finetune.system.locks import file_lock
from finetune.system.ours import (
    LOCK,
    MARKER,
    FolderKind,
    RefusedError,
    claim,
    read_marker,
    refuse_unless,
    temporaries,
    temporary_of,
)
from finetune.system.terminal import printable

SUBFOLDER = "export"  # of a run directory


def default_place(run_dir: Path, name: str) -> Path:
    """Where the export to the format `name` goes: `RUN/export/FORMAT`.

    Raises:
        RefusedError: Something else than a folder is called `export` there, such as a link that leads elsewhere.
    """
    refuse_unless("folder", run_dir / SUBFOLDER)
    return run_dir / SUBFOLDER / name


def check_free(place: Path) -> None:
    """Make sure that nothing is at `place`, or an empty folder.

    Raises:
        RefusedError: Something is there, perhaps a link.
        FileNotFoundError: There is no folder for it; but one called `export` is made.
    """
    shown, above = printable(str(place)), place.parent
    if not above.is_dir() and not (above.name == SUBFOLDER and above.parent.is_dir()):
        raise FileNotFoundError(f"{shown}: the folder {printable(str(above))} does not exist")
    is_free = not os.path.lexists(place) or (place.is_dir() and not place.is_symlink() and not any(place.iterdir()))
    if not is_free:
        raise RefusedError(
            f"{shown} is there already; nothing was changed: choose a new folder with --out, or remove it"
        )


@contextlib.contextmanager
def made_at(place: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `place` if the body of the `with` ends without an error, else it goes.

    A killed process leaves it under a name of our own, with our marker in it. The next export to `place` removes it.

    Raises:
        RefusedError: As `check_free`; meanwhile something may have come to be there.
    """
    check_free(place)
    place.parent.mkdir(exist_ok=True)
    _sweep(place)
    folder = temporary_of(place)
    folder.mkdir()
    try:
        claim(folder, FolderKind.export)
        with file_lock(folder / LOCK):
            with naming(place):  # some libraries' errors of a full disk name no file
                yield folder
            sync_folder(folder)
            check_free(place)
            os.replace(folder, place)
            for name in (MARKER, LOCK):
                (place / name).unlink()
        sync_folder(place)
        sync_folder(place.parent)
    finally:
        if folder.is_dir():
            shutil.rmtree(folder)
        if place.parent.name == SUBFOLDER and not place.is_dir():
            with contextlib.suppress(OSError):  # other exports lie there
                place.parent.rmdir()


def _sweep(place: Path) -> None:
    """Remove what killed processes left beside `place`: folders of that name with our marker, which nobody holds."""
    for path, name, _ in temporaries(place.parent):
        if name != place.name or path.is_symlink() or not path.is_dir():
            continue
        marker = read_marker(path)
        if marker is None or marker.kind != FolderKind.export:
            continue
        refuse_unless("in place", path / LOCK)
        with contextlib.suppress(TimeoutError), file_lock(path / LOCK, timeout_s=0):
            shutil.rmtree(path)
