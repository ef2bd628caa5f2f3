"""Images without labels: files, folders, patterns, tables and tar shards that a person names, or images in memory."""

import glob
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.config import DataConf
from finetune.data.images.decode import Header, ImageError, check_encoded, error_words, pixels_of, read_image
from finetune.data.packed import PackedStrings
from finetune.data.sources.data_files import DataFile
from finetune.data.sources.layout import LITTER, entries, identity, is_image
from finetune.data.sources.parquet_images import ParquetStore, image_rows
from finetune.data.sources.shards import ShardStore
from finetune.data.sources.stores import FileStore
from finetune.data.sources.table_formats import SEPARATORS, read_blocks
from finetune.data.sources.table_rows import RowPlaces
from finetune.data.sources.tar_files import tar_members
from finetune.data.split import ImageStore, Split
from finetune.system.errors import UserError
from finetune.system.limits import NAME, text_limit
from finetune.system.terminal import printable

EXPECTED = (
    "expected image files, folders of them, patterns such as 'in/*.jpg', tables (.csv, .parquet) or shards (.tar)"
)


class JoinedStore(ImageStore):
    """Several stores, one behind the other."""

    def __init__(self, stores: Sequence[ImageStore], sizes: Sequence[int]) -> None:
        """Take the stores, and how many rows each has."""
        self._stores, self._ends = list(stores), np.cumsum(sizes, dtype=np.int64)

    def _find(self, row: int) -> tuple[ImageStore, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._stores[number], row - (int(self._ends[number - 1]) if number else 0)

    def load(self, row: int) -> Tensor:
        """See `ImageStore`."""
        store, inner = self._find(row)
        return store.load(inner)

    def read(self, row: int) -> bytes:
        """See `ImageStore`."""
        store, inner = self._find(row)
        return store.read(inner)

    def stamp(self, row: int) -> str:
        """See `ImageStore`."""
        store, inner = self._find(row)
        return store.stamp(inner)

    def name_of(self, row: int) -> str:
        """The path of a file; of an image in a shard the path of the shard, then the name in it."""
        store, inner = self._find(row)
        return store.name_of(inner)


class MemoryStore(ImageStore):
    """Images in memory: of Pillow, or uint8 as arrays (height, width, 3) and (height, width), or tensors (3, h, w)."""

    encoded = False

    def __init__(self, images: Sequence[Any]) -> None:
        """Take the images; each is looked at when it is read."""
        self._images = images

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width); raises ImageError."""
        image = self._images[row]
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image))
        if isinstance(image, Image.Image):
            try:
                return pixels_of(image)
            except Exception as error:  # decoders raise nearly any error on damaged bytes; it goes on with a name
                raise ImageError(self.name_of(row), error_words(error)) from error
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image))
            image = image.expand(3, -1, -1) if image.ndim == 2 else image.movedim(-1, 0) if image.ndim == 3 else image
        is_right = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.numel() > 0
        if is_right and image.shape[0] in (1, 3):
            pixels: Tensor = image.expand(3, -1, -1).cpu()
            return pixels
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        expected = "a path, an image of Pillow, an array uint8 (height, width, 3) or a tensor uint8 (3, height, width)"
        raise ImageError(self.name_of(row), f"{found}, expected {expected}")

    def header(self, row: int) -> Header:
        """Size, as RGB."""
        _, height, width = self.load(row).shape
        return Header(height, width, "RGB")

    def read(self, row: int) -> bytes:
        """The pixels."""
        return self.load(row).contiguous().numpy().tobytes()

    def stamp(self, row: int) -> str:
        """Empty: nothing remembers an image in memory."""
        return ""

    def name_of(self, row: int) -> str:
        """The path of a file, also of one that Pillow opened, or `image[row]`."""
        image = self._images[row]
        if isinstance(image, (str, os.PathLike)):
            return os.fspath(image)
        return str(getattr(image, "filename", "") or f"image[{row}]")


class EncodedStore(ImageStore):
    """Image files in memory, such as uploads, each with a name for messages."""

    encoded = False  # the bytes are here: no worker process would read them sooner, and a server starts none

    def __init__(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Take (name, bytes) of each file; they are decoded when they are read."""
        self._files = files

    def read(self, row: int) -> bytes:
        """The bytes of the file; raises ImageError where it is longer than any image that is read."""
        name, data = self._files[row]
        check_encoded(name, len(data), self.max_pixels)
        return data

    def stamp(self, row: int) -> str:
        """Empty: nothing remembers an image in memory."""
        return ""

    def name_of(self, row: int) -> str:
        """The name that came with the file."""
        return self._files[row][0]


def encoded_in_memory(files: Sequence[tuple[str, bytes]]) -> Split:
    """Image files in memory, (name, bytes) each, as a split without labels."""
    return _split(EncodedStore(files), len(files))


def in_memory(images: Sequence[Any]) -> Split:
    """Images in memory as a split without labels."""
    return _split(MemoryStore(images), len(images))


def find_images(places: Iterable[str], *, path_column: str = "path") -> Split:
    """The images at `places`, in the order of these, as a split whose labels are all 0.

    A place is an image file, a folder, looked through at any depth in natural order, a pattern with `*`, `?` or `[`, a
    tar shard, or a table. Its column `path_column` has paths from its own folder on, or in Parquet the images
    themselves. A file of a name that is none of these is taken for an image. A folder counts once, however many links
    lead to it.

    Raises:
        FileNotFoundError: There is nothing at a place.
        UserError: A table or a shard cannot be read, or no image is found at all.
    """
    listed, stores, sizes = list(places), list[ImageStore](), list[int]()
    for place, files in _opened(listed, path_column):
        if files is None and place.lower().endswith(".tar"):
            store, size = _shard(place)
        elif files is None:
            store, size = _table_of_images(place, path_column)
        else:
            names = PackedStrings(files)
            store, size = FileStore("", names), len(names)
        if size:
            stores.append(store)
            sizes.append(size)
    if not stores:
        raise UserError(f"{printable(', '.join(listed[:3])) or 'nothing'}: no images there; {EXPECTED}")
    return _split(JoinedStore(stores, sizes), sum(sizes))


def given_files(paths: Iterable[str]) -> Split:
    """Files by their paths, such as those of the standard input, each taken for an image."""
    names = PackedStrings(paths)
    return _split(FileStore("", names), len(names))


def _split(store: ImageStore, size: int) -> Split:
    return Split(store, torch.arange(size), torch.zeros(size, dtype=torch.int64))


def _opened(places: Iterable[str], path_column: str) -> Iterator[tuple[str, Iterable[str] | None]]:
    """(place, its files), where the files are None for a shard or a table of images; single files come together."""
    single: list[str] = []
    for place in (found for word in places for found in _matches(os.path.expanduser(word))):
        ending = os.path.splitext(place.lower().removesuffix(".gz"))[1]
        if not os.path.isdir(place) and ending != ".tar" and ending not in SEPARATORS:
            single.append(place)
            continue
        if single:
            yield single[0], single
            single = []
        if os.path.isdir(place):
            yield place, _walk(place, set())
        else:
            holds_images = ending == ".tar" or image_rows(place, path_column) is not None
            yield place, None if holds_images else _rows(place, path_column)
    if single:
        yield single[0], single


def _matches(word: str) -> list[str]:
    """The place that a word names, or those that it stands for as a pattern, each once, in order of their names."""
    if os.path.lexists(word):
        return [word]
    matches = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []
    found = list({os.path.realpath(path): path for path in reversed(matches)}.values())[::-1]  # `**` follows links
    if not found:
        what = "no file has a name like that" if glob.has_magic(word) else "there is no such file or folder"
        raise FileNotFoundError(f"{printable(word)}: {what}; {EXPECTED}")
    return found


def _walk(folder: str, seen: set[object]) -> Iterator[str]:
    here = identity(folder)
    if here in seen:
        return
    seen.add(here)
    folders, files = entries(folder)
    yield from (os.path.join(folder, file) for file in sorted(files) if is_image(file))
    for name in folders:
        yield from _walk(os.path.join(folder, name), seen)


def _rows(table: str, path_column: str) -> Iterator[str]:
    """The paths in a table, from the folder of the table on."""
    folder = os.path.dirname(table)
    # The reader of blocks takes two columns or more.
    for block in read_blocks(table, [path_column, path_column], text_limit(DataConf().max_text_mib)):
        for number, cell in zip(block.numbers, block.columns[0], strict=True):
            if not isinstance(cell, str) or not cell.strip() or len(cell) > NAME.most:
                raise UserError(f"{printable(table)}: row {number} has no {path_column}, or no path in it")
            yield os.path.join(folder, cell.strip())


def _table_of_images(table: str, column: str) -> tuple[ImageStore, int]:
    """The images in a column of a Parquet file, and how many there are."""
    ends = image_rows(table, column)
    if ends is None or not len(ends):
        raise UserError(f"{printable(table)}: has no rows")
    places = RowPlaces([table], np.arange(1, int(ends[-1]) + 1))
    return ParquetStore(column, [ends], places), int(ends[-1])


def _shard(path: str) -> tuple[ImageStore, int]:
    """The images in a tar file, and how many there are; what else is in it is left out."""
    names: list[str] = []
    places = array("q")
    try:
        for member, _ in tar_members(path):
            folder, _, file = member.name.rpartition("/")
            if is_image(file) and not file.startswith(".") and LITTER.isdisjoint(folder.split("/")):
                names.append(f"{os.path.basename(path)}/{member.name}")
                places.extend((0, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{printable(path)} is damaged or no tar file ({error}); make it anew or leave it out"
        ) from error
    found = np.frombuffer(places, dtype=np.int64).reshape(-1, 3) if places else np.empty((0, 3), dtype=np.int64)
    return ShardStore([DataFile(path, path)], PackedStrings(names), found, {}), len(names)
