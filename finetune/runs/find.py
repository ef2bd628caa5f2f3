"""Finds the run that `resume=` means."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from finetune.config.words.saved import recorded_in
from finetune.runs.finished import check_claim
from finetune.runs.folders import OUTPUTS
from finetune.runs.records import read_result
from finetune.system.errors import UserError
from finetune.system.locks import holder
from finetune.system.log import say
from finetune.system.reading import DamagedError

LATEST = "latest"


def find_run(word: str) -> Path:
    """The run directory that `resume=word` names; prints the folder that `latest` stands for."""
    if word != LATEST or Path(word).is_dir():
        return Path(word)
    runs = sorted(_runs(OUTPUTS), key=_last_touched, reverse=True)
    if not runs:
        raise UserError(f"resume={LATEST}: there is no run under {OUTPUTS}; give its folder, resume=PATH")
    finished = []
    for folder in runs:
        try:
            status = _status(folder)
            recorded_in(folder)
        except UserError as error:
            say(f"resume={LATEST}: {error}: looking further")
            continue
        found = None if status == "finished" else holder(folder)
        if found is not None:
            say(f"resume={LATEST}: process {found.pid} is working in {folder}: looking further")
        elif status != "finished":
            say(f"resume={LATEST}: {folder}, {status}")
            return folder
        else:
            finished.append(folder)
    if not finished:
        raise UserError(f"resume={LATEST}: no run under {OUTPUTS} can be continued now; give its folder, resume=PATH")
    say(f"resume={LATEST}: every run under {OUTPUTS} is finished; the newest is {finished[0]}")
    return finished[0]


def _runs(outputs: Path) -> Iterator[Path]:
    """Runs and jobs of sweeps, but for those that failed before they saved anything."""
    for pattern in ("*/config.yaml", "*/*/config.yaml", "sweeps/*/*/*/config.yaml"):
        for path in outputs.glob(pattern):
            if any((path.parent / "checkpoints").glob("*.pt")) or not _has_failed(path.parent):
                yield path.parent


def _has_failed(folder: Path) -> bool:
    try:
        return _status(folder) in ("failed", "diverged")
    except DamagedError:  # named later, should nothing newer be found
        return False


def _status(folder: Path) -> str:
    """The status in `result.json`; a run that still says `running` was killed, or is at work. Raises DamagedError."""
    try:
        result = read_result(folder / "result.json")
    except FileNotFoundError:
        return "stopped before its result was written"
    check_claim(folder, result)
    status = str(result["status"])
    return "killed while it ran" if status == "running" else status


def _last_touched(folder: Path) -> int:
    """Nanoseconds since 1970 of the latest change to the run's files."""
    times = [0]  # of a run that was removed meanwhile
    for name in ("config.yaml", "result.json", "history.jsonl", "checkpoints/last.pt"):
        with contextlib.suppress(FileNotFoundError):
            times.append((folder / name).stat().st_mtime_ns)
    return max(times)
