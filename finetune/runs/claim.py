"""What a folder holds, and whether this configuration may go on with it. Reads only; no torch.

A run goes on with its own configuration. Beside `resume=` some settings may change: those that only say how the work
is done, and the number of epochs, which may grow. Others would make it another run, and need `resume_force=true`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.config import Conf, as_dict
from finetune.system.errors import UserError

# Files by which a folder is known to hold a run.
OWN_FILES = (
    *("config.yaml", "history.jsonl", "result.json", "rates.json", "run.log", "checkpoints"),
    *("metrics.json", "confusion.csv", "confusion_val.csv", "confusion.png", "lr.png", "curves.png"),
    *("skipped.txt", "bad_batch"),
)

# Say how a run is carried on with, never what it is.
NOT_OF_THE_RUN = ("resume", "resume_force")
# May change on resume: the weights stay the same to the last bit.
FREE = (
    *("train.save_every_steps", "train.save_every_minutes", "train.max_save_share"),
    *("train.keep", "train.patience"),
    *("train.on_nonfinite", "train.max_nonfinite"),
    *("prefix.cache", "prefix.max_gib"),
    *("data.workers", "data.cache", "data.cache_dir", "data.cache_gib", "data.check_budget_s", "data.download"),
    "data.on_error",  # the images of a run are settled at its first start
)
# May change on resume: the same arithmetic by other kernels.
CLOSE = ("device", "deterministic", "train.class_token_only", "train.compile")

Result = dict[str, Any]


class RefusedError(UserError):
    """The folder is not this run's: nothing in it was changed, and no failure is put on record there."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the run's own.

    Attributes:
        key: Dotted.
        before: In the run's `config.yaml`.
        now: Asked for.
    """

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """`key: before -> now`."""
        return f"{self.key}: {self.before} -> {self.now}"

    @property
    def is_allowed(self) -> bool:
        """Whether it needs no `resume_force`."""
        if self.key == "train.epochs":
            return bool(self.now > self.before)
        return self.key in FREE or self.key in CLOSE


@dataclass(frozen=True)
class Holding:
    """What a folder holds of this run.

    Attributes:
        earlier: Its `result.json`; None in a fresh folder.
        changes: Settings that differ, all of them allowed or forced.
    """

    earlier: Result | None = None
    changes: list[Change] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        grown = any(change.key == "train.epochs" or not change.is_allowed for change in self.changes)
        return self.earlier is not None and self.earlier["status"] == "finished" and not grown

    @property
    def resumed_at(self) -> list[int]:
        """Global steps at which it was resumed so far."""
        return [] if self.earlier is None else list(self.earlier["resumed_at"])


def inspect(run_dir: Path, conf: Conf) -> Holding:
    """Look at `run_dir` before anything is written there.

    Raises:
        RefusedError: It holds a run that `conf` may not continue, files that a run would overwrite, or damage.
    """
    config_path = run_dir / "config.yaml"
    found = [name for name in OWN_FILES if (run_dir / name).exists()]
    if not config_path.exists():
        if found:
            raise RefusedError(
                f"{run_dir} has {', '.join(found)} but no config.yaml, so it is no run of finetune: choose another"
                " folder"
            )
        if conf.resume is not None:
            raise RefusedError(f"resume={run_dir}: nothing is there to continue: leave resume out to start a run")
        return Holding()
    changes = differences(config_path, conf)
    _refuse_others(run_dir, conf, changes)
    return Holding(_earlier_result(run_dir / "result.json"), changes)


def _refuse_others(run_dir: Path, conf: Conf, changes: list[Change]) -> None:
    shown = "; ".join(map(str, changes))
    if changes and conf.resume is None:
        raise RefusedError(
            f"{run_dir} holds a run of another configuration ({shown}); nothing was changed: choose another folder, or"
            f" start with the same settings to continue it (resume={run_dir} continues it with its own)"
        )
    refused = [change for change in changes if not change.is_allowed]
    if refused and not conf.resume_force:
        shorter = [change for change in refused if change.key == "train.epochs"]
        why = "fewer epochs than planned, and so another rate curve" if shorter else "that would be another run"
        raise RefusedError(
            f"resume={run_dir}: {'; '.join(map(str, refused))}: {why}. Nothing was changed: leave it out, start a new"
            " run, or add resume_force=true to go on all the same"
        )


def differences(config_path: Path, conf: Conf) -> list[Change]:
    """Settings in which `conf` differs from a run's `config.yaml`; a setting that is younger than it has its default.

    Raises:
        RefusedError: The file is damaged.
    """
    try:
        before = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RefusedError(f"{config_path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(before, dict):
        raise RefusedError(f"{config_path} is damaged: it holds no settings")
    own = {**flat(as_dict(Conf())), **flat(before)}
    now = flat(as_dict(conf))
    keys = [key for key in {**own, **now} if key not in NOT_OF_THE_RUN]
    return [Change(key, own.get(key), now.get(key)) for key in keys if own.get(key) != now.get(key)]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _earlier_result(path: Path) -> Result:
    """What an earlier start left; of a run killed before it could write, no more than that."""
    unknown: Result = {"status": "interrupted", "resumed_at": [], "overrides": []}
    if not path.exists():
        return unknown
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} is damaged: {str(error).splitlines()[0]}; remove it to continue the run") from error
    return {**unknown, **found}
