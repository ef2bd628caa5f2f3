"""Any classification data set of `torchvision.datasets`, by the name of its class."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.config import DataConf, nearest
from finetune.data.images.decode import Header, ImageError, error_words, pixels_of
from finetune.data.sources.stores import PartsStore, file_stamp, hash_of, stamp_of_files
from finetune.data.split import FoundImages
from finetune.system.errors import UserError

# Values of torchvision's `split=` for each split; the first that a data set accepts is used.
_SPLIT_WORDS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
# Attributes in which torchvision's data sets store their labels: as a list of labels, or of (path, label).
_LABEL_NAMES = ("targets", "labels", "_labels", "y", "_samples", "samples")
# Data sets for which torchvision unpickles a file without comparing its checksum first.
_PICKLED = ("LSUN", "LSUNClass")
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class TorchvisionStore(PartsStore):
    """The splits of a data set. torchvision gives decoded images and no file names."""

    encoded = False

    def __init__(self, name: str, root: str, parts: Mapping[str, tuple[str, Any]]) -> None:
        """Take the data set `name` in the folder `root`, and its splits."""
        super().__init__(name, parts)
        self._root = os.path.abspath(root)

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        _, part, index = self.find(row)
        try:
            image = part[index][0]
            if isinstance(image, Image.Image):
                return pixels_of(image)
        except Exception as error:  # torchvision's readers raise any error; the ImageError names the image
            raise ImageError(self.name_of(row), error_words(error)) from error
        raise ImageError(self.name_of(row), f"expected a picture, got {type(image).__name__}")

    def header(self, row: int) -> Header:
        """The size of the decoded image, since torchvision gives no file to read a header from."""
        _, height, width = self.load(row).shape
        return Header(height, width, "RGB")

    def read(self, row: int) -> bytes:
        """Shape and pixels, since torchvision gives no file."""
        pixels = self.load(row)
        return str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()

    def size(self, row: int) -> int | None:
        """The number of bytes of an image that lies in memory; None where each would have to be decoded."""
        _, part, _ = self.find(row)
        pixels = vars(part).get("data")
        return int(np.prod(pixels.shape[1:])) if isinstance(pixels, (np.ndarray, Tensor)) else None

    def stamp(self, row: int) -> str:
        """Its place, with a hash of the pixels in memory, the `file_stamp` of its file, or a hash of all files."""
        word, part, index = self.find(row)
        place = f"torchvision:{len(part)}:{index}:{word}:{self._root}/{self._name}"
        pixels = vars(part).get("data")
        if isinstance(pixels, (np.ndarray, Tensor)):
            return f"{hash_of(np.ascontiguousarray(pixels[index]).tobytes())}:{place}"
        path = _file_of(part, index)
        return f"{file_stamp(path)}:{place}" if path is not None else f"{self._files}:{place}"

    @functools.cached_property
    def _files(self) -> str:
        """A hash of the `file_stamp`s of all files in the folder."""
        paths = (os.path.join(folder, file) for folder, _, files in os.walk(self._root) for file in files)
        return stamp_of_files(sorted(paths))


def _file_of(part: Any, index: int) -> str | None:
    """The path of an image, out of a list of paths, or of (path, label), that the data set stores; None without one."""
    for values in vars(part).values():
        if isinstance(values, (list, tuple)) and len(values) == len(part):
            value = values[index][0] if isinstance(values[index], (list, tuple)) and values[index] else values[index]
            if isinstance(value, (str, Path)) and os.path.isfile(value):
                return os.path.abspath(value)
    return None


def find_torchvision(conf: DataConf) -> FoundImages:
    """The data set `data.name` under `data.root`, downloaded only with `data.download=true`.

    The data set's own splits are used; `val` or `test` is cut from `train` if it is missing. Classes keep their order.
    Raises UserError if there is no such data set on this machine, or if it has no images with one label each.
    """
    import torchvision.datasets as library

    name, root = conf.name or "", os.path.expanduser(conf.root or "")
    known = [word for word in library.__all__ if inspect.isclass(vars(library).get(word)) and word != "FakeData"]
    if name in _PICKLED:
        raise UserError(
            f"data.name={name}: torchvision reads it by a pickle of the folder you start in, which can run any"
            " program; give the images as data=folder"
        )
    if name not in known:
        instead = f"{nearest(name, known)}; it has {', '.join(known)}"
        raise UserError(f"data.name={name}: torchvision has no such data set{instead}")
    parts = _open_parts(vars(library)[name], name, root, download=conf.download)
    labels = [_labels(name, part) for _, part in parts.values()]
    store = TorchvisionStore(name, root, parts)
    return FoundImages(
        store=store,
        names=store.names(),
        classes=_classes(parts["train"][1], labels),
        labels=torch.from_numpy(np.concatenate(labels)),
        given=store.given,
        place=f"data.name={name}",
        title=f"torchvision {name} in {root}",
        location=os.path.abspath(root),
    )


def _open_parts(kind: Callable[..., Any], name: str, root: str, *, download: bool) -> dict[str, tuple[str, Any]]:
    """Split -> (torchvision's word for it, data set)."""
    accepted = inspect.signature(kind).parameters
    positional = [item for item in accepted.values() if item.kind is item.POSITIONAL_OR_KEYWORD]
    required = [item.name for item in positional if item.default is item.empty]
    if required not in (["root"], []) or "root" not in accepted:
        raise UserError(f"data.name={name}: asks for {', '.join(required)}, so it cannot be opened by its name alone")
    options: dict[str, Any] = {"download": download} if "download" in accepted else {}
    if download and not options:
        raise UserError(f"data.download=true would be ignored: torchvision does not download {name}; put it in {root}")
    tries: list[tuple[str, str, dict[str, Any]]]
    if "split" in accepted:
        tries = [(split, word, {"split": word}) for split, words in _SPLIT_WORDS.items() for word in words]
    elif "train" in accepted:
        tries = [("train", "train", {"train": True}), ("test", "test", {"train": False})]
    else:
        tries = [("train", "all", {})]
    parts: dict[str, tuple[str, Any]] = {}
    refusals = []
    for split, word, choice in tries:
        if split in parts:
            continue
        try:
            parts[split] = (word, kind(root, **choice, **options))
        except ValueError as error:  # it knows no such split
            refusals.append(str(error))
        except (RuntimeError, OSError) as error:
            if split == "train":
                how = "data.download=true fetches it" if options else "torchvision does not download it"
                problem = f"cannot be opened in data.root={root} ({' '.join(str(error).split())[:200]})"
                raise UserError(f"data.name={name}: {problem}; {how}") from error
            refusals.append(str(error))
    if "train" not in parts:
        raise UserError(f"data.name={name}: has no train split ({'; '.join(refusals)[:300]})")
    return parts


def _labels(name: str, part: Any) -> Labels:
    """The label of every image, int64 (n,). Images are decoded only if the data set stores no list of labels."""
    for word in _LABEL_NAMES:
        values = vars(part).get(word)
        if values is None or len(values) != len(part):
            continue
        labels = _as_labels([value[1] if word.endswith("samples") else value for value in values])
        # The list is used only if it agrees with the data set's own first and last label.
        if labels is not None and all(_as_labels([part[index][1]]) == labels[index] for index in (0, len(part) - 1)):
            return labels
    labels = _as_labels([part[index][1] for index in range(len(part))])
    if labels is None:
        raise UserError(f"data.name={name}: its labels are no class numbers, so it is no classification data set")
    return labels


def _as_labels(values: Sequence[Any]) -> Labels | None:
    try:
        array = np.asarray([int(value) for value in values])
    except (TypeError, ValueError, RuntimeError):
        return None
    return array.astype(np.int64) if len(array) and array.min() >= 0 else None


def _classes(part: Any, labels: Sequence[Any]) -> tuple[str, ...]:
    """The data set's class names in its order; numbers if it has none."""
    count = max(int(array.max()) for array in labels) + 1
    for read in (attrgetter("classes"), attrgetter("categories")):
        try:
            # ImageNet's names are tuples of synonyms.
            words = tuple(str(word[0] if isinstance(word, (tuple, list)) else word) for word in read(part))
        except (AttributeError, TypeError):
            continue
        if len(words) >= count and len(set(words)) == len(words):
            return words
    return tuple(str(label) for label in range(count))
