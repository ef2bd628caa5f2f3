"""Tar shards in the layout of WebDataset. An index of all shards finds every image by its number.

With the index an epoch shows every image once, in an order over all shards, and a resumed run goes on in that order.
Shards at a URL, or from a command, are downloaded once and read from the disk from then on.
"""

import glob
import json
import math
import os
import re
import tarfile
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.config.data import group_column
from finetune.data.images.decode import EXTENSIONS, ImageError, check_encoded, error_words, natural_key
from finetune.data.packed import PackedStrings
from finetune.data.sources.fetching import RemoteFile, condemn, is_remote
from finetune.data.sources.remote_shards import CLASS_FILES, fetch_shards, fetched_class_files
from finetune.data.sources.tar_files import tar_members
from finetune.data.split import SPLIT_WORDS, FoundImages, Groups, ImageStore
from finetune.system.errors import UserError
from finetune.system.limits import NAME, Limit, read_text, text_limit, text_of
from finetune.system.reading import DamagedError
from finetune.system.seals import SealedFile, read_sealed

SHARDS = Limit(1_000_000, "a larger number is most likely a typing mistake", "shards")  # in one pattern
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{},\s]+(?:,[^{},\s]+)+)\}")
LAYOUT = "expected .tar shards with pairs such as 0001.jpg and 0001.cls (a class number or name)"


@dataclass(frozen=True)
class Shard:
    """A tar file on this machine, which was perhaps downloaded from `remote`."""

    path: str
    name: str  # in messages: the path, or the address that it was downloaded from
    split: int = 0  # index into SPLITS
    remote: RemoteFile | None = None


class ShardStore(ImageStore):
    """Images inside tar files. Each read opens the shard anew, so that worker processes share no open file."""

    def __init__(
        self,
        shards: Sequence[Shard],
        keys: PackedStrings,
        places: np.ndarray[Any, Any],
        sealed: Mapping[int, SealedFile],
    ) -> None:
        """Take the shards, the name of each image, and its (shard, offset, size), int64 (n, 3).

        `sealed` has the downloaded ones of the shards by their index.
        """
        self._sealed = sealed
        self._shards = [shard.path for shard in shards]
        self._folders = [os.path.dirname(shard.name) for shard in shards]
        self._keys, self._places = keys, places

    def read(self, row: int) -> bytes:
        """The bytes of the image file; raises ImageError, or DamagedError for a downloaded shard."""
        return self.tail(row, self.size(row))

    def size(self, row: int) -> int:
        """The length of the image file."""
        return int(self._places[row, 2])

    def tail(self, row: int, count: int) -> bytes:
        """The last `count` bytes of the image file; raises as `read` does."""
        shard, offset, size = self._places[row].tolist()
        check_encoded(self.name_of(row), size, self.max_pixels)
        offset, size = offset + max(0, size - count), min(size, count)
        sealed = self._sealed.get(shard)
        try:
            if sealed is not None:
                return sealed.read(offset, size)
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except DamagedError as error:
            condemn(Path(self._shards[shard]))
            raise DamagedError(f"{error}; data.download=true fetches it again") from error
        except OSError as error:
            raise ImageError(self.name_of(row), error_words(error)) from error
        if len(data) != size:
            raise ImageError(self.name_of(row), "the shard ends within the image")
        return data

    def stamp(self, row: int) -> str:
        """Size and time of the shard, and the image's place in it; raises ImageError."""
        shard, offset, size = self._places[row].tolist()
        try:
            status = os.stat(self._shards[shard])
        except OSError as error:
            raise ImageError(self.name_of(row), error_words(error)) from error
        return f"{status.st_size}:{status.st_mtime_ns}:{offset}:{size}:{self._shards[shard]}"

    def key_of(self, row: int) -> str:
        """The name of the shard, then the name of the file in it."""
        return f"{os.path.basename(self._shards[int(self._places[row, 0])])}/{self._keys[row]}"

    def num_bytes(self, row: int) -> int:
        """The size of the image file in its shard."""
        return int(self._places[row, 2])

    def name_of(self, row: int) -> str:
        """Path or address of the shard, then the name of the file in it."""
        return os.path.join(self._folders[int(self._places[row, 0])], self._keys[row])


class _Index:
    """The images of all shards: (shard, offset, size), name, label and split of each, in flat lists."""

    def __init__(self) -> None:
        self.places = array("q")
        self.keys: list[str] = []
        self.labels: list[str] = []
        self.given = bytearray()
        self.groups: list[Any] = []  # `data.group` in the .json of each image, if it is a key


def find_shards(conf: DataConf) -> FoundImages:
    """The images of all shards at `data.root`: folders, perhaps with `train/ val/ test/`, patterns, URLs, commands.

    Raises FileNotFoundError without shards; UserError if a shard is damaged or missing, or an image has no label.
    """
    shards = _list_shards(conf)
    index = _Index()
    sealed = {}
    for number, shard in enumerate(shards):
        if shard.remote is None:
            _read_shard(shard, number, conf, index)
        else:
            sealed[number] = _read_fetched(shard, shard.remote, number, conf, index)
    root = "::".join(_name(part) for part in _parts(conf))
    if not index.keys:
        raise UserError(f"data.root={root}: no images in {len(shards)} shards; {LAYOUT}")
    classes, labels = _classes(_class_files(shards[0], conf), index.labels, text_limit(conf.max_text_mib), 0 in sealed)
    keys = PackedStrings(index.keys)
    return FoundImages(
        store=ShardStore(shards, keys, np.frombuffer(index.places, dtype=np.int64).reshape(-1, 3), sealed),
        names=keys,
        classes=classes,
        labels=labels,
        given=torch.frombuffer(index.given, dtype=torch.uint8),
        place=f"data.root={root}",
        title=f"webdataset {root} ({len(shards)} shards)",
        location=os.path.abspath(root),
        groups=None if group_column(conf) is None else Groups.of(index.groups),
    )


def _parts(conf: DataConf) -> list[str]:
    """The places in `data.root`, which `::` separates as in WebDataset."""
    return [os.path.expanduser(part) for part in (conf.root or "").split("::")]


def _name(part: str) -> str:
    return RemoteFile(part).name if is_remote(part) else part


def _list_shards(conf: DataConf) -> list[Shard]:
    """Every shard once, in natural order of the names; downloads those that are not on this machine."""
    found: set[Shard] = set()
    remotes: dict[RemoteFile, None] = {}  # each once, in this order
    for part in _parts(conf):
        if is_remote(part):
            remotes |= dict.fromkeys(map(RemoteFile, _expand_braces(part)))
        elif os.path.isdir(part):
            found |= set(_in_folder(part))
        else:
            found |= {Shard(path, path) for pattern in _expand_braces(part) for path in glob.glob(pattern)}
    if remotes:
        paths = fetch_shards(list(remotes), conf)
        found |= {Shard(str(path), remote.name, 0, remote) for path, remote in zip(paths, remotes, strict=True)}
    if not found:
        raise FileNotFoundError(f"data.root={conf.root}: no .tar files there; {LAYOUT}")
    return sorted(_with_splits(found), key=lambda shard: (natural_key(shard.name), shard.path))


def _in_folder(folder: str, split: int | None = None) -> Iterator[Shard]:
    """The shards in a folder of one split; without `split` also those in its `train/ val/ test/`."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as error:  # without this error a split would be missing and nobody would know
        raise UserError(f"data.root: {folder} may not be listed (permission denied); change its rights") from error
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".tar") and not name.startswith("."):
            yield Shard(path, path, split or 0)
        elif split is None and name.lower() in SPLIT_WORDS and os.path.isdir(path):
            yield from _in_folder(path, SPLIT_WORDS[name.lower()])


def _with_splits(shards: Collection[Shard]) -> Collection[Shard]:
    """The shards with the splits that their names give, such as `val/000.tar` or `val-000.tar`.

    Names count only if some shards are named after train and others after val or test. Else the splits are cut by seed.
    """
    splits: dict[Shard, int | None] = {}
    for shard in shards:
        *_, folder, file = ("", *shard.name.replace(os.sep, "/").split("/"))
        words = (word.lower() for word in (folder, *re.split(r"[-_.]", file)))
        splits[shard] = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
    named = set(splits.values())
    if any(shard.split for shard in shards) or 0 not in named or not named & {1, 2}:
        return shards
    return [replace(shard, split=split or 0) for shard, split in splits.items()]


def _expand_braces(pattern: str) -> list[str]:
    """`{train,val}-{000..012}.tar` -> each of the 26 names."""
    subject = f"data.root={_name(pattern)[:200]}"
    SHARDS.check(subject, math.prod(len(_middles(found)) for found in _BRACES.finditer(pattern)))
    names = [pattern]
    while found := _BRACES.search(names[0]):
        # Every name has as many braces, since what stands in their place holds none.
        SHARDS.check(subject, len(names) * len(_middles(found)))
        matches = [match for name in names if (match := _BRACES.search(name))]
        names = [
            f"{match.string[: match.start()]}{middle}{match.string[match.end() :]}"
            for match in matches
            for middle in _middles(match)
        ]
    return names


def _middles(braces: re.Match[str]) -> Sequence[str]:
    """What `_BRACES` stands for: the words, or the numbers with as many digits as the first one."""
    first, last, words = braces.groups()
    if words:
        return str(words).split(",")
    for end in (first, last):
        SHARDS.check(f"data.root: {braces[0][:200]}", 0 if len(end) < 19 else 10**18)
    count = abs(int(last) - int(first)) + 1
    SHARDS.check(f"data.root: {braces[0]}", count)
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + step, step)]


def _read_fetched(shard: Shard, remote: RemoteFile, number: int, conf: DataConf, index: _Index) -> SealedFile:
    """`_read_shard` of a downloaded shard; a damaged one is downloaded again."""
    path = Path(shard.path)
    try:
        sealed = SealedFile(path)
        _read_shard(shard, number, conf, index, sealed)
    except DamagedError:
        condemn(path)
        fetch_shards([remote], conf)
        sealed = SealedFile(path)
        _read_shard(shard, number, conf, index, sealed)
    return sealed


def _read_shard(shard: Shard, number: int, conf: DataConf, index: _Index, sealed: SealedFile | None = None) -> None:
    """Add the images of a shard to `index`. Files of one sample share the name up to its first dot."""
    texts = text_limit(conf.max_text_mib)
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    groups: dict[str, Any] = {}
    group_key = group_column(conf)
    try:
        for member, tar in tar_members(shard.path, sealed):
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            if not stem:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if f".{ending.lower()}" in EXTENSIONS:
                if key in images:
                    both = f"{images[key][0]} and {member.name}"
                    raise UserError(f"data.root: {shard.name}: {both} are both the image of {key}")
                images[key] = (member.name, member.offset_data, member.size)
            elif ending in ("cls", "json"):
                subject = f"data.root: {shard.name}: {member.name}"
                texts.check(subject, member.size)
                tar.seek(member.offset_data)
                content = tar.read(member.size)
                if ending == "json" and group_key is not None:
                    groups[key] = _json(content).get(group_key)
                label = _label(content, ending, conf.label_column)
                if label is not None and (ending == "cls" or key not in labels):
                    NAME.check(f"{subject}: the label", len(label))
                    labels[key] = label
    except PermissionError as error:
        raise UserError(f"data.root: {shard.path} may not be read (permission denied); change its rights") from error
    except (tarfile.TarError, OSError) as error:
        problem = f"{shard.path} is damaged or no tar file ({error})"
        raise UserError(f"data.root: {problem}; make it anew or remove it") from error
    without_label = [name for key, (name, _, _) in images.items() if key not in labels]
    if without_label:
        some = f"{len(without_label):,} images have no label, such as {', '.join(without_label[:5])}"
        raise UserError(
            f"data.root: {shard.name}: {some}; {LAYOUT}, or a .json with {conf.label_column!r} (data.label_column)"
        )
    for key, (name, offset, size) in images.items():
        index.places.extend((number, offset, size))
        index.keys.append(f"{os.path.basename(shard.name)}/{name}")
        index.labels.append(labels[key])
        index.given.append(shard.split)
        if group_key is not None:
            index.groups.append(groups.get(key))


def _json(content: bytes) -> dict[str, Any]:
    """The object in a .json file; empty if there is none in it."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _label(content: bytes, ending: str, label_key: str) -> str | None:
    if ending == "cls":
        try:
            return content.decode("utf-8").strip() or None
        except ValueError:
            return None
    value = _json(content)
    return str(value[label_key]) or None if label_key in value else None


def _class_files(first: Shard, conf: DataConf) -> list[Path]:
    """Lists of class names beside the first shard, in `data.root` itself, or in the folder above; the nearest first."""
    if first.remote is not None:
        return fetched_class_files(first.remote, conf)
    folder = os.path.dirname(first.path)
    places = [Path(place, file) for place in (folder, _parts(conf)[0], os.path.dirname(folder)) for file in CLASS_FILES]
    return [place for place in places if place.is_file()]


def _classes(
    files: Sequence[Path], labels: Sequence[str], limit: Limit, is_fetched: bool
) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels, int64 (n,).

    If labels are numbers and there is a list of class names, they are line numbers of the list, from 0. Else the labels
    themselves are the names, in natural order.
    """
    if files and all(label.isdecimal() for label in labels):
        path = files[0]
        subject = f"data.root: {path}"
        text = text_of(read_sealed(path), subject) if is_fetched else read_text(path, subject, limit)
        lines = text.splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        highest = max(map(int, labels))
        if highest >= len(names) or len(set(names)) < len(names):
            expected = f"one for each label up to {str(highest)[:20]}, all different"
            raise UserError(f"{path}: has {len(names)} names, expected {expected}")
        return names, torch.tensor([int(label) for label in labels], dtype=torch.int64)
    names = tuple(sorted(set(labels), key=natural_key))
    index = {name: label for label, name in enumerate(names)}
    return names, torch.tensor([index[label] for label in labels], dtype=torch.int64)
