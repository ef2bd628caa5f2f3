"""A data set of the Hugging Face `datasets` library: from the hub, or from a local folder."""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Any

from torch import Tensor

from finetune.config import DataConf, nearest
from finetune.config.data import group_column
from finetune.config.fields import changed, show
from finetune.data.images.decode import ImageError, check_encoded, read_file
from finetune.data.labels import LabelError, LabelReader, told_apart
from finetune.data.sources.class_labels import named
from finetune.data.sources.layout import in_brackets
from finetune.data.sources.stores import PartsStore, file_stamp, stamp_of_files
from finetune.data.split import SPLITS, FoundImages, Groups
from finetune.data.split_words import split_of
from finetune.system.errors import UserError


class HuggingFaceStore(PartsStore):
    """The image column of each split of a data set, undecoded: the bytes of an image file, or the path of one."""

    def __init__(self, name: str, parts: Mapping[str, tuple[str, Any]]) -> None:
        """Take what `PartsStore` does; each split has one column, of cells `{bytes, path}`."""
        super().__init__(name, parts)
        # The library's words for splits with images that are files of their own. Only Arrow's marks of nulls are read.
        self._with_files = {word for word, part in parts.values() if _may_lack_bytes(part)}

    def read(self, row: int) -> bytes:
        """The bytes of the image file; raises ImageError."""
        _, part, index = self.find(row)
        (cell,) = part[index].values()
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ImageError(self.name_of(row), "the cell is empty")
        if cell["bytes"] is None:
            return read_file(cell["path"], self.max_pixels)
        data: bytes = cell["bytes"]
        check_encoded(self.name_of(row), len(data), self.max_pixels)
        return data

    def stamp(self, row: int) -> str:
        """Index, fingerprint and files of the split; the `file_stamp` of an image in a file of its own."""
        word, part, index = self.find(row)
        if word in self._with_files:
            (cell,) = part[index].values()
            if cell is not None and cell["bytes"] is None and cell["path"]:
                return file_stamp(cell["path"])  # the library's fingerprint stays when such a file is replaced
        return f"{index}:{part._fingerprint}:{self._files[word]}"

    @functools.cached_property
    def _files(self) -> dict[str, str]:
        """A stamp of each split's files: they change with the images, also where the library's fingerprint stays."""
        return {word: stamp_of_files(file["filename"] for file in part.cache_files) for word, part in self._parts}


def _may_lack_bytes(part: Any) -> bool:
    chunks = part.data.column(0).chunks
    return any(chunk.null_count or chunk.field("bytes").null_count for chunk in chunks)


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
    for split, (_, part) in list(parts.items()):
        if split != "train" and conf.label_column not in part.column_names:
            left_out[f"image without a label in {split}"] = len(parts.pop(split)[1])
    for _, part in parts.values():
        columns = {"image_column": conf.image_column, "label_column": conf.label_column, "group": groups}
        for key, column in columns.items():
            if column is not None and column not in part.column_names:
                known = f"{nearest(column, part.column_names)}; it has {', '.join(part.column_names)}"
                raise UserError(f"data.{key}={column}: no such column{known}")
    classes, labels, warnings = _labels(parts, conf, f"data.name={name}", left_out)
    images = {}
    for split, (word, part) in parts.items():
        _check_images(datasets, part.features[conf.image_column], conf.image_column)
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
        note=in_brackets(left_out),
        location=f"hf:{name}",
        warnings=warnings,
        groups=Groups.of(cell for _, part in parts.values() for cell in part[groups]) if groups else None,
    )


def _open(datasets: Any, name: str, conf: DataConf) -> Any:
    """A `Dataset`, or a dict of them. Only `data.download` allows a download from the hub."""
    try:
        # `save_to_disk` of the library leaves one of these files.
        if any(os.path.exists(os.path.join(name, file)) for file in ("dataset_info.json", "dataset_dict.json")):
            _refuse_ignored(conf)
            return datasets.load_from_disk(name)
        config = datasets.DownloadConfig(local_files_only=not (conf.download or os.path.exists(name)))
        # Before version 4 the library runs a script of the data set, also one in a local folder, unless told not to.
        by_version: dict[str, Any] = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
        return datasets.load_dataset(name, conf.subset, download_config=config, **by_version)
    except UserError:
        raise
    except Exception as error:  # the library and its readers raise nearly any error on a damaged data set
        how = "" if conf.download else "; a data set of the hub that is not here yet needs data.download=true"
        raise UserError(f"data.name={name}: cannot be opened: {' '.join(str(error).split())[:300]}{how}") from error


def _refuse_ignored(conf: DataConf) -> None:
    """Raises UserError where a setting would be ignored, since the data set was saved by `save_to_disk`."""
    for key, value in changed(conf, "subset", "download").items():
        why = f"{conf.name} was saved by save_to_disk and is one whole"
        raise UserError(f"data.{key}={show(value)} would be ignored: {why}; leave it out")


def _parts(opened: Any, name: str) -> tuple[dict[str, tuple[str, Any]], Counter[str]]:
    """Split -> (the library's word for it, data set) in the order of SPLITS; and the images of all other parts."""
    named = opened if isinstance(opened, dict) else {"train": opened}
    found: dict[str, tuple[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for word, part in named.items():
        number = split_of(str(word))
        if number is None or SPLITS[number] in found:
            left_out[f"image in {word}"] += len(part)
        else:
            if not len(part):
                raise UserError(f"data.name={name}: its split {word} has no images; remove it from the data set")
            found[SPLITS[number]] = (str(word), part)
    if "train" not in found:
        raise UserError(f"data.name={name}: has no train split, only {', '.join(named)}")
    return {split: found[split] for split in SPLITS if split in found}, left_out


def _check_images(datasets: Any, feature: Any, column: str) -> None:
    """Raises UserError if a column holds neither images nor the bytes of image files, alone or as {bytes, path}."""
    parts = feature if isinstance(feature, dict) else {"bytes": feature}
    types = {key: str(getattr(part, "dtype", "")).removeprefix("large_") for key, part in parts.items()}
    if isinstance(feature, datasets.Image) or types == {"bytes": "binary"}:
        return
    if types not in ({"bytes": "binary", "path": "string"}, {"bytes": "binary", "path": "null"}):
        paths = "; a table of paths is read by data=table" if types == {"bytes": "string"} else ""
        raise UserError(f"data.image_column={column}: holds {feature}, no images{paths}")


def _labels(
    parts: dict[str, tuple[str, Any]], conf: DataConf, place: str, left_out: Counter[str]
) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
    """Class names, labels, see `LabelReader.tensor`, and warnings; labels of all splits are compared by their names.

    A split other than train whose labels are withheld leaves `parts` and is counted in `left_out`.
    """
    column = conf.label_column
    names = _class_names(parts["train"][1].features[column])
    reader = LabelReader(column, names=[*conf.classes, *(names or ())])
    given = bytearray()
    for split, (word, part) in parts.items():
        for index, cell in enumerate(_words(part, column, f"{place}: {word}")):
            try:
                reader.take(cell, SPLITS.index(split))
            except LabelError as error:
                raise UserError(f"{place}: {word}[{index}] {error} (data.label_column)") from None
        given += bytes([SPLITS.index(split)]) * len(part)
    stays, without = reader.take_out_withheld(given)
    left_out += without
    staying = {*compress(given, stays)}
    for split in [split for split in parts if SPLITS.index(split) not in staying]:
        del parts[split]
    for lacking in reader.lacking[:1]:
        images = (f"{word}[{index}]" for word, part in parts.values() for index in range(len(part)))
        raise UserError(f"{place}: {next(islice(images, lacking, None))} has no {column} (data.label_column)")
    if names is None:
        classes = reader.names(f"{place}: data.label_column={column}")
        return classes, reader.tensor(classes), reader.warnings
    unknown = [word for word in reader.known if word not in set(names)]
    if unknown:
        both = f"train has the classes {_listed(names)}; another split has {_listed(told_apart(unknown, names))}"
        raise UserError(f"{place}: data.label_column={column}: {both}, which train has not")
    return names, reader.tensor(names), reader.warnings


def _words(part: Any, column: str, subject: str) -> Iterator[Any]:
    """The cells of a column, with names in the place of the numbers of a ClassLabel; None where it is withheld (-1)."""
    names = _class_names(part.features[column])
    return iter(part[column]) if names is None else named(part[column], names, subject)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of a ClassLabel, or of a list of them; None for any other column."""
    if isinstance(feature, list):  # before version 4 of the library
        feature = feature[0]
    elif type(feature).__name__ in ("List", "LargeList", "Sequence"):
        feature = feature.feature
    return tuple(feature.names) if type(feature).__name__ == "ClassLabel" else None


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")
