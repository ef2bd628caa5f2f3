"""Sorts images into a folder for each class: by links, or by copies."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.files import sync_folder, write_atomic
from finetune.system.ours import FolderKind, RefusedError, claim, read_marker, refuse_unless
from finetune.system.terminal import printable

# What no folder may be called on some system, or what hides or steers: `/`, controls, what Windows keeps for itself.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
MAX_NAME = 200  # bytes of a name: file systems take 255


class Sorter:
    """Puts images into the folders of their classes; to put one there again changes nothing."""

    def __init__(self, folder: Path, classes: Sequence[str], *, copy: bool) -> None:
        """Claim the folder, which must be new, empty, or one that was sorted into before.

        Raises:
            RefusedError: The folder holds other files.
            UserError: Two classes would share a folder.
        """
        self._folder, self._copy = folder, copy
        self._names = {name: safe_name(name) for name in classes}
        by_name: dict[str, str] = {}
        for name, safe in self._names.items():
            if (other := by_name.setdefault(safe, name)) != name:
                raise UserError(
                    f"--sort-into: the classes {printable(other)} and {printable(name)} would share a folder"
                )
        if folder.is_dir() and read_marker(folder) is None and any(folder.iterdir()):
            raise RefusedError(f"{printable(str(folder))} is not empty; nothing was changed: choose a new folder")
        folder.mkdir(exist_ok=True)
        claim(folder, FolderKind.sorted)

    def put(self, split: Split, index: int, labels: Sequence[str]) -> None:
        """Link or copy an image into the folder of each of its labels."""
        source = split.name_of(index)
        for label in labels:
            folder = self._folder / self._names[label]
            refuse_unless("folder", folder)
            folder.mkdir(exist_ok=True)
            name = os.path.basename(source)
            if not self._put(split, index, folder / safe_name(name)):
                # Another image of this name is there. The place of this one gives it a name that is always the same.
                stem, ending = os.path.splitext(safe_name(name))
                mark = hashlib.sha256(os.path.abspath(source).encode("utf-8", "surrogateescape")).hexdigest()[:12]
                if not self._put(split, index, folder / f"{stem}-{mark}{ending}"):
                    raise RefusedError(f"{printable(str(folder))} has another file called {stem}-{mark}{ending}")

    def _put(self, split: Split, index: int, place: Path) -> bool:
        """Make one link or copy; False where something else has the name."""
        if self._copy:
            data = split.store.read(int(split.rows[index]))
            if os.path.lexists(place):
                return place.is_file() and not place.is_symlink() and place.read_bytes() == data
            write_atomic(place, lambda temporary: temporary.write_bytes(data), is_durable=False)
            return True
        source = os.path.abspath(split.name_of(index))
        if not os.path.isfile(source):
            raise UserError(f"{printable(source)} lies in a shard or a table, so no link can lead to it; add --copy")
        try:
            os.symlink(source, place)
        except FileExistsError:
            return place.is_symlink() and os.readlink(place) == source
        return True

    def finish(self) -> None:
        """Make links and copies survive a power cut."""
        sync_folder(self._folder)


def safe_name(name: str) -> str:
    """`name` as the name of a file or folder on any system; a changed or long one gets a digest of the whole."""
    safe = _UNSAFE.sub("_", name).rstrip(". ")
    safe = f"_{safe[1:]}" if safe.startswith(".") else safe
    stem, ending = os.path.splitext(safe)
    if safe and safe == name and len(safe.encode()) <= MAX_NAME:
        return safe
    while len(stem.encode()) > MAX_NAME - 60:
        stem = stem[:-1]
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{stem or '_'}-{mark}{ending[:20]}"


def check_apart(folder: Path, places: Sequence[str]) -> None:
    """Raise a UserError where images are sought in the folder that they are sorted into: it would find its own."""
    here = os.path.realpath(folder)
    for place in places:
        if os.path.isdir(place) and (here + os.sep).startswith(os.path.join(os.path.realpath(place), "")):
            raise UserError(f"--sort-into {printable(str(folder))} lies in {printable(place)}, where images are sought")
