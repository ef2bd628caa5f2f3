"""The files of a finished run: their checksums stand in `result.json`, so that nothing else is taken for its result.

A run that continues compares its files with its checkpoint instead, which the tools without torch cannot read.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.runs.history import History, as_lines
from finetune.runs.records import Result, read_result
from finetune.system.files import json_text
from finetune.system.ours import FolderKind, own_files
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, read_file
from finetune.system.seals import checksum_in

CHECKSUMS = "checksums"  # the entry of `result.json`
# Entries that equal runs may have differently, as those of a clock. What is wrong there changes no result.
OF_THE_START = ("seconds", "seconds_saving", "resumed_at", "overrides", CHECKSUMS)
BEST_WEIGHTS, LAST_WEIGHTS = "checkpoints/best.safetensors", "checkpoints/last.safetensors"
WEIGHTS = (BEST_WEIGHTS, LAST_WEIGHTS)
NAMES = ("result.json", "history.jsonl", "rates.json", "metrics.json", "confusion.csv", "confusion_val.csv", *WEIGHTS)


def checksums(run_dir: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of each file of a run that has ended with `result`, of weights alone unless it has finished.

    Equal runs have equal ones. Weights have theirs inside, which their readers compare; a file that is not there has an
    empty text.
    """
    names = (*(NAMES if result["status"] == "finished" else WEIGHTS), *weights_files(run_dir))
    return {name: _checksum(run_dir, name, result) for name in dict.fromkeys(names)}


def weights_files(run_dir: Path) -> list[str]:
    """The weights files in a run directory, as paths relative to it."""
    found = own_files(run_dir, FolderKind.run)
    return [path.relative_to(run_dir).as_posix() for path in found if path.suffix == ".safetensors"]


def check_finished(run_dir: Path, result: Result | None = None) -> None:
    """Compare the files of a finished run with the checksums in its `result`, which is read if it is not given.

    A weights file may be gone: people remove large files. A result without any checksums, as an earlier version wrote
    it, can still be looked at; whoever leaves work out because of it asks `check_claim` too.

    Raises:
        DamagedError: A file is not what the run wrote. Nothing is compared if the run has not finished.
    """
    result = read_result(run_dir / "result.json") if result is None else result
    if result["status"] != "finished" or CHECKSUMS not in result:
        return
    check_claim(run_dir, result)
    for name in dict.fromkeys((*NAMES, *weights_files(run_dir))):
        compare_with_result(run_dir, name, result)


def check_claim(run_dir: Path, result: Result) -> None:
    """Raise a DamagedError where `result` says `finished`, but lacks what a run writes when it finishes."""
    known: Mapping[str, str] = result.get(CHECKSUMS, {})
    if result["status"] == "finished" and (missing := [name for name in NAMES if name not in known]):
        why = f"it says that the run has finished, and has no checksum of {', '.join(missing)}"
        raise DamagedError.because(
            run_dir / "result.json",
            f"{why}, so somebody edited it, or an earlier version of finetune wrote it",
            _mend(run_dir),
        )


def compare_with_result(run_dir: Path, name: str, result: Result) -> None:
    """Compare the file `name` of a run with its checksum in `result`, if the run has ended and wrote one.

    Raises:
        DamagedError: It differs.
    """
    known: Mapping[str, str] = result.get(CHECKSUMS, {})
    if not known or (_is_weights(name) and not (run_dir / name).exists()):
        return
    if (found := _checksum(run_dir, name, result)) != known.get(name, ""):
        why = "it is not what the run wrote when it ended"
        why += f" (checksum {found or 'none'}, in result.json {known.get(name) or 'none'})" * _is_weights(name)
        raise DamagedError.because(run_dir / name, why, f"put it back from a copy, or {_mend(run_dir)}")


def _mend(run_dir: Path) -> str:
    return f"remove result.json and continue with resume={run_dir}: the run then tells what does not fit its checkpoint"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _checksum(run_dir: Path, name: str, result: Mapping[str, Any]) -> str:
    path = run_dir / name
    if _is_weights(name):
        return (checksum_in(path) or "") if path.exists() else ""
    readers: dict[str, Callable[[], bytes]] = {
        "result.json": lambda: json_text(
            {key: result[key] for key in sorted(result) if key not in OF_THE_START}
        ).encode(),
        "history.jsonl": lambda: as_lines(History(path).rows()).encode(),
    }
    content = readers[name]() if name in readers else _content(path)
    return f"{zlib.crc32(content):08x}"


def _content(path: Path) -> bytes:
    try:
        return read_file(path, limit=MAX_BYTES)
    except FileNotFoundError:
        return b""
    except UnfitError as error:
        raise DamagedError.because(path, str(error)) from None
