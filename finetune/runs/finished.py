"""The numbers of a finished run: their checksums stand in `result.json`, so that a report shows no changed ones.

A run that continues compares its files with its checkpoint instead, which the tools without torch cannot read.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.runs.history import History, as_lines
from finetune.runs.records import Result, read_result
from finetune.system.files import json_text
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, read_file

CHECKSUMS = "checksums"  # the entry of `result.json`
# Entries that equal runs may have differently, as those of a clock. What is wrong there changes no result.
OF_THE_START = ("seconds", "seconds_saving", "resumed_at", "overrides", CHECKSUMS)


def checksums(run_dir: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of the numbers in each file of a run that has finished with `result`; equal runs have equal ones."""
    own = {name: result[name] for name in sorted(result) if name not in OF_THE_START}
    parts = {
        "result.json": json_text(own).encode(),
        "history.jsonl": as_lines(History(run_dir / "history.jsonl").rows()).encode(),
        "rates.json": _content(run_dir / "rates.json"),
        "metrics.json": _content(run_dir / "metrics.json"),
        "confusion.csv": _content(run_dir / "confusion.csv"),
    }
    return {name: f"{zlib.crc32(part):08x}" for name, part in parts.items()}


def check_finished(run_dir: Path, result: Result | None = None) -> None:
    """Compare the files of a finished run with the checksums in its `result`, which is read if it is not given.

    Raises:
        DamagedError: A file is not what the run wrote. Nothing is compared if the run has not finished.
    """
    result = read_result(run_dir / "result.json") if result is None else result
    if result["status"] != "finished" or CHECKSUMS not in result:
        return
    for name, value in checksums(run_dir, result).items():
        if result[CHECKSUMS].get(name, value) != value:  # an earlier version had no checksum of some files
            mend = f"without the entry {CHECKSUMS!r} in result.json it is taken as it is"
            raise DamagedError.because(run_dir / name, "it is not what the run wrote when it finished", mend)


def _content(path: Path) -> bytes:
    try:
        return read_file(path, limit=MAX_BYTES)
    except FileNotFoundError:
        return b""
    except UnfitError as error:
        raise DamagedError.because(path, str(error)) from None
