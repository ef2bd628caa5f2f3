"""Labels that the datasets library stores as numbers, with the names of their classes beside them."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.system.errors import UserError
from finetune.system.reading import UnfitError, parse_json


def named(cells: Iterable[Any], names: Sequence[str], subject: str) -> Iterator[Any]:
    """The cells with names in the place of numbers, also of those in lists; None where the label is withheld (-1).

    A number without a name is a UserError that begins with `subject`.
    """
    of_number = dict(enumerate(names)) | {-1: None, None: None}
    for cell in cells:
        try:
            yield [of_number[number] for number in cell] if isinstance(cell, list) else of_number[cell]
        except (KeyError, TypeError):
            what = f"a label is {str(cell)[:40]}, and there are {len(names)} names of classes"
            raise UserError(f"{subject}: {what}") from None


def names_in_parquet(path: str, column: str) -> tuple[str, ...] | None:
    """The class names that the datasets library stores in a Parquet file for a column of numbers; None without any."""
    if os.path.splitext(path.lower())[1] not in (".parquet", ".pq") or not os.path.isfile(path):
        return None
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError:
        return None  # the reader of the columns says so
    try:
        with parquet.ParquetFile(path) as file:
            stored = (file.schema_arrow.metadata or {}).get(b"huggingface")
        if stored is None:
            return None
        feature = parse_json(stored, dict[str, Any])["info"]["features"][column]
    except (ArrowException, OSError, ValueError, ArithmeticError, UnfitError, KeyError, TypeError):
        return None  # nothing that the library wrote; the reader of the columns says if the file is damaged
    if isinstance(feature, list) and len(feature) == 1:  # a list of labels, before version 4 of the library
        feature = feature[0]
    elif isinstance(feature, Mapping) and isinstance(feature.get("feature"), Mapping):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
