"""A data set of the Hugging Face `datasets` library: from the hub, or from a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf, nearest
from finetune.data.images.decode import Header, ImageError, decode, header_of, natural_key, read_file
from finetune.data.sources.tables import SPLIT_WORDS
from finetune.data.split import SPLITS, Found
from finetune.system.errors import UserError

MARKS = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


class HuggingFaceStore:
    """The image columns of a data set's parts, undecoded, one behind the other."""

    encoded = True

    def __init__(self, name: str, parts: Sequence[tuple[str, Any]]) -> None:
        """Hold (split, column of undecoded images with its fingerprint) pairs of the data set `name`."""
        self._name = name
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for _, part in parts])

    def _find(self, row: int) -> tuple[str, Any, int]:
        place = int(np.searchsorted(self._ends, row, side="right"))
        word, part = self._parts[place]
        return word, part, row - int(self._ends[place]) + len(part)

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        return decode(self.read(row), self.name_of(row))

    def header(self, row: int) -> Header:
        """Size and mode; raises ImageError."""
        return header_of(self.read(row), self.name_of(row))

    def read(self, row: int) -> bytes:
        """The image file; raises ImageError."""
        _, part, index = self._find(row)
        (cell,) = part[index].values()
        if cell is None:
            raise ImageError(self.name_of(row), "the cell is empty")
        return cell["bytes"] if cell["bytes"] is not None else read_file(cell["path"])

    def stamp(self, row: int) -> str:
        """The data set's own fingerprint, and the number."""
        _, part, index = self._find(row)
        return f"{part._fingerprint}:{index}"

    def name_of(self, row: int) -> str:
        """Data set, split and number."""
        word, _, index = self._find(row)
        return f"{self._name}/{word}[{index}]"


def find_hugging_face(conf: DataConf) -> Found:
    """The data set `data.name`, its splits as they are; `val` or `test` that it lacks is cut from `train`.

    Raises:
        ValueError: It cannot be opened, lacks a column, or its columns hold no images and labels.
    """
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise UserError("data=hf needs the datasets library: pip install 'finetune[hf]'") from error
    name = os.path.expanduser(conf.name or "")
    parts, left_out = _parts(_open(datasets, name, conf), name)
    for _, part in parts.values():
        for key, column in (("image_column", conf.image_column), ("label_column", conf.label_column)):
            if column not in part.column_names:
                known = ", ".join(part.column_names)
                raise UserError(
                    f"data.{key}={column}: no such column{nearest(column, part.column_names)}; it has {known}"
                )
    first = parts["train"][1]
    if not isinstance(first.features[conf.image_column], datasets.Image):
        raise UserError(f"data.image_column={conf.image_column}: holds {first.features[conf.image_column]}, no images")
    classes, labels = _labels([part for _, part in parts.values()], conf.label_column)
    images = [
        (word, part.select_columns([conf.image_column]).cast_column(conf.image_column, datasets.Image(decode=False)))
        for word, part in parts.values()
    ]
    store = HuggingFaceStore(name, images)
    sizes = [len(part) for _, part in images]
    return Found(
        kind="hf",
        store=store,
        names=[store.name_of(row) for row in range(sum(sizes))],
        classes=classes,
        labels=labels,
        given=torch.from_numpy(np.repeat(np.array([SPLITS.index(split) for split in parts], dtype=np.uint8), sizes)),
        place=f"data.name={name}",
        title=f"hf {name}",
        note=f" [left out: {', '.join(left_out)}]" if left_out else "",
        location=f"hf:{name}",
    )


def _open(datasets: Any, name: str, conf: DataConf) -> Any:
    """A Dataset, or a dict of them; from the hub only what is there already unless `data.download` is true."""
    try:
        if any(os.path.exists(os.path.join(name, mark)) for mark in MARKS):
            return datasets.load_from_disk(name)
        local = os.path.exists(name)
        offline = datasets.DownloadConfig(local_files_only=not (conf.download or local))
        return datasets.load_dataset(name, conf.subset, download_config=offline)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        how = "" if conf.download else "; a data set of the hub that is not here yet needs data.download=true"
        raise UserError(f"data.name={name}: cannot be opened: {' '.join(str(error).split())[:300]}{how}") from error


def _parts(opened: Any, name: str) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Split -> (its word there, data set), in the order of SPLITS; and the words of parts that are none of these."""
    named = opened if isinstance(opened, dict) else {"train": opened}
    found: dict[str, tuple[str, Any]] = {}
    left_out = []
    for word, part in named.items():
        place = SPLIT_WORDS.get(str(word).lower())
        if place is None or SPLITS[place] in found:
            left_out.append(f"{word} ({len(part):,})")
        else:
            found[SPLITS[place]] = (str(word), part)
    if "train" not in found:
        raise UserError(f"data.name={name}: has no train split, only {', '.join(named)}")
    return {split: found[split] for split in SPLITS if split in found}, left_out


def _unwrapped(feature: Any) -> tuple[bool, Any]:
    """Whether a cell is a list, and what one label is."""
    if isinstance(feature, list):  # how versions before 4 wrote it
        return True, feature[0]
    if type(feature).__name__ in ("List", "LargeList", "Sequence"):
        return True, feature.feature
    return False, feature


def _labels(parts: Sequence[Any], column: str) -> tuple[tuple[str, ...], Tensor]:
    """Classes and labels: int64 (n,), or float32 (n, classes) where a cell is a list.

    A ClassLabel keeps its own order; texts and numbers come in natural order.
    """
    feature = parts[0].features[column]
    several, inner = _unwrapped(feature)
    names = tuple(inner.names) if type(inner).__name__ == "ClassLabel" else None
    if names is None and str(inner.dtype).startswith(("float", "dict", "list")):
        raise UserError(f"data.label_column={column}: holds {inner}, expected class names or whole numbers")
    cells = [cell for part in parts for cell in part[column]]
    problem = next((row for row, cell in enumerate(cells) if cell is None), None)
    if problem is not None:
        raise UserError(f"data.label_column={column}: row {problem} (from 0, over all splits) has no label")
    lists = [list(cell) if several else [cell] for cell in cells]
    if names is None:
        words = {str(word) for cell in lists for word in cell}
        names = tuple(sorted(words, key=natural_key))
        index: dict[Any, int] = {name: label for label, name in enumerate(names)}
        numbers = [[index[str(word)] for word in cell] for cell in lists]
    else:
        numbers = [[int(word) for word in cell] for cell in lists]
        hidden = [row for row, cell in enumerate(numbers) if any(label < 0 for label in cell)]
        if hidden:
            raise UserError(
                f"data.label_column={column}: {len(hidden):,} rows have label -1: their labels are withheld"
            )
    if not several:
        return names, torch.tensor([label for (label,) in numbers], dtype=torch.int64)
    table = torch.zeros(len(numbers), len(names))
    for row, labels in enumerate(numbers):
        table[row, labels] = 1
    return names, table
