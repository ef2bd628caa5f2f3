"""Finds the run that `resume=` means."""

import json
from collections.abc import Iterator
from pathlib import Path

from finetune.runs.folders import OUTPUTS
from finetune.system.errors import UserError
from finetune.system.locks import holder
from finetune.system.log import say

LATEST = "latest"


def find_run(word: str) -> Path:
    """The run directory that `resume=word` names; prints the folder that `latest` stands for."""
    if word != LATEST or Path(word).is_dir():
        return Path(word)
    runs = sorted(_runs(OUTPUTS), key=_last_touched, reverse=True)
    if not runs:
        raise UserError(f"resume={LATEST}: there is no run under {OUTPUTS}; give its folder, resume=PATH")
    for folder in runs:
        status = _status(folder)
        found = None if status == "finished" else holder(folder)
        if found is not None:
            say(f"resume={LATEST}: process {found.pid} is working in {folder}: looking further")
        elif status != "finished":
            say(f"resume={LATEST}: {folder}, {status}")
            return folder
    say(f"resume={LATEST}: every run under {OUTPUTS} is finished; the newest is {runs[0]}")
    return runs[0]


def _runs(outputs: Path) -> Iterator[Path]:
    """Runs and jobs of sweeps, but for those that failed before they saved anything."""
    for pattern in ("*/config.yaml", "*/*/config.yaml", "sweeps/*/*/*/config.yaml"):
        for path in outputs.glob(pattern):
            is_saved = any((path.parent / "checkpoints").glob("*.pt"))
            if is_saved or _status(path.parent) not in ("failed", "diverged"):
                yield path.parent


def _status(folder: Path) -> str:
    """The status in `result.json`; a run that still says `running` was killed, or is at work."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "stopped before its result was written"
    status = result.get("status") if isinstance(result, dict) else None
    return "killed while it ran" if status == "running" else str(status)


def _last_touched(folder: Path) -> int:
    """Nanoseconds since 1970 of the latest change to the run's files."""
    paths = (folder / name for name in ("config.yaml", "result.json", "history.jsonl", "checkpoints/last.pt"))
    return max(path.stat().st_mtime_ns for path in paths if path.exists())
