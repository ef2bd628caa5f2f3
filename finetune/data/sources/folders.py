"""One folder of images for each class: finds the images, and explains what is wrong with any other layout."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from finetune.config import DataConf, nearest
from finetune.config.data import group_pattern
from finetune.data.images.decode import EXTENSIONS
from finetune.data.labels import told_apart
from finetune.data.packed import PackedStrings
from finetune.data.sources.layout import (
    LAYOUT,
    class_entries,
    entries,
    first_fork,
    identity,
    in_brackets,
    inner_folders,
    is_image,
    listed,
    refuse_nested,
    split_folders,
)  # fmt: skip
from finetune.data.sources.stores import FileStore
from finetune.data.split import SPLITS, FoundImages
from finetune.data.split_words import is_extra, split_of
from finetune.system.errors import UserError
from finetune.system.natural import natural_key


def find_folder(conf: DataConf) -> FoundImages:
    """The images in the class folders under `data.root`, or under its `train/`, `val/` and `test/`.

    Only train has to have images of every class. Images of val or test that lie in no class folder have no labels; they
    are left out. Raises FileNotFoundError if `data.root` is missing, UserError if it has another layout.
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
    inner = _inner_classes(os.path.join(root, folders["train"]) if folders["train"] else root, conf)
    found = {split: _list_classes(root, folder, split == "train", left_out, inner) for split, folder in folders.items()}
    for split, paths_of in found.items():
        for name in [name for name in paths_of if name not in found["train"] and is_extra(name)]:
            left_out[f"image in {folders[split]}/{name}"] += len(paths_of.pop(name))
    _check_train(root, folders["train"], found["train"], conf.classes)
    for split in folders:
        _check_known(root, split, found, conf.classes)
    classes = tuple(sorted(found["train"], key=natural_key))
    paths: list[str] = []
    labels: list[int] = []
    given = bytearray()
    for split, paths_of in found.items():
        for label, name in enumerate(classes):
            paths += paths_of.get(name, [])
            labels += [label] * len(paths_of.get(name, []))
            given += bytes([SPLITS.index(split)]) * len(paths_of.get(name, []))
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
        warnings=_odd_names(classes, conf.classes),
    )


def _inner_classes(train: str, conf: DataConf) -> dict[str, str]:
    """Class -> path from `train` on, if `data.classes` names folders in the folders there; else empty.

    Raises UserError where these may be the classes, and neither `data.classes` nor a pattern of groups says.
    """
    inner = inner_folders(train)
    outer = set(class_entries(train, Counter())[0])
    if not inner or (conf.classes and outer.issuperset(conf.classes)):
        return {}
    if conf.classes and inner.keys() >= set(conf.classes):
        return {name: inner[name] for name in conf.classes}
    if group_pattern(conf) is None:
        refuse_nested(train, inner)
    return {}


def _list_classes(
    root: str, folder: str, is_train: bool, left_out: Counter[str], inner: Mapping[str, str]
) -> dict[str, list[str]]:
    """The images of each class folder in `root/folder`, as sorted paths relative to `root`; adds to `left_out`.

    If there are `inner` classes, their folders are the class folders: class -> path from `root/folder` on.
    Empty for a split other than train whose images lie in no class folder. Raises UserError where there are no images.
    """
    place = os.path.join(root, folder) if folder else root
    folders, files = class_entries(place, left_out)
    beside = Counter(_kind(file) for file in files)
    if not folders and beside["image"] and not is_train:  # as in Kaggle's competitions, which keep these labels
        beside[f"image without a label in {folder}"] = beside.pop("image")
        left_out.update(beside)
        return {}
    if not folders:
        seen = in_brackets(beside, "found only") or " [found nothing]"
        raise UserError(f"data.root={place}: no class folders in it{seen}; {LAYOUT}")
    classes: dict[str, list[str]] = {}
    inside: Counter[str] = Counter()
    paths = {name: path for name, path in inner.items() if os.path.isdir(os.path.join(place, path))}
    for name, path in (paths if inner else dict(zip(folders, folders, strict=True))).items():
        start = f"{folder}/{path}" if folder else path
        classes[name] = sorted(_walk(root, start, inside, seen={identity(place)}))
    if not is_train and not any(classes.values()):
        seen = in_brackets(inside, "found only") or " [found nothing]"
        raise UserError(f"data.root={place}: no images in its class folders{seen}; add some or remove the folder")
    left_out.update(inside + beside)
    return classes


def _check_train(root: str, folder: str, classes: Mapping[str, Sequence[str]], wanted: Collection[str]) -> None:
    """Raises UserError if a class of train has no images, or if there is only one; `wanted` is `data.classes`."""
    place = os.path.join(root, folder) if folder else root
    empty = []
    for name, paths in classes.items():
        if not paths and (not wanted or name in wanted):
            others: Counter[str] = Counter()
            list(_walk(place, name, others, seen=set()))
            empty.append(name + in_brackets(others, "found only"))
    if empty:
        how = f"add some or remove the folder (images end in {' '.join(sorted(EXTENSIONS))})"
        raise UserError(f"data.root={place}: no images in class folder {', '.join(empty)}; {how}")
    if len(classes) > 1:
        return
    (name,) = classes
    deeper, inner = first_fork(os.path.join(place, name))
    mend = f"is it data.root={deeper}, with {listed(inner)}?"
    if folder:
        mend = f"if {listed(inner)} are the classes, move them from {deeper} to {place}, and so in the other splits"
    problem = f"data.root={place}: only one class, {name}, so there is nothing to tell apart; {LAYOUT}"
    raise UserError(f"{problem}; {mend}" if len(inner) > 1 else problem)


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


def _check_known(root: str, split: str, found: Mapping[str, Mapping[str, list[str]]], wanted: Collection[str]) -> None:
    """Raises UserError if a split has images of a class that train lacks; `wanted` is `data.classes`."""
    train = found["train"]
    here = [name for name, paths in found[split].items() if paths]
    extra = [name for name in here if name not in train and (not wanted or name in wanted)]
    if extra:
        problem = f"{split} has {listed(told_apart(extra, train))}, which train has not"
        both = f"train has {listed(told_apart(train, extra))}; {split} has {listed(told_apart(here, train))}"
        mend = "give a class one name in all splits; a folder without labels may be called unlabeled"
        raise UserError(f"data.root={root}: the splits differ in their classes: {problem} ({both}); {mend}")


def _odd_names(classes: Iterable[str], wanted: Collection[str]) -> tuple[str, ...]:
    """A warning where a class is named like a split, unless `data.classes` names it."""
    odd = [name for name in classes if name not in wanted and (split_of(name) is not None or is_extra(name))]
    if not odd:
        return ()
    how = "put class folders into train, val and test for splits, move it away, or name it in data.classes"
    return (f"read as a class, although it is named like a part of a data set: {', '.join(odd)}; {how}",)


def _kind(file: str) -> str:
    return "image" if is_image(file) else os.path.splitext(file)[1].lower() or "file without an ending"
