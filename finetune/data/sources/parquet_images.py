"""Images whose bytes lie in a column of a Parquet file, as `data=table` reads them: one row group at a time."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.data.images.decode import ImageError, check_encoded, error_words
from finetune.data.sources.stores import file_stamp
from finetune.data.sources.table_rows import RowPlaces
from finetune.data.split import ImageStore
from finetune.system.errors import UserError
from finetune.system.limits import MIB, Limit, in_bytes

# To read an image is to unpack its row group: about 0.1 s for 256 MiB, and each worker holds one. Larger groups would
# be slow beyond use, while data=hf reads the same files image by image.
MEND = "write the table anew with row groups of about 16 MiB (row_group_size=100 for images of 160 KiB), or use data=hf"
ROW_GROUP = Limit(256 * MIB, MEND)
SLOW = 64 * MIB  # of a row group, from which on a person is told: it takes longer to read than a photo to decode
PIECE = 16  # rows of a group that are unpacked at once

RowEnds = np.ndarray[Any, np.dtype[np.int64]]


def image_rows(path: str, column: str) -> RowEnds | None:
    """The number of rows up to the end of each row group, int64 (groups,); None if the column holds no images.

    Images are binary cells, or structures `{bytes, path}`. Raises UserError for a row group that is too large.
    """
    if os.path.splitext(path.lower())[1] not in (".parquet", ".pq") or not os.path.isfile(path):
        return None
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError:
        return None  # the reader of the other columns says so
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if names.count(column) != 1:
                return None
            kind = str(file.schema_arrow.field(column).type).replace("large_", "")
            if kind != "binary" and not (kind.startswith("struct<") and "bytes: binary" in kind):
                return None
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            for number, group in enumerate(groups):
                ROW_GROUP.check(f"data.table={path}: row group {number} of {column}", _size_of(group, column))
            return np.cumsum([group.num_rows for group in groups], dtype=np.int64)
    except UserError:
        raise
    except (ArrowException, OSError, ValueError, ArithmeticError):
        return None  # the reader of the other columns says what is wrong


def slow_groups(path: str, column: str) -> list[str]:
    """A warning where the row groups of a file that has `image_rows` are so large that reading is slow."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    size, images = max((_size_of(group, column), group.num_rows) for group in groups) if groups else (0, 0)
    if size < SLOW:
        return []
    return [f"{path}: each image is read by unpacking {in_bytes(size)}, its row group of {images:,} images; {MEND}"]


def _size_of(group: Any, column: str) -> int:
    """The bytes of a column in a row group, unpacked, as the file claims them."""
    leaves = (group.column(leaf) for leaf in range(group.num_columns))
    return sum(leaf.total_uncompressed_size for leaf in leaves if _is_of(leaf.path_in_schema, column))


def _is_of(leaf: str, column: str) -> bool:
    """Whether a leaf such as `image.bytes` belongs to a column."""
    return leaf == column or leaf.startswith(f"{column}.")


class ParquetStore(ImageStore):
    """Images in a column of Parquet files. Each process keeps the row group that it read last."""

    def __init__(self, column: str, ends: Sequence[RowEnds], places: RowPlaces) -> None:
        """Take the column, the `image_rows` of each file, and the file and row of each image."""
        self._column, self._ends, self._places = column, ends, places
        self._last: tuple[tuple[int, int], str, Any] = ((-1, -1), "", None)  # a row group, its stamp then, its cells

    def __getstate__(self) -> dict[str, Any]:
        """Without cells, so that a worker process gets a few bytes an image."""
        return {**vars(self), "_last": ((-1, -1), "", None)}

    def read(self, row: int) -> bytes:
        """The bytes of the image file; raises ImageError."""
        file, number = self._places.find(row)
        ends = self._ends[file]
        group = int(np.searchsorted(ends, number - 1, side="right"))
        stamp = file_stamp(self._places.tables[file])
        last = self._last  # other threads may replace it meanwhile
        if last[:2] != ((file, group), stamp):
            last = self._last = ((file, group), stamp, self._cells(group, row))
        index = number - 1 - (int(ends[group - 1]) if group else 0)
        cell = last[2][index] if index < len(last[2]) else None
        value = None if cell is None else cell.as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            only = (
                f", only the path {str(path)[:80]}: data=hf reads such cells, or write a table of paths" if path else ""
            )
            raise ImageError(self.name_of(row), f"the cell has no bytes of an image{only}")
        check_encoded(self.name_of(row), len(data), self.max_pixels)
        return bytes(data)

    def _cells(self, group: int, row: int) -> Any:
        """The column in one row group; raises ImageError for the image at `row`, also if the group claimed less."""
        import pyarrow
        import pyarrow.parquet as parquet

        parts, size = [], 0
        try:
            with parquet.ParquetFile(
                self._places.table_of(row)
            ) as file:  # anew, since worker processes share no open file
                # Without threads, which a forked process does not have. Piece by piece, since the sizes that
                # `image_rows` has seen may be wrong.
                columns = {"row_groups": [group], "columns": [self._column], "use_threads": False}
                for batch in file.iter_batches(PIECE, **columns):
                    parts.append(batch.column(0))
                    size += batch.nbytes
                    if size > ROW_GROUP.most:
                        why = (
                            f"its row group holds more than it claims, and more than {in_bytes(ROW_GROUP.most)}: {MEND}"
                        )
                        raise ImageError(self.name_of(row), why)
                return pyarrow.chunked_array(parts) if parts else []
        except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(self.name_of(row), error_words(error)) from error

    def stamp(self, row: int) -> str:
        """The Parquet file's `file_stamp`, and the image's column and row; raises ImageError without the file."""
        return f"{self._places.numbers[row]}:{self._column}:{file_stamp(self._places.table_of(row))}"

    def key_of(self, row: int) -> str:
        """The column and the row; behind the name of the file, if there are several."""
        file = f"{os.path.basename(self._places.table_of(row))}: " if len(self._places.tables) > 1 else ""
        return f"{file}{self._column}[{self._places.numbers[row]}]"

    def name_of(self, row: int) -> str:
        """The Parquet file, the column and the row, from 1."""
        return f"{self._places.table_of(row)}: {self._column}[{self._places.numbers[row]}]"
