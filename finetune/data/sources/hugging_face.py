"""A data set of the Hugging Face `datasets` library: from the hub, or from a local folder."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.config import DataConf, nearest
from finetune.config.data import group_column
from finetune.data.images.decode import ImageError, check_encoded, natural_key, read_file
from finetune.data.sources.stores import PartsStore
from finetune.data.split import SPLITS, FoundImages, Groups
from finetune.data.split_words import split_of
from finetune.system.errors import UserError


class HuggingFaceStore(PartsStore):
    """The image column of each split of a data set, undecoded."""

    def read(self, row: int) -> bytes:
        """The bytes of the image file; raises ImageError."""
        _, part, index = self.find(row)
        (cell,) = part[index].values()
        if cell is None:
            raise ImageError(self.name_of(row), "the cell is empty")
        if cell["bytes"] is None:
            return read_file(cell["path"], self.max_pixels)
        data: bytes = cell["bytes"]
        check_encoded(self.name_of(row), len(data), self.max_pixels)
        return data

    def stamp(self, row: int) -> str:
        """The library's fingerprint of the split, and the index in it."""
        _, part, index = self.find(row)
        return f"{part._fingerprint}:{index}"


def find_hugging_face(conf: DataConf) -> FoundImages:
    """The data set `data.name` with its own splits; `val` or `test` is cut from `train` if the data set lacks it.

    Raises UserError if it cannot be opened, lacks a column, or if its columns hold no images and labels.
    """
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise UserError("data=hf needs the datasets library: pip install 'finetune[hf]'") from error
    name, groups = os.path.expanduser(conf.name or ""), group_column(conf)
    parts, left_out = _parts(_open(datasets, name, conf), name)
    for _, part in parts.values():
        columns = {"image_column": conf.image_column, "label_column": conf.label_column, "group": groups}
        for key, column in columns.items():
            if column is not None and column not in part.column_names:
                known = f"{nearest(column, part.column_names)}; it has {', '.join(part.column_names)}"
                raise UserError(f"data.{key}={column}: no such column{known}")
    first = parts["train"][1]
    if not isinstance(first.features[conf.image_column], datasets.Image):
        raise UserError(f"data.image_column={conf.image_column}: holds {first.features[conf.image_column]}, no images")
    classes, labels = _labels([part for _, part in parts.values()], conf.label_column)
    images = {}
    for split, (word, part) in parts.items():
        column = part.select_columns([conf.image_column])
        images[split] = (word, column.cast_column(conf.image_column, datasets.Image(decode=False)))
    store = HuggingFaceStore(name, images)
    return FoundImages(
        store=store,
        names=store.names(),
        classes=classes,
        labels=labels,
        given=store.given,
        place=f"data.name={name}",
        title=f"hf {name}",
        note=f" [left out: {', '.join(left_out)}]" if left_out else "",
        location=f"hf:{name}",
        groups=Groups.of(cell for _, part in parts.values() for cell in part[groups]) if groups else None,
    )


def _open(datasets: Any, name: str, conf: DataConf) -> Any:
    """A `Dataset`, or a dict of them. Only `data.download` allows a download from the hub."""
    try:
        # `save_to_disk` of the library leaves one of these files.
        if any(os.path.exists(os.path.join(name, file)) for file in ("dataset_info.json", "dataset_dict.json")):
            return datasets.load_from_disk(name)
        config = datasets.DownloadConfig(local_files_only=not (conf.download or os.path.exists(name)))
        # Before version 4 the library runs a script of the data set, also one in a local folder, unless told not to.
        by_version: dict[str, Any] = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
        return datasets.load_dataset(name, conf.subset, download_config=config, **by_version)
    except Exception as error:  # the library and its readers raise nearly any error on a damaged data set
        how = "" if conf.download else "; a data set of the hub that is not here yet needs data.download=true"
        raise UserError(f"data.name={name}: cannot be opened: {' '.join(str(error).split())[:300]}{how}") from error


def _parts(opened: Any, name: str) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Split -> (the library's word for it, data set) in the order of SPLITS; and the names of all other parts."""
    named = opened if isinstance(opened, dict) else {"train": opened}
    found: dict[str, tuple[str, Any]] = {}
    left_out = []
    for word, part in named.items():
        number = split_of(str(word))
        if number is None or SPLITS[number] in found:
            left_out.append(f"{word} ({len(part):,})")
        else:
            found[SPLITS[number]] = (str(word), part)
    if "train" not in found:
        raise UserError(f"data.name={name}: has no train split, only {', '.join(named)}")
    return {split: found[split] for split in SPLITS if split in found}, left_out


def _labels(parts: Sequence[Any], column: str) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels: int64 (n,), or float32 (n, classes) if a cell is a list."""
    feature = parts[0].features[column]
    several = isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")
    if several:  # a plain list before version 4 of the library
        feature = feature[0] if isinstance(feature, list) else feature.feature
    cells = [cell for part in parts for cell in part[column]]
    if None in cells:
        row = cells.index(None)
        raise UserError(f"data.label_column={column}: row {row} (from 0, over all splits) has no label")
    lists = [list(cell) if several else [cell] for cell in cells]
    if type(feature).__name__ == "ClassLabel":
        names = tuple(feature.names)
        numbers = [[int(label) for label in cell] for cell in lists]
        hidden = sum(any(label < 0 for label in cell) for cell in numbers)
        if hidden:
            raise UserError(f"data.label_column={column}: {hidden:,} rows have label -1: their labels are withheld")
    elif str(feature.dtype).startswith(("float", "dict", "list")):
        raise UserError(f"data.label_column={column}: holds {feature}, expected class names or whole numbers")
    else:
        names = tuple(sorted({str(word) for cell in lists for word in cell}, key=natural_key))
        index = {name: label for label, name in enumerate(names)}
        numbers = [[index[str(word)] for word in cell] for cell in lists]
    if not several:
        return names, torch.tensor([label for (label,) in numbers], dtype=torch.int64)
    table = torch.zeros(len(numbers), len(names))
    for row, labels in enumerate(numbers):
        table[row, labels] = 1
    return names, table
