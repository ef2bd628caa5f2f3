"""What a run writes down beside its words: JSON files and `history.jsonl`, which never tear.

Standard library only, so that the tools for finished runs (report, sweep) need no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.system.terminal import printable


def write_json(path: Path, data: object) -> None:
    """Write `data` as readable JSON, atomically; keys in the order given, NaN and infinities as null.

    Raises:
        OSError: It could not be written; what was there before is untouched.
        TypeError: `data` holds something that JSON cannot say.
    """
    write_text(path, json.dumps(_jsonable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _jsonable(data: Any) -> Any:
    """`data` without NaN and infinities, which JSON has no word for and strict readers refuse."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _jsonable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_jsonable(value) for value in data]
    # A file name of undecodable bytes has lone surrogates, which UTF-8 cannot hold.
    return data.encode("utf-8", "backslashreplace").decode() if isinstance(data, str) else data


# Columns of a row that a clock or a cache has its part in: equal runs may differ there.
OF_THE_CLOCK = ("seconds", "images_per_s", "data_wait", "prefix_hits", "mfu")


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the history without `OF_THE_CLOCK`: the same in equal runs, to the last bit."""
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


class History:
    """`history.jsonl`: one JSON object a line, one line an epoch, on disk before training goes on."""

    def __init__(self, path: Path) -> None:
        """Name the file; it need not exist yet."""
        self.path = path

    def append(self, row: Mapping[str, object]) -> None:
        """Add one row, flushed to disk; NaN and infinities become null. A line torn by an earlier crash is cut off.

        Raises:
            OSError: It could not be written.
        """
        line = (json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
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
        """All whole rows; a torn last line is left out, a missing file has none.

        Raises:
            ValueError: A line before the last is no JSON object: somebody edited the file.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self._whole().decode("utf-8", "replace").split("\n"), start=1):
            if not line.strip():
                continue
            row = _parse(line)
            if row is None:
                where = f"{printable(str(self.path))}, line {number}"
                found = printable(line[:60])
                raise UserError(
                    f"{where}: expected one JSON object, found {found!r}; delete the line or restore the file"
                )
            rows.append(row)
        return rows

    def cut(self, num_epochs: int) -> None:
        """Keep the first `num_epochs` rows, so that a resumed run does not tell an epoch twice.

        Raises:
            ValueError: See `rows`.
            OSError: It could not be written; the file is as before.
        """
        if self.path.exists():
            kept = self.rows()[:num_epochs]
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _whole(self) -> bytes:
        """The file without the torn start of a row at its end; a whole row that only lacks its line break stays."""
        data = self.path.read_bytes()
        last = data.rfind(b"\n") + 1
        return data if _parse(data[last:].decode("utf-8", "replace")) is not None else data[:last]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
