"""The configuration that a run directory holds, and the runs under `outputs`: what `resume=` starts from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune.config import Conf, find_problems
from finetune.config.words.commandline import ConfigError
from finetune.config.words.settings import SETTINGS, build, convert, nearest_setting
from finetune.runs.folders import OUTPUTS
from finetune.system.locks import holder
from finetune.system.log import say

LATEST = "latest"


def read_conf(run_dir: Path) -> Conf:
    """The configuration of the run in `run_dir`, as its `config.yaml` has it; a younger setting has its default.

    Raises:
        ConfigError: It is no run directory, or the file is damaged.
    """
    conf = build(read_values(run_dir))
    problems = find_problems(conf)
    if problems:
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in problems])
    return conf


def read_values(run_dir: Path) -> dict[str, Any]:
    """The settings of the run in `run_dir` by dotted key, converted.

    Raises:
        ConfigError: It is no run directory, or the file is damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError([_no_run(run_dir)])
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path} is damaged: it holds no settings"])
    problems, values = [], {}
    for name, value in _leaves(tree):
        if name not in SETTINGS:
            problems.append(
                f"{path}: no such setting {name}{nearest_setting(name)}; another version of finetune wrote it"
            )
            continue
        try:
            values[name] = convert(SETTINGS[name], value)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(problems)
    return values


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in SETTINGS:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"resume={folder}: there is no such folder; give a run directory, or resume={LATEST}"
    inside = folder.parent if folder.name == "checkpoints" else folder.parent.parent
    if folder.name in ("checkpoints", "last.pt") and (inside / "config.yaml").exists():
        return f"resume={folder}: give the run directory itself, resume={inside}"
    return (
        f"resume={folder}: it has no config.yaml, so no run was begun there; give a run directory, such as"
        " outputs/<date>/<time>"
    )


def find_run(word: str) -> Path:
    """The run directory that `resume=word` names; says which where it is `latest`.

    Raises:
        ConfigError: There is none to continue.
    """
    if word != LATEST or Path(word).is_dir():
        return Path(word)
    runs = sorted(_runs(OUTPUTS), key=_last_touched, reverse=True)
    if not runs:
        raise ConfigError([f"resume={LATEST}: there is no run under {OUTPUTS}; give its folder, resume=PATH"])
    for folder in runs:
        status = _status(folder)
        found = None if status == "finished" else holder(folder)
        if found is not None:
            say(f"resume={LATEST}: {folder} is being worked in by process {found.pid}: looking further")
        elif status != "finished":
            say(f"resume={LATEST}: {folder}, {status}")
            return folder
    say(f"resume={LATEST}: no run under {OUTPUTS} is left to continue; the newest is {runs[0]}")
    return runs[0]


def _runs(outputs: Path) -> Iterator[Path]:
    """Runs and jobs of sweeps; one that failed before anything was saved has nothing to continue."""
    for pattern in ("*/config.yaml", "*/*/config.yaml", "sweeps/*/*/*/config.yaml"):
        for path in outputs.glob(pattern):
            saved = any((path.parent / "checkpoints").glob("*.pt"))
            if saved or _status(path.parent) not in ("failed", "diverged"):
                yield path.parent


def _status(folder: Path) -> str:
    """As `result.json` has it; a run that still says `running` was killed, or is at work."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "stopped before its result was written"
    status = result.get("status") if isinstance(result, dict) else None
    return "killed while it ran" if status == "running" else str(status)


def _last_touched(folder: Path) -> int:
    names = ("config.yaml", "result.json", "history.jsonl", "checkpoints/last.pt")
    return max(path.stat().st_mtime_ns for path in (folder / name for name in names) if path.exists())
