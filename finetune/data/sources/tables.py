"""A table with a line an image: CSV, TSV, JSON lines or Parquet; read as a stream, since some have millions of rows."""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.data.images.decode import Header, ImageError, decode, natural_key
from finetune.data.packed import PackedStrings
from finetune.data.sources.filestore import FileStore
from finetune.data.sources.table_formats import Block, read_blocks
from finetune.data.split import SPLITS, Found
from finetune.data.streams import ranks
from finetune.system.errors import UserError

# What a cell of `data.split_column` may say.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
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
            raise self._with_row(error, row) from error.__cause__

    def header(self, row: int) -> Header:
        """Size and mode, from the first bytes of the file; raises ImageError."""
        try:
            return super().header(row)
        except ImageError as error:
            raise self._with_row(error, row) from error.__cause__

    def load(self, row: int) -> Tensor:
        """The image, uint8 (3, height, width), RGB; raises ImageError."""
        try:
            return decode(super().read(row), self.name_of(row))
        except ImageError as error:
            raise self._with_row(error, row) from error.__cause__

    def stamp(self, row: int) -> str:
        """Path, size and time of the last change; raises ImageError where there is no such file."""
        try:
            return super().stamp(row)
        except ImageError as error:
            raise self._with_row(error, row) from error.__cause__

    def _with_row(self, error: ImageError, row: int) -> ImageError:
        """The same error, and where the table names the file; whoever raises it hands the cause on, too."""
        return ImageError(error.path, f"{error.reason}; {self._table}, row {self._numbers[row]}")


@dataclass
class _Columns:
    """The columns as they are read, in flat arrays.

    Attributes:
        several: Whether a cell may hold several labels; None: no row was read yet.
        numbers: Row of the file, from 1; in a text file the line.
        hashes: Of the path: Python's own, so good for this process only; the same for the same path.
        label_ids: Of each label, in the order of reading; index into the keys of `known`.
        label_counts: Where there may be several, how many labels each row has.
        splits: Index into SPLITS.
        known: Label to its id.
        problems: What is wrong with rows, a line each, the first MAX_LISTED.
        num_problems: How many rows there are something wrong with.
    """

    several: bool | None = None
    numbers: array[int] = field(default_factory=lambda: array("i"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    label_ids: array[int] = field(default_factory=lambda: array("i"))
    label_counts: array[int] = field(default_factory=lambda: array("i"))
    splits: bytearray = field(default_factory=bytearray)
    known: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def refuse(self, number: int, problem: str) -> None:
        """Note what is wrong with a row."""
        self.num_problems += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(f"row {number} {problem}")

    def ids_of(self, labels: Sequence[str]) -> list[int]:
        """The id of each label; one that is new gets the next."""
        return [self.known.setdefault(label, len(self.known)) for label in labels]


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
    wanted = [conf.path_column, conf.label_column, *([conf.split_column] if conf.split_column else [])]
    names = PackedStrings(chain.from_iterable(_paths(block, conf, columns) for block in read_blocks(path, wanted)))
    if columns.problems:
        more = columns.num_problems - len(columns.problems)
        listed = "; ".join(columns.problems) + (f"; and {more:,} more" if more else "")
        raise UserError(f"data.table={path}: {columns.num_problems:,} rows cannot be used: {listed}")
    if not len(names):
        raise UserError(f"data.table={path}: has no rows; expected a line an image below the names of the columns")
    classes = tuple(sorted(columns.known, key=natural_key))
    labels = _labels(columns, classes)
    numbers = np.frombuffer(columns.numbers, dtype=np.int32)
    warnings = _check_repeats(path, names, labels, columns)
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


def _paths(block: Block, conf: DataConf, columns: _Columns) -> Sequence[str]:
    """The paths of the usable rows; their other columns go to `columns` on the way."""
    names = _paths_at_once(block, conf, columns)
    if names is None:
        names = list(_paths_by_row(block, conf, columns))
    same = names if all(map(str.isascii, names)) else [unicodedata.normalize("NFC", name) for name in names]
    columns.hashes.extend(map(hash, same))
    return names


def _paths_at_once(block: Block, conf: DataConf, columns: _Columns) -> Sequence[str] | None:
    """As `_paths_by_row`, each different cell looked at once; None where a row may need a closer look."""
    names, labels, *splits = block.columns
    kinds = set(map(type, labels))
    # Of mixed types 1, 1.0 and True would be one key; lists are none.
    if set(map(type, names)) != {str} or len(kinds) > 1 or not kinds <= {str, int, float, bool}:
        return None
    names = list(map(str.strip, names))
    if "" in names:
        return None
    words = {cell: _words_of(cell, conf, columns) for cell in dict.fromkeys(labels)}
    where = {cell: _split_of(cell) for cell in dict.fromkeys(map(str, *splits))} if splits else {}
    if any(isinstance(found, str) for found in words.values()) or -1 in where.values():
        return None
    columns.numbers.extend(block.numbers)
    columns.splits.extend(map(where.__getitem__, map(str, *splits)) if splits else bytes(len(names)))
    ids = {cell: columns.ids_of(found) for cell, found in words.items()}
    columns.label_ids.extend(chain.from_iterable(map(ids.__getitem__, labels)))
    if columns.several:
        columns.label_counts.extend(len(ids[cell]) for cell in labels)
    return names


def _paths_by_row(block: Block, conf: DataConf, columns: _Columns) -> Iterator[str]:
    for number, name, label, *split in zip(block.numbers, *block.columns, strict=True):
        if not isinstance(name, str) or not name.strip():
            columns.refuse(number, f"has no {conf.path_column}")
            continue
        words = _words_of(label, conf, columns)
        if isinstance(words, str):
            columns.refuse(number, words)
            continue
        where = _split_of(*split) if split else 0
        if where < 0:
            columns.refuse(number, f"has {conf.split_column}={split[0]!r}, expected one of {', '.join(SPLITS)}")
            continue
        columns.numbers.append(number)
        columns.splits.append(where)
        columns.label_ids.extend(columns.ids_of(words))
        if columns.several:
            columns.label_counts.append(len(words))
        yield name.strip()


def _split_of(cell: Any) -> int:
    """Index into SPLITS of a cell of `data.split_column`, -1 for an unknown word."""
    return SPLIT_WORDS.get(str(cell).strip().lower(), -1)


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
    counts = np.frombuffer(columns.label_counts, dtype=np.int32)
    table = torch.zeros(len(counts), len(classes))
    table[torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), torch.from_numpy(labels)] = 1
    return table


def _check_repeats(path: str, names: PackedStrings, labels: Tensor, columns: _Columns) -> tuple[str, ...]:
    """A path in two rows: with different labels one of them is wrong; with the same it counts twice, which is said."""
    numbers = np.frombuffer(columns.numbers, dtype=np.int32)
    hashes = np.frombuffer(columns.hashes, dtype=np.int64)
    in_order = np.sort(hashes)
    rows = np.flatnonzero(np.isin(hashes, in_order[1:][in_order[1:] == in_order[:-1]]))
    marks = ranks("path", 0, (names[row] for row in rows.tolist()))  # the same in every process, so messages are, too
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]])
    if not len(same):
        return ()
    first, second = rows[order[same]], rows[order[same + 1]]
    differ = labels[torch.from_numpy(first)] != labels[torch.from_numpy(second)]
    wrong = np.flatnonzero((differ if differ.ndim == 1 else differ.any(1)).numpy())
    if len(wrong):
        shown = "; ".join(
            f"{names[int(first[i])]} in rows {numbers[first[i]]} and {numbers[second[i]]}" for i in wrong[:MAX_LISTED]
        )
        raise UserError(
            f"data.table={path}: {len(wrong):,} paths come again with another label: {shown}; keep one row of each"
            " (for several labels an image, put them in one cell and set data.label_separator)"
        )
    example = f"{names[int(first[0])]} in rows {numbers[first[0]]} and {numbers[second[0]]}"
    return (
        f"{len(same):,} rows of {path} repeat a path, so these images count twice, perhaps in two splits: {example}",
    )
