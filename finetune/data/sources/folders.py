"""One folder of images for each class: finds the images, and explains what is wrong with any other layout."""

import os
from collections import Counter
from collections.abc import Iterable

import torch

from finetune.config import DataConf, nearest
from finetune.data.images.decode import EXTENSIONS, natural_key
from finetune.data.packed import PackedStrings
from finetune.data.sources.stores import FileStore
from finetune.data.split import SPLIT_WORDS, SPLITS, FoundImages
from finetune.system.errors import UserError

LAYOUT = "expected one folder a class with its images inside, such as ROOT/cat/1.jpg and ROOT/dog/1.jpg"
# Folders that operating systems and tools leave behind. Some hold small copies of the images.
_LITTER = frozenset(["__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"])


def find_folder(conf: DataConf) -> FoundImages:
    """The images in the class folders under `data.root`, or under its `train/`, `val/` and `test/`.

    If there is a `train/` without `val/` or `test/`, the missing split is cut from `train/`. Raises FileNotFoundError
    if `data.root` is missing, UserError if it has another layout.
    """
    root = os.path.expanduser(conf.root or "")
    if _identity(root) is None and not os.path.lexists(root):
        above, name = os.path.split(os.path.abspath(root))
        close = nearest(name, _entries(above)[0]) if os.path.isdir(above) else ""
        raise FileNotFoundError(f"data.root={conf.root}: there is no such folder{close}; {LAYOUT}")
    if not os.path.isdir(root):
        raise UserError(f"data.root={conf.root}: is not a folder; {LAYOUT}")
    left_out: Counter[str] = Counter()
    folders = _split_folders(root) or {"train": ""}
    found = {split: _list_classes(root, folder, left_out) for split, folder in folders.items()}
    _check_same_classes(root, found)
    classes = tuple(sorted(found["train"], key=natural_key))
    paths: list[str] = []
    labels: list[int] = []
    given = bytearray()
    for split, paths_of in found.items():
        for label, name in enumerate(classes):
            paths += paths_of[name]
            labels += [label] * len(paths_of[name])
            given += bytes([SPLITS.index(split)]) * len(paths_of[name])
    names = PackedStrings(paths)
    return FoundImages(
        store=FileStore(root, names),
        names=names,
        classes=classes,
        labels=torch.tensor(labels, dtype=torch.int64),
        given=torch.frombuffer(given, dtype=torch.uint8),
        place=f"data.root={root}",
        title=f"folder {root}",
        note=_brackets(left_out),
        location=os.path.abspath(root),
    )


def _split_folders(root: str) -> dict[str, str]:
    """Split -> its folder; empty if the folders in `root` are classes."""
    folders, _ = _entries(root)
    found = {}
    for number, split in enumerate(SPLITS):
        same = [folder for folder in folders if SPLIT_WORDS.get(folder.lower()) == number]
        if len(same) > 1:
            raise UserError(f"data.root={root}: {' and '.join(same)} both mean {split}; keep one of them")
        if same:
            found[split] = same[0]
    if len(found) == len(folders) > 0 and "train" not in found:
        raise UserError(f"data.root={root}: {' and '.join(found.values())} but no train; {LAYOUT}")
    if "train" not in found or not _entries(os.path.join(root, found["train"]))[0]:
        return {}  # there is no train/, or it is a class (of railway pictures), with images and no folders in it
    others = [folder for folder in folders if folder not in found.values()]
    if others and len(found) > 1:
        both = f"{', '.join(others)} beside {', '.join(found.values())}"
        layouts = "either class folders or train, val and test, each with its class folders"
        raise UserError(f"data.root={root}: {both}: expected {layouts}; move the others away")
    return {} if others else found


def _list_classes(root: str, folder: str, left_out: Counter[str]) -> dict[str, list[str]]:
    """The images of each class folder in `root/folder`, as sorted paths relative to `root`; adds to `left_out`."""
    place = os.path.join(root, folder) if folder else root
    folders, files = _entries(place)
    if not folders:
        seen = _brackets(Counter(_kind(file) for file in files), "found only") or " [found nothing]"
        raise UserError(f"data.root={place}: no class folders in it{seen}; {LAYOUT}")
    classes: dict[str, list[str]] = {}
    empty = []
    for name in folders:
        others: Counter[str] = Counter()
        start = f"{folder}/{name}" if folder else name
        classes[name] = sorted(_walk(root, start, others, above=(_identity(place),)))
        if not classes[name]:
            empty.append(name + _brackets(others, "found only"))
        left_out.update(others)
    if empty:
        how = f"add some or remove the folder (images end in {' '.join(sorted(EXTENSIONS))})"
        raise UserError(f"data.root={place}: no images in class folder {', '.join(empty)}; {how}")
    if len(classes) == 1:
        raise UserError(f"data.root={place}: only one class, {folders[0]}, so there is nothing to tell apart; {LAYOUT}")
    left_out.update(_kind(file) for file in files)
    return classes


def _walk(root: str, folder: str, others: Counter[str], *, above: tuple[object, ...]) -> Iterable[str]:
    """Image files under `root/folder`, at any depth, relative to `root`; counts all other files in `others`."""
    here = _identity(os.path.join(root, folder))
    if here in above:
        return  # a link to a folder above, whose images are listed there
    folders, files = _entries(os.path.join(root, folder))
    for file in files:
        if os.path.splitext(file)[1].lower() in EXTENSIONS:
            yield f"{folder}/{file}"
        else:
            others[_kind(file)] += 1
    for name in folders:
        yield from _walk(root, f"{folder}/{name}", others, above=(*above, here))


def _identity(folder: str) -> tuple[int, int] | None:
    """Device and inode, None if it does not exist; raises UserError if the rights of a folder above hide that."""
    try:
        status = os.stat(folder)
    except PermissionError as error:
        how = "change the rights of a folder above, or data.root"
        raise UserError(f"{folder}: may not be reached (permission denied); {how}") from error
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of the visible folders, in natural order, and of the visible files. A link counts as its target."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _LITTER:
                    continue
                # Broken links, links to themselves and pipes count as files: the check of the images names them.
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                (folders if is_folder else files).append(entry.name)
    except PermissionError as error:
        raise UserError(f"{folder}: may not be listed (permission denied); change its rights or data.root") from error
    return sorted(folders, key=natural_key), files


def _check_same_classes(root: str, found: dict[str, dict[str, list[str]]]) -> None:
    """Raises UserError if a split lacks a class or has another: a label would mean different classes in them."""
    known = found["train"].keys()
    problems = []
    for split, classes in found.items():
        lacks = sorted(known - classes.keys(), key=natural_key)
        extra = sorted(classes.keys() - known, key=natural_key)
        problems += [f"{split} lacks {', '.join(lacks)}"] * bool(lacks)
        problems += [f"{split} has {', '.join(extra)}, which train has not"] * bool(extra)
    if problems:
        raise UserError(f"data.root={root}: the splits differ in their classes: {'; '.join(problems)}")


def _kind(file: str) -> str:
    ending = os.path.splitext(file)[1].lower()
    return "images" if ending in EXTENSIONS else ending or "files without an ending"


def _brackets(counts: Counter[str], word: str = "left out:") -> str:
    if not counts:
        return ""
    return f" [{word} {', '.join(f'{number:,} {kind}' for kind, number in counts.most_common(5))}]"
