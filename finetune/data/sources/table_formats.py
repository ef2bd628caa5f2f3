"""The rows of a table in one of its formats: CSV, TSV, JSON lines or Parquet; block by block, column by column.

Millions of rows are waited for at every start, and what is done to a block at once costs a fraction of row by row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import IO, Any, NamedTuple

from finetune.config import nearest
from finetune.system.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": "", ".pq": ""}
ROWS = 16_384  # of a block
CHARACTERS = 1 << 20  # of a block, in a text file that needs no reading row by row


class Block(NamedTuple):
    """Some rows, one after the other.

    Attributes:
        numbers: Of each row in the file, from 1; in a text file its (last) line.
        columns: The cells of each wanted column, as many as rows.
    """

    numbers: Sequence[int]
    columns: Sequence[Sequence[Any]]


def read_blocks(path: str, wanted: Sequence[str]) -> Iterator[Block]:
    """All rows of the table at `path`, the cells of the columns called `wanted`, in that order.

    Raises:
        ValueError: It is of no known format, cannot be read, lacks a column, or a row is malformed: that is named.
    """
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if ending not in SEPARATORS:
        raise UserError(f"data.table={path}: expected a name that ends in {' '.join(SEPARATORS)}; .gz may follow")
    if ending in (".parquet", ".pq"):
        return _parquet_blocks(path, wanted)
    return _text_blocks(path, wanted, SEPARATORS[ending])


def _text_blocks(path: str, wanted: Sequence[str], separator: str) -> Iterator[Block]:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if separator:
                yield from _csv_blocks(path, file, wanted, separator)
            else:
                yield from _gathered(_json_rows(path, file, wanted), len(wanted))
    except (OSError, EOFError) as error:
        raise UserError(f"data.table={path}: cannot be read: {error}") from error


def _gathered(rows: Iterator[Sequence[Any]], wanted: int) -> Iterator[Block]:
    """Rows, each a number and as many cells as are wanted -> blocks."""
    width = 1 + wanted
    # Cells only are kept: a list or tuple a row would set off the search for garbage, four times the work of reading.
    while some := list(chain.from_iterable(islice(rows, ROWS))):
        numbers, *columns = (some[place::width] for place in range(width))
        yield Block(numbers, columns)


def _csv_blocks(path: str, file: IO[str], wanted: Sequence[str], separator: str) -> Iterator[Block]:
    """Plain lines by cutting whole blocks; from the first block on that is not so plain, row by row."""
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"data.table={path}: row {reader.line_num}: {error}") from error
    places = [_place(path, name, header) for name in wanted]
    lines = reader.line_num
    while text := file.read(CHARACTERS) + file.readline():
        cells = _plain_cells(text, separator, len(header))
        if cells is None:
            rest = csv.reader(chain(io.StringIO(text, newline=""), file), delimiter=separator, strict=True)
            yield from _gathered(_csv_rows(path, rest, places, len(header), lines), len(places))
            return
        numbers = range(lines + 1, lines + 1 + len(cells) // len(header))
        yield Block(numbers, [cells[place :: len(header)] for place in places])
        lines += len(numbers)


def _plain_cells(text: str, separator: str, width: int) -> list[str] | None:
    """The cells of some whole lines, row after row; None where it takes the csv module to tell what they are."""
    text = text.replace("\r\n", "\n")
    if width < 2 or any(sign in text for sign in '"\r\0'):
        return None
    text = text.removesuffix("\n")
    others = bytes(set(range(256)) - {ord(separator), ord("\n")})
    between = text.encode("utf-8", "surrogateescape").translate(None, others)
    of_a_line = separator.encode() * (width - 1)
    if between != b"\n".join([of_a_line] * (between.count(b"\n") + 1)):
        return None  # an empty line, or a row with more or fewer cells than the first
    cells = text.replace("\n", separator).split(separator)
    return cells if max(map(len, cells)) <= csv.field_size_limit() else None


def _csv_rows(path: str, reader: Any, places: Sequence[int], width: int, lines: int) -> Iterator[Sequence[Any]]:
    """Number and wanted cells of each row that `reader` gives; `lines` of the file came ahead of it."""
    try:
        for cells in reader:
            if not cells:
                continue  # an empty line
            if len(cells) != width:
                words = f"has {len(cells)} cells where the first line has {width} (a text with a comma needs quotes)"
                raise UserError(f"data.table={path}: row {lines + reader.line_num} {words}")
            yield (lines + reader.line_num, *[cells[place] for place in places])
    except csv.Error as error:
        raise UserError(f"data.table={path}: row {lines + reader.line_num}: {error}") from error


def _json_rows(path: str, file: IO[str], wanted: Sequence[str]) -> Iterator[Sequence[Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"data.table={path}: row {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'data.table={path}: row {number}: expected an object such as {{"{wanted[0]}": ...}}')
        for name in wanted:
            if name not in row:
                raise UserError(f"data.table={path}: row {number}: {_no_column(name, list(row))}")
        yield (number, *[row[name] for name in wanted])


def _parquet_blocks(path: str, wanted: Sequence[str]) -> Iterator[Block]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.table={path}: Parquet needs pyarrow: pip install 'finetune[parquet]', or save the table as .csv"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for name in wanted:
                _place(path, name, file.schema_arrow.names)
            rows = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=list(dict.fromkeys(wanted))):
                numbers = range(rows + 1, rows + 1 + batch.num_rows)
                yield Block(numbers, [batch.column(name).to_pylist() for name in wanted])
                rows += batch.num_rows
    except (ArrowException, OSError) as error:
        raise UserError(f"data.table={path}: cannot be read: {' '.join(str(error).split())}") from error


def _place(path: str, name: str, header: Sequence[str]) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise UserError(f"data.table={path}: has two columns called {name}")
    raise UserError(f"data.table={path}: {_no_column(name, header)}")


def _no_column(name: str, header: Sequence[str]) -> str:
    known = ", ".join(header) or "nothing"
    keys = "data.path_column, data.label_column and data.split_column name the columns"
    return f"has no column {name}{nearest(name, header)}; it has {known} ({keys})"
