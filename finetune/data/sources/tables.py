"""Tables with a row for each image: CSV, TSV, JSON lines or Parquet. They may have millions of rows."""

from __future__ import annotations

import functools
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.config.data import group_column
from finetune.data.images.decode import ImageError
from finetune.data.labels import LabelError, LabelReader
from finetune.data.packed import PackedStrings
from finetune.data.sources.class_labels import named, names_in_parquet
from finetune.data.sources.data_files import DataFile
from finetune.data.sources.layout import in_brackets
from finetune.data.sources.parquet_images import ParquetStore, RowEnds, image_rows, slow_groups
from finetune.data.sources.stores import FileStore
from finetune.data.sources.table_formats import ColumnBlock, read_blocks
from finetune.data.sources.table_lists import list_tables, parts_that_lack
from finetune.data.sources.table_paths import found_paths
from finetune.data.sources.table_rows import RowPlaces
from finetune.data.split import SPLITS, FoundImages, Groups, ImageStore
from finetune.data.split_words import is_extra, split_of
from finetune.data.streams import ranks
from finetune.system.errors import UserError
from finetune.system.limits import NAME, text_limit
from finetune.system.terminal import counted

MAX_LISTED = 20  # rows that one message names
MAX_PROBLEMS = 100_000  # rows that cannot be used, after which no more are read


def _naming_row(method: Callable[[Any, int], Any]) -> Any:
    """Let a method of TableStore add the table's name and row number to an ImageError."""

    @functools.wraps(method)
    def wrapper(self: TableStore, row: int) -> Any:
        try:
            return method(self, row)
        except ImageError as error:
            number = self.places.numbers[row]
            note = f"; {os.path.basename(self.places.table_of(row))}, row {number}"
            reason = error.reason.removesuffix(note) + note  # `load` calls `read`, which adds the note as well
            raise ImageError(error.path, reason) from error.__cause__  # checks read the cause

    return wrapper


class TableStore(FileStore):
    """Image files that tables list. Errors name the table and its row, too."""

    def __init__(self, root: str, names: PackedStrings, places: RowPlaces) -> None:
        """Take paths relative to `root`, and the table and row of each."""
        super().__init__(root, names)
        self.places = places

    read = _naming_row(FileStore.read)
    header = _naming_row(FileStore.header)
    stamp = _naming_row(FileStore.stamp)
    load = _naming_row(FileStore.load)


class _RowError(Exception):
    """A row of the table cannot be used; the text follows the row's number in the message."""


class _Rows:
    """The usable rows that were read so far, in flat arrays, which take a few bytes a row."""

    def __init__(self, labels: LabelReader, tables: Sequence[DataFile]) -> None:
        self.labels, self.tables = labels, tables
        self.files = array("i")  # place in `tables` of the table of each row
        self.numbers = array("i")  # number of each row in its file, from 1; in a text file its line
        self.splits = bytearray()  # index into SPLITS of each row
        self.groups: list[Any] = []  # cell of the column `data.group` of each row, if there is one
        self.problems: list[str] = []  # the first MAX_LISTED rows that cannot be used, a line each
        self.num_problems = 0  # how many rows cannot be used
        self.left_out: Counter[str] = Counter()  # kind -> number of rows that are no problem and are not used

    def add_problem(self, file: int, number: int, text: str) -> None:
        """Take a row of the table `file` that cannot be used."""
        self.num_problems += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(f"{self.name(file, number)} {text}")

    def name(self, file: int, number: int) -> str:
        """A row in messages: `row 5`; behind the name of its table, if there are several."""
        return f"row {number}" if len(self.tables) == 1 else f"{self.tables[file].name}: row {number}"

    def without_withheld(self, names: PackedStrings) -> PackedStrings:
        """The names of the rows but those of val and test whose labels are withheld, which leave the rows, too."""
        stays, left_out = self.labels.take_out_withheld(self.splits)
        if left_out:
            self.left_out += left_out
            names = PackedStrings(compress(names, stays))
            self.files = array("i", compress(self.files, stays))
            self.numbers = array("i", compress(self.numbers, stays))
            self.splits = bytearray(compress(self.splits, stays))
            self.groups = list(compress(self.groups, stays))
        for place in self.labels.lacking:
            self.add_problem(self.files[place], self.numbers[place], f"has no {self.labels.column}")
        return names

    def both(self, one: int, other: int) -> str:
        """Two images by their rows: `rows 3 and 7`."""
        if len(self.tables) == 1:
            return f"rows {self.numbers[one]} and {self.numbers[other]}"
        return " and ".join(self.name(self.files[place], self.numbers[place]) for place in (one, other))

    def places(self) -> RowPlaces:
        """The table and the row of each image."""
        files = np.array(self.files) if len(self.tables) > 1 else None
        return RowPlaces([table.path for table in self.tables], np.array(self.numbers), files)


def find_table(conf: DataConf) -> FoundImages:
    """The images that `data.table` lists in `data.path_column`, with the labels in `data.label_column`.

    Raises FileNotFoundError without a table; UserError if one cannot be read, lacks a column, or has unusable rows.
    """
    place = os.path.expanduser(conf.table or "")
    tables, left_out = list_tables(place, has_splits=conf.split_column is None)
    ends = _image_rows(tables, conf)
    names_of = [names_in_parquet(table.path, conf.label_column) for table in tables]
    certain = [*conf.classes, *chain.from_iterable(filter(None, names_of))]
    rows = _Rows(LabelReader(conf.label_column, conf.label_separator, certain), tables)
    rows.left_out += left_out
    top = os.path.commonpath([os.path.dirname(table.path) for table in tables])
    each = (_paths_in(file, top, conf, rows, ends is not None, names) for file, names in enumerate(names_of))
    names = rows.without_withheld(PackedStrings(chain.from_iterable(each)))
    note = _check_rows(rows, place)
    classes = rows.labels.names(f"data.table={place}: data.label_column={conf.label_column}")
    labels, places = rows.labels.tensor(classes), rows.places()
    root = os.path.expanduser(conf.root) if conf.root else top
    store: ImageStore
    warnings = rows.labels.warnings
    if ends is None:
        names, more = found_paths(names, root, tables[0].path, conf)
        warnings += more
        store = TableStore(root, names, places)
    else:
        root, store = place, ParquetStore(conf.path_column, ends, places)
        warnings += tuple(line for table in tables for line in slow_groups(table.path, conf.path_column))[:1]
    names = _names_without_place(names, root)
    several = f" ({counted(len(tables), 'file')})" if len(tables) > 1 else ""
    return FoundImages(
        store=store,
        names=names,
        classes=classes,
        labels=labels,
        given=torch.frombuffer(rows.splits, dtype=torch.uint8),
        place=f"data.table={place}",
        title=f"table {place}{several}",
        note=note,
        location=os.path.abspath(root),
        warnings=(*warnings, *parts_that_lack(tables), *_check_repeats(place, names, labels, rows)),
        groups=None if group_column(conf) is None else Groups.of(rows.groups),
    )


def _image_rows(tables: Sequence[DataFile], conf: DataConf) -> list[RowEnds] | None:
    """The `image_rows` of each table; None if the tables hold paths. Raises UserError if some hold images."""
    ends = [image_rows(table.path, conf.path_column) for table in tables]
    found = [end for end in ends if end is not None]
    if found and len(found) < len(ends):
        one, other = (next(t for t, end in zip(tables, ends, strict=True) if (end is None) == kind) for kind in (0, 1))
        both = f"{conf.path_column} of {one.name} holds images, and of {other.name} paths"
        raise UserError(f"data.table={conf.table}: {both}; read one kind of table at a time")
    if found:
        _refuse_places(conf)
    return found or None


def _paths_in(
    file: int, top: str, conf: DataConf, rows: _Rows, has_images: bool, class_names: Sequence[str] | None
) -> Iterator[str]:
    """The paths in a table of several, from `data.root`, or from `top`, on; names of images that have no path.

    Without `data.root` the paths in a table start from the folder of the table. The labels are numbers of
    `class_names`, if there are any.
    """
    table = rows.tables[file]
    wanted = [conf.path_column, conf.label_column, *filter(None, [conf.split_column, group_column(conf)])]
    blocks = read_blocks(table.path, wanted[1:] if has_images else wanted, text_limit(conf.max_text_mib))
    inner = os.path.relpath(table.path, top).replace(os.sep, "/")
    start = f"{inner}: " if has_images and len(rows.tables) > 1 else ""
    folder = "" if conf.root or has_images else os.path.dirname(inner)
    if has_images:
        blocks = _with_names(blocks, f"{start}{conf.path_column}")
    if class_names is not None:
        blocks = _with_classes(blocks, class_names, f"data.table={table.name}: {conf.label_column}")
    for path in _usable_paths(blocks, conf, rows, file):
        yield os.path.join(folder, path) if folder else path


def _check_rows(rows: _Rows, path: str) -> str:
    """What was left out, as the end of the description; raises UserError without rows, or with unusable ones."""
    note = in_brackets(rows.left_out)
    if rows.num_problems:
        more = rows.num_problems - len(rows.problems)
        listed = "; ".join(rows.problems) + (f"; and {more:,} more" if more else "")
        listed += "; the rest was not read" if rows.num_problems > MAX_PROBLEMS else ""
        raise UserError(f"data.table={path}: {counted(rows.num_problems, 'row')} cannot be used: {listed}")
    if not rows.numbers:
        raise UserError(
            f"data.table={path}: has no rows{note}; expected a line an image below the names of the columns"
        )
    return note


def _refuse_places(conf: DataConf) -> None:
    """Raises UserError where a setting about paths would be ignored, since the table holds the images themselves."""
    for key, value in {"root": conf.root, "path_suffix": conf.path_suffix}.items():
        if value is not None:
            why = f"the column {conf.path_column} of {conf.table} holds images, not their paths"
            raise UserError(f"data.{key}={value} would be ignored: {why}; leave it out")


def _with_names(blocks: Iterable[ColumnBlock], column: str) -> Iterator[ColumnBlock]:
    """The blocks with a first column of names, by which images without a path are split: `image[17]`, of row 17."""
    for numbers, columns in blocks:
        yield ColumnBlock(numbers, [[f"{column}[{number}]" for number in numbers], *columns])


def _with_classes(blocks: Iterable[ColumnBlock], names: Sequence[str], subject: str) -> Iterator[ColumnBlock]:
    """The blocks with names in the place of the numbers in the second column, of labels."""
    for numbers, (paths, labels, *others) in blocks:
        yield ColumnBlock(numbers, [paths, list(named(labels, names, subject)), *others])


def _names_without_place(names: PackedStrings, root: str) -> PackedStrings:
    """The names by which rows are split: absolute paths into `root` count from there, others as the table has them."""
    folders = tuple(os.path.join(folder, "") for folder in (os.path.abspath(root), os.path.realpath(root)))
    if not any(name.startswith(folders) for name in names):
        return names
    lengths = ((name, next((len(folder) for folder in folders if name.startswith(folder)), 0)) for name in names)
    return PackedStrings(name[length:] for name, length in lengths)


def _usable_paths(blocks: Iterable[ColumnBlock], conf: DataConf, rows: _Rows, file: int) -> Iterator[str]:
    """The paths of the usable rows of the table `file`; adds their other cells to `rows`."""
    own_split = rows.tables[file].split or 0
    for block in blocks:
        if rows.num_problems > MAX_PROBLEMS:
            return
        for number, path, label, *others in zip(block.numbers, *block.columns, strict=True):
            try:
                split = _split_of(others[0], conf) if conf.split_column else own_split
                if split is None:
                    rows.left_out[f"row of {str(others[0]).strip()}"] += 1
                    continue
                if isinstance(path, (bytes, dict)):
                    folder = os.path.dirname(conf.table or "") or "."
                    how = f"data=hf data.name={folder} data.image_column={conf.path_column} reads such files"
                    raise UserError(f"data.table={conf.table}: {conf.path_column} holds images, not their paths; {how}")
                if not isinstance(path, str) or not path.strip():
                    raise _RowError(f"has no {conf.path_column}")
                if len(path) > NAME.most:
                    letters = f"{len(path):,} letters, at most {NAME.most:,} are read"
                    raise _RowError(f"has a {conf.path_column} of {letters}")
                rows.labels.take(label, split)
            except (_RowError, LabelError) as error:
                rows.add_problem(file, number, str(error))
                continue
            rows.files.append(file)
            rows.numbers.append(number)
            rows.splits.append(split)
            rows.groups.extend(others[bool(conf.split_column) :])
            yield path.strip()


def _split_of(cell: Any, conf: DataConf) -> int | None:
    """Index into SPLITS; None for images beside the splits, such as `unlabeled`; raises _RowError."""
    split = split_of(str(cell))
    if split is None and not is_extra(str(cell)):
        raise _RowError(f"has {conf.split_column}={str(cell)[:40]!r}, expected one of {', '.join(SPLITS)}")
    return split


def _check_repeats(path: str, names: PackedStrings, labels: Tensor, rows: _Rows) -> tuple[str, ...]:
    """A warning if paths repeat; raises UserError if one repeats with another label, since one of the two is wrong."""
    if any("./" in name or "//" in name for name in names):
        names = PackedStrings(re.sub(r"(?<![^/])\./|(?<=/)/+", "", name) for name in names)  # a/./b and a//b are a/b
    hashes = ranks("path", 0, names)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if not len(same):
        return ()
    first, second = order[same], order[same + 1]
    differ = labels[torch.from_numpy(first)] != labels[torch.from_numpy(second)]
    wrong = np.flatnonzero((differ if differ.ndim == 1 else differ.any(1)).numpy())
    listed = wrong[:MAX_LISTED] if len(wrong) else [0]
    both = ((int(first[i]), int(second[i])) for i in listed)
    shown = [f"{names[one]} in {rows.both(one, other)}" for one, other in both]
    if len(wrong):
        again = f"{counted(len(wrong), 'path')} with several labels: {'; '.join(shown)}; keep one row of each"
        several = "for several labels an image, put them in one cell and set data.label_separator"
        raise UserError(f"data.table={path}: {again} ({several})")
    repeated = f"{path} repeats a path in {counted(len(same), 'row')}"
    return (f"{repeated}, so such an image counts twice, perhaps in two splits: {shown[0]}",)
