"""Tar shards as WebDataset lays them out, on a disk: an index over them gives every image by its number.

So epochs are exact, shuffled over all shards, and resumed like any others. Streams (URLs, pipes) have no index and are
not read: copy the shards to a disk first.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.data.images import EXTENSIONS, MISSING, Header, ImageError, decode, header_of, natural_key
from finetune.data.packed import PackedStrings
from finetune.data.split import Found
from finetune.data.tables import SPLIT_WORDS

CLASS_FILES = ("classes.txt", "classnames.txt")  # a name a line, for labels that are numbers
LAYOUT = "expected .tar shards with pairs such as 0001.jpg and 0001.cls (a class number or name)"


class ShardStore:
    """Images inside tar files, found by shard, offset and size; opened for each read, so that workers share nothing."""

    encoded = True

    def __init__(self, shards: Sequence[str], keys: PackedStrings, places: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Hold the paths of the shards, the images' keys, and (shard, offset, size) of each, int64 (n, 3)."""
        self._shards = list(shards)
        self._keys = keys
        self._places = places

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        return decode(self.read(row), self.name_of(row))

    def header(self, row: int) -> Header:
        """Size and mode; raises ImageError."""
        return header_of(self.read(row), self.name_of(row))

    def read(self, row: int) -> bytes:
        """The image file; raises ImageError."""
        shard, offset, size = self._places[row].tolist()
        try:
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except FileNotFoundError as error:
            raise ImageError(self.name_of(row), MISSING) from error
        except OSError as error:
            raise ImageError(self.name_of(row), str(error)) from error
        if len(data) != size:
            raise ImageError(self.name_of(row), "the shard ends within the image")
        return data

    def stamp(self, row: int) -> str:
        """Size and time of the shard, and the place in it; raises ImageError."""
        shard, offset, size = self._places[row].tolist()
        try:
            status = os.stat(self._shards[shard])
        except OSError as error:
            raise ImageError(self.name_of(row), MISSING) from error
        return f"{status.st_size}:{status.st_mtime_ns}:{offset}:{size}:{self._shards[shard]}"

    def name_of(self, row: int) -> str:
        """Path of the shard, then the name in it."""
        return os.path.join(os.path.dirname(self._shards[int(self._places[row, 0])]), self._keys[row])


@dataclass
class _Index:
    """What lies in the shards: (shard, offset, size) of each image in a row, its label as a text, its split."""

    places: array[int] = field(default_factory=lambda: array("q"))
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    given: bytearray = field(default_factory=bytearray)


def find_shards(conf: DataConf) -> Found:
    """The images of all shards under `data.root`: a folder, perhaps with `train/ val/ test/`, or a pattern.

    Raises:
        FileNotFoundError: No shards there.
        ValueError: A shard is damaged, or an image has no label.
    """
    shards = _list_shards(conf.root or "")
    index = _Index()
    for number, (path, split) in enumerate(shards):
        _read_shard(path, number, split, conf.label_column, index)
    if not index.keys:
        raise ValueError(f"data.root={conf.root}: no images in {len(shards)} shards; {LAYOUT}")
    classes, labels = _classes(os.path.dirname(shards[0][0]), conf.root or "", index.labels)
    keys = PackedStrings(index.keys)
    root = os.path.expanduser(conf.root or "")
    return Found(
        kind="webdataset",
        store=ShardStore(
            [path for path, _ in shards], keys, np.frombuffer(index.places, dtype=np.int64).reshape(-1, 3)
        ),
        names=keys,
        classes=classes,
        labels=labels,
        given=torch.frombuffer(index.given, dtype=torch.uint8),
        place=f"data.root={root}",
        title=f"webdataset {root} ({len(shards)} shards)",
        location=os.path.abspath(root),
    )


def _list_shards(root: str) -> list[tuple[str, int]]:
    """(path, index into SPLITS) of every shard, in natural order."""
    path = os.path.expanduser(root)
    if re.match(r"(pipe|https?|s3|gs|hdfs):", path):
        raise ValueError(
            f"data.root={root}: shards are read from a disk only, so that epochs are exact: copy them first"
        )
    if os.path.isdir(path):
        found = [(shard, 0) for shard in glob.glob(os.path.join(glob.escape(path), "*.tar"))]
        for folder in sorted(os.listdir(path)):
            split = SPLIT_WORDS.get(folder.lower())
            if split is not None:
                inside = glob.glob(os.path.join(glob.escape(path), folder, "*.tar"))
                found += [(shard, split) for shard in inside]
    else:
        found = [(shard, 0) for pattern in _braces(path) for shard in glob.glob(pattern)]
    if not found:
        raise FileNotFoundError(f"data.root={root}: no .tar files there; {LAYOUT}")
    return sorted(set(found), key=lambda item: natural_key(item[0]))


def _braces(pattern: str) -> Iterator[str]:
    """`train-{000..012}.tar` -> each of the thirteen names."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _braces(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")


def _read_shard(path: str, number: int, split: int, label_key: str, index: _Index) -> None:
    """Add the images of a shard; files of one sample share the name up to its first dot and stand together."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if not member.isfile() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if f".{ending.lower()}" in EXTENSIONS:
                    if key in images:
                        raise ValueError(
                            f"data.root: {path}: {images[key][0]} and {member.name} are both the image of {key}"
                        )
                    images[key] = (member.name, member.offset_data, member.size)
                elif ending in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None, "it is a file"
                    label = _label(content.read(), ending, label_key)
                    if label is not None and (ending == "cls" or key not in labels):
                        labels[key] = label
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"data.root: {path} is damaged or no tar file ({error}); make it anew or remove it") from error
    bare = [name for key, (name, _, _) in images.items() if key not in labels]
    if bare:
        raise ValueError(
            f"data.root: {path}: {len(bare):,} images have no label, such as {', '.join(bare[:5])}; {LAYOUT},"
            f" or a .json with {label_key!r} (data.label_column)"
        )
    for key, (name, offset, size) in images.items():
        index.places.extend((number, offset, size))
        index.keys.append(f"{os.path.basename(path)}/{name}")
        index.labels.append(labels[key])
        index.given.append(split)


def _label(content: bytes, ending: str, label_key: str) -> str | None:
    """The label in a .cls or .json file of a shard, or None."""
    try:
        text = content.decode("utf-8").strip()
        if ending == "json":
            value = json.loads(text)
            text = str(value[label_key]) if isinstance(value, dict) and label_key in value else ""
    except ValueError:
        return None
    return text or None


def _classes(folder: str, root: str, labels: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Names and int64 (n,) labels: by `classes.txt` where it is there and labels are numbers, else in natural order."""
    for place in (folder, os.path.expanduser(root), os.path.dirname(folder)):
        for file in CLASS_FILES:
            path = os.path.join(place, file)
            if not os.path.isfile(path) or not all(label.isdecimal() for label in labels):
                continue
            with open(path, encoding="utf-8") as lines:
                names = tuple(line.strip() for line in lines if line.strip())
            highest = max(map(int, labels))
            if highest >= len(names) or len(set(names)) < len(names):
                raise ValueError(
                    f"{path}: has {len(names)} names, expected one for each label up to {highest}, all different"
                )
            return names, torch.tensor([int(label) for label in labels], dtype=torch.int64)
    names = tuple(sorted(set(labels), key=natural_key))
    index = {name: label for label, name in enumerate(names)}
    return names, torch.tensor([index[label] for label in labels], dtype=torch.int64)
