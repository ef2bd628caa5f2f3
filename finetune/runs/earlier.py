"""The run that a folder already holds, and whether a configuration may continue it. Reads files only; needs no torch.

A run goes on with its own settings. Some may change: those that only say how the work is done, and the number of
epochs, which may grow. Any other change makes another run, so it needs `resume_force=true`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config import Conf, as_dict
from finetune.config.words.saved import base_of
from finetune.runs.records import Result, read_result
from finetune.system.errors import ConfigError, UserError
from finetune.system.reading import DamagedError

# A folder with one of these holds a run.
OWN_FILES = (
    *("config.yaml", "history.jsonl", "result.json", "rates.json", "run.log", "checkpoints", "bad_batch"),
    *("metrics.json", "confusion.csv", "confusion_val.csv", "confusion.png", "lr.png", "curves.png", "skipped.txt"),
)
NOT_OF_THE_RUN = ("resume", "resume_force")  # say how a run is continued
# May change: the weights stay the same to the last bit.
FREE = (
    *("train.save_every_steps", "train.save_every_minutes", "train.max_save_share", "train.keep", "train.patience"),
    *("train.on_nonfinite", "train.max_nonfinite", "prefix.cache", "prefix.max_gib"),
    *("data.workers", "data.cache", "data.cache_dir", "data.cache_gib", "data.check_budget_s", "data.download"),
    "data.on_error",  # the first start has settled which images the run learns from
)
# May change: the same arithmetic by other kernels, so the weights differ by rounding.
ROUNDING = ("device", "deterministic", "train.class_token_only", "train.compile")


class RefusedError(UserError):
    """This configuration may not run in the folder. Nothing there was changed, nor is the failure recorded there."""


@dataclass(frozen=True)
class Change:
    """A setting that differs between the run's `config.yaml` (`before`) and this start (`now`)."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """`key: before -> now`."""
        return f"{self.key}: {self.before} -> {self.now}"

    @property
    def is_allowed(self) -> bool:
        """Whether it needs no `resume_force`."""
        return bool(self.now > self.before) if self.key == "train.epochs" else self.key in (*FREE, *ROUNDING)


@dataclass(frozen=True)
class EarlierRun:
    """What a folder holds of a run, and how this start differs from it."""

    result: Result | None = None  # the content of its result.json; None in a fresh folder
    changes: list[Change] = field(default_factory=list)  # all of them allowed or forced

    @property
    def epochs_before(self) -> int | None:
        """`train.epochs` of the run so far, where this start changes the number."""
        return next((int(change.before) for change in self.changes if change.key == "train.epochs"), None)

    @property
    def is_forced(self) -> bool:
        """Whether a setting has changed that only `resume_force` lets change."""
        return not all(change.is_allowed for change in self.changes)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        is_done = self.result is not None and self.result["status"] == "finished"
        return is_done and self.epochs_before is None and not self.is_forced


def find_earlier(run_dir: Path, settings: Mapping[str, Any], *, is_resume: bool, force: bool) -> EarlierRun:
    """What the folder `run_dir` holds of a run, before anything is written there.

    `settings` are those of this start, nested by section. If `is_resume` (`resume=` names the folder) some of them may
    differ from the run's, and with `force` (`resume_force`) any.

    Raises:
        RefusedError: The folder holds another run, files that a run would overwrite, or a damaged run.
    """
    config_path = run_dir / "config.yaml"
    found = [name for name in OWN_FILES if (run_dir / name).exists()]
    if not config_path.exists():
        if found:
            names = ", ".join(found)
            raise RefusedError(f"{run_dir} has {names} but no config.yaml, so it is no run: choose another folder")
        if is_resume:
            raise RefusedError(f"resume={run_dir}: nothing is there to continue: leave resume out to start a run")
        return EarlierRun()
    changes = _differences(_read_settings(run_dir), flat(settings))
    if changes and not is_resume:
        raise RefusedError(
            f"{run_dir} holds a run of another configuration ({'; '.join(map(str, changes))}); nothing was changed:"
            " choose another folder, or start with the same settings to continue it"
            f" (resume={run_dir} continues it with its own)"
        )
    refused = [change for change in changes if not change.is_allowed]
    if refused and not force:
        shorter = any(change.key == "train.epochs" for change in refused)
        why = "fewer epochs than planned, and so another rate curve" if shorter else "that would be another run"
        raise RefusedError(
            f"resume={run_dir}: {'; '.join(map(str, refused))}: {why}. Nothing was changed: leave it out, start a new"
            " run, or add resume_force=true to go on all the same"
        )
    return EarlierRun(_read_result(run_dir / "result.json"), changes)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The settings that differ. A setting that `before` lacks, since it is younger than the run, has its default."""
    own = {**flat(as_dict(Conf())), **before}
    keys = [key for key in {**own, **now} if key not in NOT_OF_THE_RUN]
    return [Change(key, own.get(key), now.get(key)) for key in keys if own.get(key) != now.get(key)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _read_settings(run_dir: Path) -> dict[str, Any]:
    """The settings in the folder's `config.yaml`, by dotted key."""
    try:
        return flat(as_dict(base_of(run_dir)))
    except ConfigError as error:
        raise RefusedError(f"{error.problems[0]}; nothing was changed") from error


def _read_result(path: Path) -> Result:
    """The content of `result.json`; a run that was killed before it wrote the file counts as interrupted."""
    unknown: Result = {"status": "interrupted", "resumed_at": [], "overrides": []}
    try:
        return {**unknown, **read_result(path)}
    except FileNotFoundError:
        return unknown
    except DamagedError as error:
        raise RefusedError(str(error)) from error
