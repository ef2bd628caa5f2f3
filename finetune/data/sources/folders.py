"""One folder of images for each class: finds the images, and explains what is wrong with any other layout."""

import os
from collections import Counter
from collections.abc import Iterable

import torch

from finetune.config import DataConf, nearest
from finetune.data.images.decode import EXTENSIONS, natural_key
from finetune.data.labels import told_apart
from finetune.data.packed import PackedStrings
from finetune.data.sources.layout import (
    LAYOUT,
    class_entries,
    entries,
    identity,
    in_brackets,
    is_image,
    split_folders,
)  # fmt: skip
from finetune.data.sources.stores import FileStore
from finetune.data.split import SPLITS, FoundImages
from finetune.system.errors import UserError


def find_folder(conf: DataConf) -> FoundImages:
    """The images in the class folders under `data.root`, or under its `train/`, `val/` and `test/`.

    If there is a `train/` without `val/` or `test/`, the missing split is cut from `train/`. Raises FileNotFoundError
    if `data.root` is missing, UserError if it has another layout.
    """
    root = os.path.expanduser(conf.root or "")
    if identity(root) is None and not os.path.lexists(root):
        above, name = os.path.split(os.path.abspath(root))
        close = nearest(name, entries(above)[0]) if os.path.isdir(above) else ""
        raise FileNotFoundError(f"data.root={conf.root}: there is no such folder{close}; {LAYOUT}")
    if not os.path.isdir(root):
        raise UserError(f"data.root={conf.root}: is not a folder; {LAYOUT}")
    left_out: Counter[str] = Counter()
    folders = split_folders(root, conf.classes, left_out) or {"train": ""}
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
        note=in_brackets(left_out),
        location=os.path.abspath(root),
    )


def _list_classes(root: str, folder: str, left_out: Counter[str]) -> dict[str, list[str]]:
    """The images of each class folder in `root/folder`, as sorted paths relative to `root`; adds to `left_out`."""
    place = os.path.join(root, folder) if folder else root
    folders, files = class_entries(place, left_out)
    if not folders:
        seen = in_brackets(Counter(_kind(file) for file in files), "found only") or " [found nothing]"
        raise UserError(f"data.root={place}: no class folders in it{seen}; {LAYOUT}")
    classes: dict[str, list[str]] = {}
    empty = []
    for name in folders:
        others: Counter[str] = Counter()
        start = f"{folder}/{name}" if folder else name
        classes[name] = sorted(_walk(root, start, others, seen={identity(place)}))
        if not classes[name]:
            empty.append(name + in_brackets(others, "found only"))
        left_out.update(others)
    if empty:
        how = f"add some or remove the folder (images end in {' '.join(sorted(EXTENSIONS))})"
        raise UserError(f"data.root={place}: no images in class folder {', '.join(empty)}; {how}")
    if len(classes) == 1:
        problem = f"data.root={place}: only one class, {folders[0]}, so there is nothing to tell apart"
        inner = entries(os.path.join(place, folders[0]))[0]
        deeper = f"; is it data.root={os.path.join(place, folders[0])}, with {', '.join(inner[:5])}?"
        raise UserError(f"{problem}; {LAYOUT}{deeper if len(inner) > 1 else ''}")
    left_out.update(_kind(file) for file in files)
    return classes


def _walk(root: str, folder: str, others: Counter[str], *, seen: set[object]) -> Iterable[str]:
    """Image files under `root/folder`, at any depth, relative to `root`; counts all other files in `others`.

    A folder counts once, however many links lead to it: links to a folder above would never end, and a few links to
    each other are many paths. `seen` holds the folders that were listed so far.
    """
    here = identity(os.path.join(root, folder))
    if here in seen:
        return
    seen.add(here)
    folders, files = class_entries(os.path.join(root, folder), others)
    for file in files:
        if is_image(file):
            yield f"{folder}/{file}"
        else:
            others[_kind(file)] += 1
    for name in folders:
        yield from _walk(root, f"{folder}/{name}", others, seen=seen)


def _check_same_classes(root: str, found: dict[str, dict[str, list[str]]]) -> None:
    """Raises UserError if a split lacks a class or has another: a label would mean different classes in them."""
    known = found["train"].keys()
    problems = []
    for split, classes in found.items():
        lacks = sorted(known - classes.keys(), key=natural_key)
        extra = sorted(classes.keys() - known, key=natural_key)
        problems += [f"{split} lacks {', '.join(told_apart(lacks, extra))}"] * bool(lacks)
        problems += [f"{split} has {', '.join(told_apart(extra, lacks))}, which train has not"] * bool(extra)
    if problems:
        raise UserError(f"data.root={root}: the splits differ in their classes: {'; '.join(problems)}")


def _kind(file: str) -> str:
    return "image" if is_image(file) else os.path.splitext(file)[1].lower() or "file without an ending"
