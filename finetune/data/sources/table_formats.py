"""Reads a table as blocks of rows: CSV and TSV, JSON lines, Parquet. Memory does not grow with the table."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from typing import Any, NamedTuple

from finetune.config import nearest
from finetune.system.errors import UserError
from finetune.system.limits import COLUMNS, BoundedLines, Limit, encoding_problem
from finetune.system.reading import open_regular

SEPARATORS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": "", ".pq": ""}
ROWS = 16_384  # in a block
BLOCK_LETTERS = 2**26  # after which a block ends with the row
SHOWN, NAME = 20, 80  # columns that a message names, and letters of each


class ColumnBlock(NamedTuple):
    """Consecutive rows of a table, column by column."""

    numbers: Sequence[int]  # the row's number in the file, from 1; in a text file the number of its last line
    columns: Sequence[Sequence[Any]]  # for each wanted column the cells, one a row


def read_blocks(path: str, wanted: Sequence[str], limit: Limit) -> Iterator[ColumnBlock]:
    """Yield all rows of the table at `path`, with the columns called `wanted` in that order; a row has a `limit`.

    Raises UserError if the format is unknown, the file cannot be read, or a column or a cell is missing.
    """
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    try:
        if ending not in SEPARATORS:
            raise UserError(f"expected a name that ends in {' '.join(SEPARATORS)}; .gz may follow")
        open_regular(path).close()  # a pipe would wait without end
        is_text = ending not in (".parquet", ".pq")
        if is_text:
            yield from _text_blocks(path, wanted, SEPARATORS[ending], limit)
        else:
            yield from _parquet_blocks(path, wanted, limit)
    except UserError as error:
        raise UserError(f"data.table={path}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.table={path}: cannot be read: {error}") from error
    except MemoryError as error:
        raise UserError(f"data.table={path}: reading it takes more memory than is free; cut it into several") from error


def _text_blocks(path: str, wanted: Sequence[str], separator: str, limit: Limit) -> Iterator[ColumnBlock]:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    width = 1 + len(wanted)
    with opener(path, "rb") as file:
        if problem := encoding_problem(file.read(64)):
            raise UserError(problem)
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = BoundedLines(file, "", limit)
        rows = _csv_rows(lines, wanted, separator, limit) if separator else _json_rows(lines, wanted)
        # Flat lists of cells. A stored tuple a row would start the garbage collector again and again, which takes four
        # times as long as reading.
        while cells := list(chain.from_iterable(_next_rows(rows, lines))):
            numbers, *columns = (cells[place::width] for place in range(width))
            yield ColumnBlock(numbers, columns)


def _next_rows(rows: Iterator[Sequence[Any]], lines: BoundedLines) -> Iterator[Sequence[Any]]:
    """The rows of the next block: `ROWS`, or fewer long ones, so that a block never takes much memory."""
    end = lines.total + BLOCK_LETTERS
    for row in islice(rows, ROWS):
        yield row
        if lines.total > end:
            return


def _csv_rows(lines: BoundedLines, wanted: Sequence[str], separator: str, limit: Limit) -> Iterator[Sequence[Any]]:
    """(number, wanted cells...) of each row below the header."""
    csv.field_size_limit(limit.most)  # of the whole process; by default 128 KiB
    first = next(lines, "")
    reader = csv.reader(
        chain([first], lines), delimiter=_separator(first, separator, wanted), strict=True, skipinitialspace=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        COLUMNS.check("the first line", len(header))
        wanted_of = itemgetter(*[_place(name, header) for name in wanted])  # two columns or more
        lines.taken = 0
        for cells in reader:
            if cells:  # a row may go over several lines; empty ones, which may be endless, count for the next row
                lines.taken = 0
            if len(cells) == len(header):
                yield (reader.line_num, *wanted_of(cells))
            elif cells:  # an empty line has none
                counts = f"{len(cells)} cells where the first line has {len(header)}"
                raise UserError(f"row {reader.line_num} has {counts} (a text with a comma needs quotes)")
    except csv.Error as error:
        raise UserError(f"row {reader.line_num}: {error}") from error


def _separator(first: str, usual: str, wanted: Sequence[str]) -> str:
    """What stands between cells: `usual`, or what makes all wanted columns of the first line, as `;` of Excel does."""
    for separator in (usual, ";", "\t", "|", ","):
        if set(wanted) <= {cell.strip().strip('"') for cell in first.split(separator)}:
            return separator
    return usual


def _json_rows(lines: BoundedLines, wanted: Sequence[str]) -> Iterator[Sequence[Any]]:
    """(number, wanted cells...) of each line that is not empty."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        lines.taken = 0
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"row {number} is no JSON: {error}") from error
        except ValueError as error:
            raise UserError(f"row {number} holds a number of more than 4,300 digits") from error
        except RecursionError as error:
            raise UserError(f"row {number}: brackets stand in more brackets than are read") from error
        if not isinstance(row, dict):
            raise UserError(f'row {number}: expected an object such as {{"{wanted[0]}": ...}}')
        for name in wanted:
            if name not in row:
                raise UserError(f"row {number}: {_no_column(name, list(row))}")
        yield (number, *[row[name] for name in wanted])


def _parquet_blocks(path: str, wanted: Sequence[str], limit: Limit) -> Iterator[ColumnBlock]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise UserError("Parquet needs pyarrow: pip install 'finetune[parquet]', or save the table as .csv") from error
    try:
        with parquet.ParquetFile(path) as file:
            for name in wanted:
                COLUMNS.check("the table", len(file.schema_arrow.names))
                _place(name, file.schema_arrow.names)
            rows = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=list(dict.fromkeys(wanted))):
                _check_texts(batch, limit)
                # One long text may stand behind many rows, and each row gets a copy of its own here.
                size = sum(_unpacked_bytes(column) for column in batch.columns)
                step = max(1, batch.num_rows * BLOCK_LETTERS // max(size, BLOCK_LETTERS))
                for start in range(0, batch.num_rows, step):
                    part = batch.slice(start, step)
                    numbers = range(rows + 1, rows + 1 + part.num_rows)
                    yield ColumnBlock(numbers, [part.column(name).to_pylist() for name in wanted])
                    rows += part.num_rows
    except UserError:
        raise
    except (ArrowException, ValueError, ArithmeticError) as error:  # also of cells: texts that are none, odd dates
        raise UserError(f"cannot be read: {' '.join(str(error).split())}") from error


def _check_texts(batch: Any, limit: Limit) -> None:
    """A LimitError for a text in an Arrow batch that is longer than a row may be, before Python copies it."""
    from pyarrow import DictionaryArray, compute, types  # type: ignore[import-not-found, import-untyped, unused-ignore]

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        texts = column.dictionary if isinstance(column, DictionaryArray) else column
        if types.is_string(texts.type) or types.is_large_string(texts.type):
            limit.check(f"a text in the column {name}", compute.max(compute.binary_length(texts)).as_py() or 0)


def _unpacked_bytes(column: Any) -> int:
    """The most bytes that the cells of an Arrow column take once each stands for itself, and not for a dictionary's."""
    from pyarrow import DictionaryArray  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return int(len(column) * column.dictionary.nbytes if isinstance(column, DictionaryArray) else column.nbytes)


def _place(name: str, header: Sequence[str]) -> int:
    if header.count(name) == 1:
        return header.index(name)
    raise UserError(f"has two columns called {name}" if name in header else _no_column(name, header))


def _no_column(name: str, header: Sequence[str]) -> str:
    known = ", ".join(name[:NAME] for name in header[:SHOWN]) or "nothing"
    known += f" and {len(header) - SHOWN:,} more" * (len(header) > SHOWN)
    keys = "data.path_column, data.label_column and data.split_column name the columns"
    return f"has no column {name}{nearest(name, header)}; it has {known} ({keys})"
