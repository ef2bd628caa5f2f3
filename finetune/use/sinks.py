"""Where rows about images go: to the screen, or block by block into a file; and the list of unreadable images."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.data import ImageError
from finetune.system.errors import UserError
from finetune.system.files import json_text
from finetune.system.log import say
from finetune.system.tables import csv_text, table
from finetune.system.terminal import printable
from finetune.use.record import Record

Row = Sequence[Any]  # a cell for each column: a text, a number, a list of texts, or an array of numbers
BETWEEN = ";"  # labels in one cell of a .csv
NPY_HEAD = 128  # bytes: enough for the shape of any array


class Sink(Protocol):
    """Takes rows and unreadable images; `commit` makes them last."""

    first: int  # the image to begin with
    has_parts: bool  # whether blocks must end at the same images each time

    @property
    def failed(self) -> int:
        """How many images could not be read so far."""

    def add(self, row: Row) -> None:
        """Take the row of the next image."""

    def lose(self, error: ImageError) -> None:
        """Take an image that cannot be read."""

    def commit(self, done: int) -> None:
        """Make the rows taken so far last: they are those of all images before number `done`."""

    def finish(self) -> None:
        """All images have been taken and committed."""


class Screen:
    """Prints rows as tables, and unreadable images on stderr."""

    first, has_parts = 0, False

    def __init__(self, columns: Sequence[str], *, is_quiet: bool = False) -> None:
        """With `is_quiet` only unreadable images are printed."""
        self.failed = 0
        self._columns, self._rows, self._is_quiet = columns, list[Row](), is_quiet

    def add(self, row: Row) -> None:
        """See `Sink`."""
        self._rows.append(row)

    def lose(self, error: ImageError) -> None:
        """See `Sink`."""
        self.failed += 1
        print(f"unreadable: {printable(str(error))}", file=sys.stderr)

    def commit(self, done: int) -> None:
        """See `Sink`."""
        cells = [[", ".join(cell) if isinstance(cell, list) else cell for cell in row] for row in self._rows]
        if cells and not self._is_quiet:
            say(table([dict(zip(self._columns, row, strict=True)) for row in cells], self._columns))
        self._rows = []

    def finish(self) -> None:
        """See `Sink`."""


class FileSink:
    """Writes rows to a .csv, .jsonl, .npy or to the numbered files of a .parquet, with the unreadable ones beside."""

    def __init__(self, record: Record, out: Path, columns: Sequence[str]) -> None:
        """Go on where `record` says. A .npy takes the last column, which has arrays, and lists the others beside."""
        self.first, self.has_parts = record.done, out.suffix == ".parquet"
        self._record, self._out, self._columns = record, out, list(columns)
        self._rows: list[Row] = []
        self._lost: list[Row] = []  # path and reason: an error would keep the frames that raised it

    @property
    def failed(self) -> int:
        """See `Sink`."""
        return self._record.failed

    def add(self, row: Row) -> None:
        """See `Sink`."""
        self._rows.append(row)

    def lose(self, error: ImageError) -> None:
        """See `Sink`."""
        self._lost.append([error.path, error.reason])

    def commit(self, done: int) -> None:
        """See `Sink`."""
        if self.has_parts:
            self._record.add_part(parquet_bytes(self._columns, self._rows))
        elif self._out.suffix == ".npy":
            self._append_array()
        elif self._out.suffix == ".jsonl":
            lines = [json_text(dict(zip(self._columns, row, strict=True))) + "\n" for row in self._rows]
            self._record.append(self._out, "".join(lines).encode())
        else:
            self._append_csv(self._out, self._columns, self._rows)
        if self._lost:
            self._append_csv(unreadable_of(self._out), ["path", "reason"], self._lost)
        self._record.commit(done, rows=len(self._rows), failed=len(self._lost))
        self._rows, self._lost = [], []

    def finish(self) -> None:
        """See `Sink`."""
        if self._out.suffix == ".npy":
            rows = self._record.rows
            width = (self._record.size_of(self._out) - NPY_HEAD) // 4 // rows if rows else 0
            self._record.replace_head(self._out, npy_head(rows, width))
        self._record.finish()

    def _append_csv(self, path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
        cells = [[BETWEEN.join(cell) if isinstance(cell, list) else cell for cell in row] for row in rows]
        self._record.append(path, csv_text(cells).encode(), head=csv_text([columns]).encode())

    def _append_array(self) -> None:
        values = np.array([row[-1] for row in self._rows], dtype="<f4")
        self._record.append(self._out, values.tobytes(), head=npy_head(0, 0), spare=NPY_HEAD)
        self._append_csv(paths_of(self._out), self._columns[:-1], [row[:-1] for row in self._rows])


def unreadable_of(out: Path) -> Path:
    """The list of the images that could not be read."""
    return out.with_name(f"{out.name}.unreadable.csv")


def paths_of(out: Path) -> Path:
    """The list of the images whose features stand in a .npy, a line a row."""
    return out.with_name(f"{out.name}.paths.csv")


def npy_head(rows: int, width: int) -> bytes:
    """The beginning of a .npy file of float32 (rows, width), always `NPY_HEAD` bytes (NumPy's format 1.0)."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (NPY_HEAD - 10).to_bytes(2, "little") + text.ljust(NPY_HEAD - 11).encode() + b"\n"


def parquet_bytes(columns: Sequence[str], rows: Sequence[Row]) -> bytes:
    """Rows as a Parquet file: texts, float32, lists of texts, or lists of float32."""
    import pyarrow as arrow  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from pyarrow import parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def kind(name: str) -> Any:
        if name == "labels":
            return arrow.list_(arrow.string())
        if name == "embedding":
            return arrow.list_(arrow.float32())
        return arrow.float32() if name.startswith(("probability", "p:")) else arrow.string()

    cells = {name: [_storable(row[index]) for row in rows] for index, name in enumerate(columns)}
    arrays = [arrow.array(cells[name], type=kind(name)) for name in columns]
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_arrays(arrays, names=list(columns)), file)
    return file.getvalue()


def _storable(cell: Any) -> Any:
    """A text without the lone surrogates of a file name that is no UTF-8; anything else as it is."""
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


def check_parquet() -> None:
    """Raise a UserError where the package for Parquet is missing."""
    try:
        import pyarrow.parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--out: .parquet needs pyarrow: pip install 'finetune[parquet]', or use .csv") from error
