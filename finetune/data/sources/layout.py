"""What a folder of images means: class folders, or splits with class folders in them. A doubtful one is a question."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune.data.images.decode import EXTENSIONS
from finetune.data.split import SPLITS
from finetune.data.split_words import is_extra, split_of
from finetune.system.errors import UserError
from finetune.system.natural import natural_key
from finetune.system.ours import MARKER, OWN, read_marker
from finetune.system.terminal import counted

LAYOUT = "expected one folder a class with its images inside, such as ROOT/cat/1.jpg and ROOT/dog/1.jpg"
# Folders that operating systems and tools leave behind. Some hold small copies of the images.
LITTER = frozenset(["__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"])
OURS = "folder of a run"  # in the list of what was left out
DEPTH = 5  # folders, from that of all outputs down: outputs/sweeps/<date>/<time>/<job>
MOST_PARTS = 10  # folders that may be parts of a data set; more of them are classes
SHOWN = 5  # names in a message


def entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the visible folders, in natural order, and of the visible files. A link counts as its target.

    What a run or another command of ours wrote is left out: its pictures are no images.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        for entry, is_folder in _visible(folder):
            (folders if is_folder else files).append(entry.name)
    except PermissionError as error:
        identity(folder)
        raise UserError(f"{folder}: may not be listed (permission denied); change its rights or data.root") from error
    return sorted(folders, key=natural_key), files


def _visible(folder: str) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """The visible entries of a folder that are not ours, and whether each is a folder."""
    marker = read_marker(Path(folder))
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name in LITTER:
                continue
            if marker is not None and OWN[marker.kind].has_name(entry.name):
                continue
            # Broken links, links to themselves and pipes count as files: the check of the images names them.
            yield entry, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def identity(folder: str) -> tuple[int, int] | None:
    """Device and inode, None if it does not exist; raises UserError if the rights of a folder above hide that."""
    try:
        status = os.stat(folder)
    except PermissionError as error:
        how = "change the rights of a folder above, or data.root"
        raise UserError(f"{folder}: may not be reached (permission denied); {how}") from error
    except OSError:
        return None
    return status.st_dev, status.st_ino


def class_entries(folder: str, left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """`entries` without folders that hold only runs, sweeps, checks or caches of ours, which are counted instead."""
    folders, files = entries(folder)
    ours = [name for name in folders if is_ours(os.path.join(folder, name))]
    left_out.update({OURS: len(ours)} if ours else {})
    return [name for name in folders if name not in ours], files


def is_ours(folder: str, depth: int = DEPTH) -> bool:
    """Whether a folder holds what commands of ours wrote and no images, as `outputs/` and the folders of dates in it.

    A folder with a marker may be a class, too: a check may write into any folder.
    """
    found = has_marker(folder)
    with contextlib.suppress(PermissionError):  # whoever lists the folder says so
        for entry, is_folder in _visible(folder):
            if is_image(entry.name) or (is_folder and not (depth > 1 and is_ours(entry.path, depth - 1))):
                return False  # at the first of a million images
            found |= is_folder
    return found


def has_marker(folder: str) -> bool:
    """Whether there is a marker file of ours in a folder."""
    return os.path.lexists(os.path.join(folder, MARKER))


def is_image(file: str) -> bool:
    """Whether a file's name ends as that of an image."""
    return os.path.splitext(file)[1].lower() in EXTENSIONS


def split_folders(root: str, wanted: Sequence[str], left_out: Counter[str]) -> dict[str, str]:
    """Split -> its folder; empty if the folders in `root` are classes, as they are if all of `wanted` are among them.

    `wanted` is `data.classes`. Folders such as `unlabeled` beside splits are counted in `left_out`. Raises UserError
    where the folders may be read both ways.
    """
    folders, _ = class_entries(root, Counter())
    if wanted and all(name in folders for name in wanted):
        return {}
    found: dict[str, str] = {}
    for number, split in enumerate(SPLITS):
        same = [folder for folder in folders if split_of(folder) == number]
        if len(same) > 1 and len(same) < len(folders):
            raise UserError(f"data.root={root}: {' and '.join(same)} both mean {split}; keep one of them")
        if same:
            found[split] = same[0]
    extra = [folder for folder in folders if folder not in found.values() and is_extra(folder)]
    others = [folder for folder in folders if folder not in found.values() and folder not in extra]
    if found and not others and "train" not in found:
        raise UserError(f"data.root={root}: {' and '.join(found.values())} but no train; {LAYOUT}")
    if "train" not in found or (len(found) == 1 and not extra and _has_images(root, found["train"])):
        _refuse_parts(root, folders)
        return {}  # there is no train/, or it is a class (of railway pictures), with images in it
    if others and len(found) > 1:
        both = f"{', '.join(others)} beside {', '.join(found.values())}"
        layouts = "either class folders or train, val and test, each with its class folders"
        raise UserError(f"data.root={root}: {both}: expected {layouts}; move the others away")
    if others:
        _refuse(root, folders, entries(os.path.join(root, found["train"]))[0])
    for folder in extra:
        left_out[f"image in {folder}"] += sum(
            map(is_image, (file for _, _, files in os.walk(os.path.join(root, folder)) for file in files))
        )
    return found


def _has_images(root: str, folder: str) -> bool:
    """Whether there are images right in a folder, or nothing but files."""
    folders, files = entries(os.path.join(root, folder))
    return not folders or any(map(is_image, files))


def first_fork(folder: str) -> tuple[str, list[str]]:
    """The first folder, from this one down, that does not hold one folder and nothing else of use; and its folders."""
    for _ in range(DEPTH):
        folders, files = entries(folder)
        if len(folders) != 1 or any(map(is_image, files)):
            break
        folder = os.path.join(folder, folders[0])
    return folder, entries(folder)[0]


def _refuse_parts(root: str, folders: Sequence[str]) -> None:
    """Raises UserError if one of `folders` holds splits, or each holds only folders of names that most share."""
    names: Counter[str] = Counter()
    with_images = False
    holders: dict[str, list[str]] = {}  # folder -> the splits in it
    for folder in folders:
        inner = entries(os.path.join(root, folder))[0]
        splits = {split_of(name) for name in inner} - {None}
        if 0 in splits and len(splits) > 1 and _any_image(os.path.join(root, folder)):
            holders[folder] = [name for name in inner if split_of(name) is not None]
        with_images |= _has_images(root, folder)
        names.update(inner)
    if holders and len(folders) > 1:  # of a single folder another error says more
        folder, splits_of = next(iter(holders.items()))
        first = f"{folder}/{', '.join(splits_of)}"
        how = f"put the splits outside, such as train/{folder}, or give a table (data=table)"
        if len(holders) == 1:
            how += f"; or is it data.root={os.path.join(root, folder)}?"
        raise UserError(f"data.root={root}: the class folders hold splits ({first}); {how}")
    if with_images:
        return
    shared = [name for name, count in names.items() if count > 1 and 2 * count >= len(folders)]
    if len(folders) > 1 and len(shared) > 1 and len(folders) <= MOST_PARTS:
        _refuse(root, folders, shared)


def inner_folders(place: str) -> dict[str, str]:
    """The folders inside class folders that may be the classes themselves: name -> path from `place` on.

    Empty where an image lies right in a class folder, where two class folders have inner ones of one name, or where
    most class folders have fewer than two. A folder that holds one folder and nothing else is passed.
    """
    folders, _ = class_entries(place, Counter())
    found: dict[str, str] = {}
    several = 0
    for name in folders:
        inner = _inner_of(os.path.join(place, name))
        several += len(inner) > 1
        for path in inner:
            part = os.path.basename(path)
            if part in found:
                return {}
            found[part] = os.path.relpath(path, place).replace(os.sep, "/")
        if not inner:
            return {}
    return found if len(folders) > 1 and 2 * several >= len(folders) else {}


def _inner_of(folder: str) -> list[str]:
    """The folders in a class folder that has no image of its own; those in the one folder there, if it has none."""
    inner: list[str] = []
    for _ in range(DEPTH):
        below = []
        with contextlib.suppress(PermissionError):  # whoever lists the folder says so
            for entry, is_folder in _visible(folder):
                if is_image(entry.name):
                    return inner  # at the first of a million images
                below += [entry.path] if is_folder else []
        inner = sorted(below, key=natural_key) or inner
        if len(below) != 1:
            break
        folder = below[0]
    return inner


def refuse_nested(place: str, inner: Mapping[str, str]) -> None:
    """Raises the UserError with both readings of class folders in which nothing but the folders `inner` lies."""
    outer = class_entries(place, Counter())[0]
    both = f"the classes {listed(outer)}, or the classes {listed(list(inner))} in them"
    films = "if the inner folders are films or patients, data.group='([^/]+)/[^/]+$'"
    mend = f"say data.classes=[{_first_two(outer)}] or data.classes=[{_first_two(list(inner))}]; {films}"
    raise UserError(f"data.root={place}: may be {both}; {mend}")


def _first_two(names: Sequence[str]) -> str:
    return ",".join(names) if len(names) <= SHOWN else f"{','.join(names[:2])},..."


def _any_image(folder: str) -> bool:
    """Whether there is an image in a folder, at any depth."""
    return any(is_image(file) for _, _, files in os.walk(folder) for file in files)


def _refuse(root: str, folders: Sequence[str], inner: Sequence[str]) -> None:
    """Raises the UserError that says both readings of `folders`, in which are folders called `inner`."""
    outer = listed(folders)
    parts = f"parts {outer} of a data set with the classes {listed(inner)}, or the classes {outer}"
    mend = f"name the parts train, val and test, or say data.classes=[{_first_two(folders)}]"
    raise UserError(f"data.root={root}: may be {parts}; {mend}")


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def in_brackets(counts: Counter[str], word: str = "left out:") -> str:
    """` [left out: 2 .txt, 1 file without an ending]`, of kinds in the singular; empty if there is nothing to say."""
    if not counts:
        return ""
    return f" [{word} {', '.join(_in_words(kind, number) for kind, number in counts.most_common(SHOWN))}]"


def _in_words(kind: str, number: int) -> str:
    """`2 .txt`, or `2 shards in unlabeled`: the first word of a kind takes the plural, and an ending of names none."""
    noun, blank, rest = kind.partition(" ")
    return f"{number:,} {kind}" if kind.startswith(".") else counted(number, noun) + blank + rest
