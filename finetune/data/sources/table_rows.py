"""The rows of one table, or of several that are read as one: in which file and row each image stands."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]] | np.ndarray[Any, np.dtype[np.int32]]


class RowPlaces:
    """In which table, and in which row of it, each image stands."""

    def __init__(self, tables: Sequence[str], numbers: Numbers, files: Numbers | None = None) -> None:
        """Take the paths of the tables, and of each image the number of its row, from 1, and the place of its table.

        Without `files` all images are of the first table.
        """
        self.tables, self.numbers, self._files = list(tables), numbers, files

    def find(self, row: int) -> tuple[int, int]:
        """The place in `tables`, and the number of the row there."""
        return 0 if self._files is None else int(self._files[row]), int(self.numbers[row])

    def table_of(self, row: int) -> str:
        """The path of the table that holds an image's row."""
        return self.tables[self.find(row)[0]]
