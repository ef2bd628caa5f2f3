"""Tar shards in the layout of WebDataset. An index of all shards finds every image by its number.

With the index an epoch shows every image once, in an order over all shards, and a resumed run goes on in that order.
Shards at a URL, or from a command, are downloaded once and read from the disk from then on.
"""

import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.config.data import group_column
from finetune.data.images.decode import ImageError, check_encoded, error_words
from finetune.data.labels import LabelError, LabelReader
from finetune.data.packed import PackedStrings
from finetune.data.sources.data_files import DataFile, place_name
from finetune.data.sources.fetching import RemoteFile, condemn
from finetune.data.sources.layout import in_brackets
from finetune.data.sources.remote_shards import CLASS_FILES, fetch_shards, fetched_class_files
from finetune.data.sources.samples import SHOWN, Samples
from finetune.data.sources.shard_lists import LAYOUT, list_shards, places
from finetune.data.sources.stores import file_stamp
from finetune.data.sources.tar_files import tar_members
from finetune.data.split import SPLITS, FoundImages, Groups, ImageStore
from finetune.system.errors import UserError
from finetune.system.limits import Limit, read_text, text_limit, text_lines, text_of
from finetune.system.reading import DamagedError
from finetune.system.seals import SealedFile, read_sealed
from finetune.system.terminal import counted


class ShardStore(ImageStore):
    """Images inside tar files. Each read opens the shard anew, so that worker processes share no open file."""

    def __init__(
        self,
        shards: Sequence[DataFile],
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
        """The shard's `file_stamp`, and the image's place in it; raises ImageError."""
        shard, offset, size = self._places[row].tolist()
        try:
            return f"{offset}:{size}:{file_stamp(self._shards[shard])}"
        except ImageError as error:
            raise ImageError(self.name_of(row), error.reason) from error.__cause__

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

    def __init__(self, labels: LabelReader) -> None:
        self.places = array("q")
        self.keys: list[str] = []
        self.labels = labels
        self.given = bytearray()
        self.groups: list[Any] = []  # `data.group` in the .json of each image, if it is a key

    def take_out_withheld(self, shards: Sequence[DataFile]) -> Counter[str]:
        """Take out the images of val and test whose labels are withheld, and count them.

        Raises UserError for images without a label beside others of their split that have one.
        """
        stays, left_out = self.labels.take_out_withheld(self.given)
        if left_out:
            self.places = array("q", compress(self.places, chain.from_iterable(zip(stays, stays, stays, strict=True))))
            self.keys = list(compress(self.keys, stays))
            self.given = bytearray(compress(self.given, stays))
            self.groups = list(compress(self.groups, stays))
        if lacking := self.labels.lacking:
            folders = [os.path.dirname(shards[self.places[3 * place]].name) for place in lacking[:SHOWN]]
            some = [os.path.join(folder, self.keys[place]) for folder, place in zip(folders, lacking, strict=False)]
            without = f"{counted(len(lacking), 'image')} without a label, such as {', '.join(some)}"
            raise UserError(f"data.root: {without}; other images of the split have one; {LAYOUT}")
        return left_out


def find_shards(conf: DataConf) -> FoundImages:
    """The images of all shards at `data.root`: folders, perhaps with `train/ val/ test/`, patterns, URLs, commands.

    Raises FileNotFoundError without shards; UserError if a shard is damaged or missing, or an image has no label.
    """
    shards, left_out = list_shards(conf)
    index = _Index(LabelReader(conf.label_column, names=conf.classes))
    sealed = {}
    for number, shard in enumerate(shards):
        if shard.remote is None:
            left_out += _read_shard(shard, number, conf, index)
        else:
            more, sealed[number] = _read_fetched(shard, shard.remote, number, conf, index)
            left_out += more
    root = "::".join(map(place_name, places(conf)))
    empty = {shard.split or 0 for shard in shards} - {*index.given}
    left_out += index.take_out_withheld(shards)
    note = in_brackets(left_out)
    if not index.keys:
        raise UserError(f"data.root={root}: no images in {counted(len(shards), 'shard')}{note}; {LAYOUT}")
    if empty:
        words = " and ".join(SPLITS[split] for split in sorted(empty))
        raise UserError(f"data.root={root}: the shards of {words} hold no images{note}; {LAYOUT}")
    files = _class_files(shards[0], conf)
    classes, labels = _classes(files, index.labels, text_limit(conf.max_text_mib), root, 0 in sealed)
    keys = PackedStrings(index.keys)
    return FoundImages(
        store=ShardStore(shards, keys, np.frombuffer(index.places, dtype=np.int64).reshape(-1, 3), sealed),
        names=keys,
        classes=classes,
        labels=labels,
        given=torch.frombuffer(index.given, dtype=torch.uint8),
        place=f"data.root={root}",
        title=f"webdataset {root} ({counted(len(shards), 'shard')})",
        note=note,
        location=os.path.abspath(root),
        warnings=index.labels.warnings,
        groups=None if group_column(conf) is None else Groups.of(index.groups),
    )


def _read_fetched(
    shard: DataFile, remote: RemoteFile, number: int, conf: DataConf, index: _Index
) -> tuple[Counter[str], SealedFile]:
    """`_read_shard` of a downloaded shard; a damaged one is downloaded again."""
    path = Path(shard.path)
    try:
        sealed = SealedFile(path)
        left_out = _read_shard(shard, number, conf, index, sealed)
    except DamagedError:
        condemn(path)
        fetch_shards([remote], conf)
        sealed = SealedFile(path)
        left_out = _read_shard(shard, number, conf, index, sealed)
    return left_out, sealed


def _read_shard(
    shard: DataFile, number: int, conf: DataConf, index: _Index, sealed: SealedFile | None = None
) -> Counter[str]:
    """Add the images of a shard to `index`; the numbers of files of each kind that are no images and no labels."""
    samples = Samples(f"data.root: {shard.name}", text_limit(conf.max_text_mib), conf.label_column)
    try:
        for member, tar in tar_members(shard.path, sealed):
            samples.add(member, tar)
    except PermissionError as error:
        raise UserError(f"data.root: {shard.path} may not be read (permission denied); change its rights") from error
    except (tarfile.TarError, OSError) as error:
        problem = f"{shard.path} is damaged or no tar file ({error})"
        raise UserError(f"data.root: {problem}; make it anew or remove it") from error
    group_key = group_column(conf)
    split = shard.split or 0
    for sample in samples.labelled(all_have=not split):
        try:
            index.labels.take(sample.label, split)
        except LabelError as error:
            raise UserError(f"data.root: {shard.name}: {sample.name} {error}; {LAYOUT}") from None
        index.places.extend((number, sample.offset, sample.size))
        index.keys.append(f"{os.path.basename(shard.name)}/{sample.name}")
        index.given.append(split)
        if group_key is not None:
            index.groups.append(sample.more.get(group_key))
    return samples.left_out


def _class_files(first: DataFile, conf: DataConf) -> list[Path]:
    """Lists of class names beside the first shard, in `data.root` itself, or in the folder above; the nearest first."""
    if first.remote is not None:
        return fetched_class_files(first.remote, conf)
    folder = os.path.dirname(first.path)
    near = (folder, places(conf)[0], os.path.dirname(folder))
    return [path for place in near for file in CLASS_FILES if (path := Path(place, file)).is_file()]


def _classes(
    files: Sequence[Path], labels: LabelReader, limit: Limit, root: str, is_fetched: bool
) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels, see `LabelReader.tensor`.

    If labels are numbers and there is a list of class names, they are line numbers of the list, from 0. Else the labels
    themselves are the names, in natural order.
    """
    if files and labels.known and all(label.isdecimal() for label in labels.known):
        path = files[0]
        subject = f"data.root: {path}"
        text = text_of(read_sealed(path), subject) if is_fetched else read_text(path, subject, limit)
        names = tuple(text_lines(text))
        numbers = {label: int(label) for label in labels.known}
        highest = max(numbers.values())
        if highest >= len(names) or len(set(names)) < len(names):
            expected = f"one for each label up to {str(highest)[:20]}, all different"
            raise UserError(f"{path}: has {counted(len(names), 'name')}, expected {expected}")
        return names, labels.tensor(names, numbers)
    names = labels.names(f"data.root={root}")
    return names, labels.tensor(names)
