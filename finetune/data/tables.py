"""A table with a line an image: CSV, TSV, JSON lines or Parquet; read as a stream, since some have millions of rows."""

from __future__ import annotations

import csv
import gzip
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf, nearest
from finetune.data.filestore import FileStore
from finetune.data.images import Header, ImageError, decode, natural_key
from finetune.data.packed import PackedStrings
from finetune.data.split import SPLITS, Found
from finetune.data.streams import ranks

# What a cell of `data.split_column` may say.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": "", ".pq": ""}
MAX_LISTED = 20  # rows that a message names


class TableStore(FileStore):
    """Image files that a table names: what cannot be read is called by its row, too."""

    def __init__(
        self, root: str, names: PackedStrings, numbers: np.ndarray[Any, np.dtype[np.int32]], table: str
    ) -> None:
        """Hold paths relative to `root` and the row of each in the file `table`."""
        super().__init__(root, names)
        self._numbers = numbers
        self._table = table

    def read(self, row: int) -> bytes:
        """The file; raises ImageError."""
        try:
            return super().read(row)
        except ImageError as error:
            raise self._with_row(error, row) from error

    def header(self, row: int) -> Header:
        """Size and mode, from the first bytes of the file; raises ImageError."""
        try:
            return super().header(row)
        except ImageError as error:
            raise self._with_row(error, row) from error

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        try:
            return decode(super().read(row), self.name_of(row))
        except ImageError as error:
            raise self._with_row(error, row) from error

    def stamp(self, row: int) -> str:
        """Path, size and time of the last change; raises ImageError where there is no such file."""
        try:
            return super().stamp(row)
        except ImageError as error:
            raise self._with_row(error, row) from error

    def _with_row(self, error: ImageError, row: int) -> ImageError:
        return ImageError(error.path, f"{error.reason}; {self._table}, row {self._numbers[row]}")


@dataclass
class _Columns:
    """The columns as they are read, in flat arrays.

    Attributes:
        several: Whether a cell may hold several labels; None: no row was read yet.
        numbers: Row of the file, from 1; in a text file the line.
        label_ids: Of each label, in the order of reading; index into the keys of `known`.
        label_ends: Where the labels of each row end in `label_ids`.
        splits: Index into SPLITS.
        known: Label to its id.
        problems: What is wrong with rows, a line each, the first MAX_LISTED.
        num_problems: How many rows there are something wrong with.
    """

    several: bool | None = None
    numbers: array[int] = field(default_factory=lambda: array("i"))
    label_ids: array[int] = field(default_factory=lambda: array("i"))
    label_ends: array[int] = field(default_factory=lambda: array("q"))
    splits: bytearray = field(default_factory=bytearray)
    known: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def refuse(self, number: int, problem: str) -> None:
        """Note what is wrong with a row."""
        self.num_problems += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(f"row {number} {problem}")


def find_table(conf: DataConf) -> Found:
    """The images that `data.table` lists, by `data.path_column` and `data.label_column`.

    Raises:
        FileNotFoundError: There is no such table.
        ValueError: It cannot be read, lacks a column, or has rows without a path or a label: all are named.
    """
    path = os.path.expanduser(conf.table or "")
    if not os.path.exists(path):
        raise FileNotFoundError(f"data.table={conf.table}: there is no such file")
    columns = _Columns(several=True if conf.label_separator else None)
    names = PackedStrings(_paths(path, conf, columns))
    if columns.problems:
        more = columns.num_problems - len(columns.problems)
        listed = "; ".join(columns.problems) + (f"; and {more:,} more" if more else "")
        raise ValueError(f"data.table={path}: {columns.num_problems:,} rows cannot be used: {listed}")
    if not len(names):
        raise ValueError(f"data.table={path}: has no rows; expected a line an image below the names of the columns")
    classes = tuple(sorted(columns.known, key=natural_key))
    labels = _labels(columns, classes)
    numbers = np.frombuffer(columns.numbers, dtype=np.int32)
    warnings = _check_repeats(path, names, labels, numbers)
    root = os.path.expanduser(conf.root) if conf.root else os.path.dirname(path)
    return Found(
        kind="table",
        store=TableStore(root, names, numbers, os.path.basename(path)),
        names=names,
        classes=classes,
        labels=labels,
        given=torch.frombuffer(columns.splits, dtype=torch.uint8),
        place=f"data.table={path}",
        title=f"table {path}",
        location=os.path.abspath(root),
        warnings=warnings,
    )


def _paths(path: str, conf: DataConf, columns: _Columns) -> Iterator[str]:
    """The path of every usable row; the other columns go to `columns` on the way."""
    for number, (name, label, split) in _rows(path, conf):
        if not isinstance(name, str) or not name.strip():
            columns.refuse(number, f"has no {conf.path_column}")
            continue
        words = _words_of(label, conf, columns)
        if isinstance(words, str):
            columns.refuse(number, words)
            continue
        where = 0
        if conf.split_column is not None:
            where = SPLIT_WORDS.get(str(split).strip().lower(), -1)
            if where < 0:
                columns.refuse(number, f"has {conf.split_column}={split!r}, expected one of {', '.join(SPLITS)}")
                continue
        columns.numbers.append(number)
        columns.splits.append(where)
        for word in words:
            columns.label_ids.append(columns.known.setdefault(word, len(columns.known)))
        columns.label_ends.append(len(columns.label_ids))
        yield name.strip()


def _words_of(label: Any, conf: DataConf, columns: _Columns) -> Sequence[str] | str:
    """The labels of a cell; or what is wrong with it, as a text."""
    separator, column = conf.label_separator, conf.label_column
    several = isinstance(label, list)
    if columns.several is None:
        columns.several = several
    if several and separator:
        return f"has a list in {column}: leave data.label_separator out"
    if several != (columns.several and not separator):
        return f"has one label in {column} where others have lists" if not several else f"has a list in {column}"
    if separator:
        cells: list[Any] = str(label).split(separator) if label is not None else []
        cells = [cell for cell in cells if cell.strip()]  # no label at all is an answer, too
    else:
        cells = label if several else [label]
    words = []
    for cell in cells:
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # a column of whole numbers with gaps comes as 3.0
        if cell is None or isinstance(cell, (float, dict, list)) or not str(cell).strip():
            return f"has no {column}" if cell is None or not str(cell).strip() else f"has {column}={str(cell)[:40]!r}"
        words.append(str(cell).strip())
    return list(dict.fromkeys(words))


def _labels(columns: _Columns, classes: Sequence[str]) -> Tensor:
    """Ids in the order of reading -> natural order: int64 (n,), or float32 (n, classes) where there may be several."""
    place = np.empty(len(classes), dtype=np.int64)
    index = {name: label for label, name in enumerate(classes)}
    for name, number in columns.known.items():
        place[number] = index[name]
    labels = place[np.frombuffer(columns.label_ids, dtype=np.int32)] if columns.label_ids else place[:0]
    if not columns.several:
        return torch.from_numpy(labels)
    ends = np.frombuffer(columns.label_ends, dtype=np.int64)
    table = torch.zeros(len(ends), len(classes))
    table[torch.from_numpy(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))), torch.from_numpy(labels)] = 1
    return table


def _check_repeats(path: str, names: PackedStrings, labels: Tensor, numbers: Any) -> tuple[str, ...]:
    """A path in two rows: with different labels one of them is wrong; with the same it counts twice, which is said."""
    hashes = ranks("path", 0, names)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if not len(same):
        return ()
    first, second = order[same], order[same + 1]
    differ = labels[torch.from_numpy(first)] != labels[torch.from_numpy(second)]
    wrong = np.flatnonzero((differ if differ.ndim == 1 else differ.any(1)).numpy())
    if len(wrong):
        shown = "; ".join(
            f"{names[int(first[i])]} in rows {numbers[first[i]]} and {numbers[second[i]]}" for i in wrong[:MAX_LISTED]
        )
        raise ValueError(
            f"data.table={path}: {len(wrong):,} paths come again with another label: {shown}; keep one row of each"
            " (for several labels an image, put them in one cell and set data.label_separator)"
        )
    example = f"{names[int(first[0])]} in rows {numbers[first[0]]} and {numbers[second[0]]}"
    return (
        f"{len(same):,} rows of {path} repeat a path, so these images count twice, perhaps in two splits: {example}",
    )


# --- formats ---------------------------------------------------------------------------------------------------------


def _rows(path: str, conf: DataConf) -> Iterator[tuple[int, Sequence[Any]]]:
    """Number of each row and its cells: path, label, split (None where there is no such column)."""
    stem = path.lower().removesuffix(".gz")
    ending = os.path.splitext(stem)[1]
    if ending not in FORMATS:
        raise ValueError(f"data.table={path}: expected a name that ends in {' '.join(FORMATS)}; .gz may follow")
    wanted = [conf.path_column, conf.label_column, *([conf.split_column] if conf.split_column else [])]
    in_parquet = ending in (".parquet", ".pq")
    rows = _parquet_rows(path, wanted) if in_parquet else _text_rows(path, wanted, FORMATS[ending])
    for number, cells in rows:
        yield number, cells if len(cells) == 3 else (*cells, None)


def _text_rows(path: str, wanted: Sequence[str], separator: str) -> Iterator[tuple[int, Sequence[Any]]]:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, file, wanted, separator) if separator else _json_rows(path, file, wanted)
    except (OSError, EOFError) as error:
        raise ValueError(f"data.table={path}: cannot be read: {error}") from error


def _csv_rows(path: str, file: IO[str], wanted: Sequence[str], separator: str) -> Iterator[tuple[int, Sequence[Any]]]:
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places = [_place(path, name, header) for name in wanted]
        for cells in reader:
            if not cells:
                continue  # an empty line
            if len(cells) != len(header):
                words = (
                    f"has {len(cells)} cells where the first line has {len(header)} (a text with a comma needs quotes)"
                )
                raise ValueError(f"data.table={path}: row {reader.line_num} {words}")
            yield reader.line_num, [cells[place] for place in places]
    except csv.Error as error:
        raise ValueError(f"data.table={path}: row {reader.line_num}: {error}") from error


def _json_rows(path: str, file: IO[str], wanted: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data.table={path}: row {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'data.table={path}: row {number}: expected an object such as {{"{wanted[0]}": ...}}')
        for name in wanted:
            if name not in row:
                raise ValueError(f"data.table={path}: row {number}: {_no_column(name, list(row))}")
        yield number, [row[name] for name in wanted]


def _parquet_rows(path: str, wanted: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data.table={path}: Parquet needs pyarrow: pip install 'finetune[parquet]', or save the table as .csv"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for name in wanted:
                _place(path, name, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=65_536, columns=list(dict.fromkeys(wanted))):
                for cells in zip(*(batch.column(name).to_pylist() for name in wanted), strict=True):
                    number += 1
                    yield number, cells
    except (ArrowException, OSError) as error:
        raise ValueError(f"data.table={path}: cannot be read: {' '.join(str(error).split())}") from error


def _place(path: str, name: str, header: Sequence[str]) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise ValueError(f"data.table={path}: has two columns called {name}")
    raise ValueError(f"data.table={path}: {_no_column(name, header)}")


def _no_column(name: str, header: Sequence[str]) -> str:
    known = ", ".join(header) or "nothing"
    keys = "data.path_column, data.label_column and data.split_column name the columns"
    return f"has no column {name}{nearest(name, header)}; it has {known} ({keys})"
