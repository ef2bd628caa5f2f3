"""`history.jsonl`: a row an epoch, in a file that a kill or a full disk cannot damage.

No torch, so that the tools for finished runs (report, sweep) are quick.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.runs.records import history_row
from finetune.system.errors import naming
from finetune.system.files import json_text, write_text
from finetune.system.ours import open_own
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, parse_json, parse_json_lines, read_file

logger = logging.getLogger("finetune")

MEND = "delete the line, or restore the file"
# Columns of a row that depend on a clock or a cache: equal runs may differ there.
OF_THE_CLOCK = ("seconds", "images_per_s", "data_wait", "prefix_hits", "mfu")


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of the history without the columns `OF_THE_CLOCK`, a line of JSON each."""
    return "".join(json.dumps(row) + "\n" for row in timeless(rows))


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
        line = (json_text(row) + "\n").encode()
        if not self.path.exists():
            write_text(self.path, "")  # so that the new name in the folder is on disk too
        with naming(self.path), open_own(self.path, "ab+") as file:
            whole = self._whole()
            file.truncate(len(whole))
            file.seek(0, os.SEEK_END)
            file.write(line if whole.endswith(b"\n") or not whole else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All rows. Leaves out a torn last line; a missing file has no rows.

        Raises:
            DamagedError: The file cannot be read, or a line is no row of an epoch: somebody edited the file.
        """
        try:
            rows = [history_row(value) for value in parse_json_lines(self._whole(), dict)]
        except UnfitError as error:
            raise DamagedError.because(self.path, str(error), MEND) from None
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise DamagedError.because(self.path, "its epochs are not 1, 2, 3 and so on", MEND)
        return rows

    def readable_rows(self) -> list[dict[str, Any]]:
        """All rows; none where the file is damaged."""
        try:
            return self.rows()
        except DamagedError as error:
            logger.warning("%s", error)
            return []

    def restore(self, text: str, found: Sequence[Mapping[str, Any]]) -> None:
        """Bring the file back to the rows that a state carries, `text` of `as_lines`; a resumed run adds later ones.

        `found` are the `readable_rows`. Warns where they differ from the state's: the file was edited, damaged or
        removed. Rows that are restored lack the columns `OF_THE_CLOCK`.
        """
        wanted = parse_json_lines(text.encode(), dict)
        kept: Sequence[Mapping[str, Any]] = found[: len(wanted)]
        if timeless(kept) != wanted:
            logger.warning("%s was not what the run wrote: its rows are restored from the checkpoint", self.path)
            kept = wanted
        if os.path.lexists(self.path) or kept:
            write_text(self.path, "".join(json_text(row) + "\n" for row in kept))

    def _whole(self) -> bytes:
        """The file's content without a torn row at its end; a whole row that only lacks its line break stays."""
        try:
            data = read_file(self.path, limit=MAX_BYTES)
        except FileNotFoundError:
            return b""
        except UnfitError as error:
            raise DamagedError.because(self.path, str(error), "restore the file") from None
        last = data.rfind(b"\n") + 1
        try:
            parse_json(data[last:], dict)
        except UnfitError:
            return data[:last]
        return data
