"""`history.jsonl`: a row an epoch, in a file that a kill or a full disk cannot damage.

Standard library only, so that the tools for finished runs (report, sweep) need no torch.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.system.errors import UserError
from finetune.system.files import jsonable, write_text
from finetune.system.terminal import printable

# Columns of a row that depend on a clock or a cache: equal runs may differ there.
OF_THE_CLOCK = ("seconds", "images_per_s", "data_wait", "prefix_hits", "mfu")


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the history without the columns `OF_THE_CLOCK`. Equal runs have equal such rows, to the last bit."""
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


class History:
    """The file `history.jsonl`: one JSON object a line, one line an epoch, on the disk before training goes on."""

    def __init__(self, path: Path) -> None:
        """The file at `path`, which need not exist yet."""
        self.path = path

    def append(self, row: Mapping[str, object]) -> None:
        """Add one row and flush it to the disk, NaN and infinities as null. Removes a line that a crash left torn."""
        line = (json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        if not self.path.exists():
            write_text(self.path, "")  # so that the new name in the folder is on disk too
        with open(self.path, "ab+") as file:
            whole = self._whole()
            file.truncate(len(whole))
            file.seek(0, os.SEEK_END)
            file.write(line if whole.endswith(b"\n") or not whole else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All rows. Leaves out a torn last line; a missing file has no rows.

        Raises:
            UserError: A line before the last is no JSON object: somebody edited the file.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self._whole().decode("utf-8", "replace").split("\n"), start=1):
            if line.strip():
                row = _parse(line)
                if row is None:
                    found = f"{printable(str(self.path))}, line {number}: expected one JSON object, found"
                    raise UserError(f"{found} {printable(line[:60])!r}; delete the line or restore the file")
                rows.append(row)
        return rows

    def cut(self, num_epochs: int) -> None:
        """Keep the first `num_epochs` rows, atomically: a resumed run adds the rows of the later epochs again."""
        if self.path.exists():
            kept = self.rows()[:num_epochs]
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _whole(self) -> bytes:
        """The file's content without a torn row at its end; a whole row that only lacks its line break stays."""
        data = self.path.read_bytes()
        last = data.rfind(b"\n") + 1
        return data if _parse(data[last:].decode("utf-8", "replace")) is not None else data[:last]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
