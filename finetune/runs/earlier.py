"""The run that a folder already holds, and whether a configuration may continue it. Reads files only; needs no torch.

A run goes on with its own settings. Some may change: those that only say how the work is done, and the number of
epochs, which may grow. Any other change makes another run, so it needs `resume_force=true`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.config import PLACES, Conf, as_dict
from finetune.config.words.saved import recorded_in
from finetune.config.words.settings import as_word
from finetune.runs.records import Result, read_result
from finetune.system.errors import ConfigError, UserError
from finetune.system.ours import LOCK, LOCK_HOLDER, FolderKind, RefusedError, look, own_files
from finetune.system.reading import DamagedError, parse_json

NOT_OF_THE_RUN = ("resume", "resume_force", "data.allow_pipe", "chosen")  # say how a run is continued, or came about
# May change: the weights stay the same to the last bit.
FREE = (
    *("train.save_every_steps", "train.save_every_minutes", "train.max_save_share", "train.keep", "train.patience"),
    *("train.on_nonfinite", "train.max_nonfinite", "prefix.cache", "prefix.max_gib"),
    *(
        "data.workers",
        "data.cache",
        "data.cache_dir",
        "data.cache_gib",
        "data.check_budget_s",
        "data.download",
        "data.max_image_mib",
    ),
    "data.max_text_mib",
    "data.on_error",  # the first start has settled which images the run learns from
)
# May change: the same arithmetic by other kernels, so the weights differ by rounding.
ROUNDING = ("device", "deterministic", "train.class_token_only", "train.compile")

UNKNOWN: Result = {"status": "interrupted", "resumed_at": [], "overrides": []}  # of a run without one
SAVED = "checkpoints"


@dataclass(frozen=True)
class Change:
    """A setting of this start (`now`) that differs from the run's, in `config.yaml` or in its state (`before`)."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """`key: before -> now`."""
        before, now = self.words
        return f"{self.key}: {_short(before)} -> {_short(now)}"

    @property
    def words(self) -> tuple[str, str]:
        """Both values as a person writes them."""
        return str(as_word(self.key, self.before)), str(as_word(self.key, self.now))

    @property
    def is_allowed(self) -> bool:
        """Whether it needs no `resume_force`."""
        if self.key == "train.epochs":
            return bool(self.now > self.before)
        return self.key in (*FREE, *ROUNDING) or self.is_place

    @property
    def is_place(self) -> bool:
        """Whether the same data or weights may lie elsewhere now; their fingerprints will tell."""
        return self.key in PLACES and _is_path(self.key, self.before) and _is_path(self.key, self.now)


@dataclass(frozen=True)
class EarlierRun:
    """What a folder holds of a run, and how this start differs from it."""

    result: Result | None = None  # the content of its result.json; None where this start is the first
    changes: list[Change] = field(default_factory=list)  # all of them allowed or forced
    digest: str = ""  # `digest_of` the settings of this start
    # The same of a start that saved no step and had other settings, so that this one begins anew; its files go.
    given_up: Result | None = None

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
        if self.result is None or self.result["status"] != "finished":
            return False
        # With another digest somebody has edited `config.yaml`; the state will show what. It will also show whether the
        # same images and weights lie in a place that this start names.
        is_edited = self.result.get("settings", self.digest) != self.digest
        is_moved = any(change.is_place and change.key not in FREE for change in self.changes)
        return self.epochs_before is None and not self.is_forced and not is_edited and not is_moved

    def since_state(self, text: str, settings: Mapping[str, Any], *, force: bool) -> "EarlierRun":
        """The same with the changes since a state that carries the settings `text`, see `as_text`.

        `config.yaml` was edited or damaged after that state was saved, or this start or one before it changed settings.

        Raises:
            RefusedError: A change needs `force`, and was not forced in an earlier start.
        """
        changes = _differences(parse_json(text.encode(), dict), flat(settings))
        refused = [change for change in changes if not change.is_allowed]
        result = self.result or {}  # of a start that forced a change, it has its digest and promises nothing
        was_forced = result.get("settings") == self.digest and result.get("promise") == "none"
        if refused and not force and not was_forced:
            raise RefusedError(
                f"the settings are not those that the checkpoint was made with: {'; '.join(map(str, refused))}:"
                f" {_why(refused)}. Nothing was changed: put config.yaml back, start a new run, or add"
                " resume_force=true to go on all the same"
            )
        return replace(self, changes=changes)


def find_earlier(run_dir: Path, settings: Mapping[str, Any], *, is_resume: bool, force: bool) -> EarlierRun:
    """What the folder `run_dir` holds of a run, before anything is written there.

    `settings` are those of this start, nested by section. If `is_resume` (`resume=` names the folder) some of them may
    differ from the run's, and with `force` (`resume_force`) any. Where no step was saved yet, all of them may differ.

    Raises:
        RefusedError: The folder holds another run, files that are not ours, or a damaged run.
    """
    look(run_dir, FolderKind.run)
    config_path, is_saved = run_dir / "config.yaml", has_step(run_dir)
    if not config_path.exists():
        if is_saved:
            raise RefusedError(f"{run_dir} has no config.yaml any more, so it cannot go on: choose another folder")
        if is_resume:
            raise RefusedError(f"resume={run_dir}: nothing is there to continue: leave resume out to start a run")
        return EarlierRun(given_up=dict(UNKNOWN) if _given_up(run_dir) else None)
    try:
        changes = _differences(_read_settings(run_dir), flat(settings))
        result = _read_result(run_dir / "result.json")
    except UserError:
        if is_saved or is_resume:
            raise
        return EarlierRun(given_up=dict(UNKNOWN))
    if changes and not is_saved:
        return EarlierRun(given_up=result)
    if not is_resume and not all(change.is_place for change in changes):
        raise RefusedError(
            f"{run_dir} holds a run of another configuration ({'; '.join(map(str, changes))}); nothing was changed:"
            " choose another folder, or start with the same settings to continue it"
            f" (resume={run_dir} continues it with its own)"
        )
    refused = [change for change in changes if not change.is_allowed]
    if refused and not force:
        raise RefusedError(
            f"resume={run_dir}: {'; '.join(map(str, refused))}: {_why(refused)}. Nothing was changed: leave it out,"
            " start a new run, or add resume_force=true to go on all the same"
        )
    return EarlierRun(result, changes, digest_of(settings))


def chosen_before(run_dir: Path) -> dict[str, Any]:
    """The settings that the run in the folder has chosen, by dotted key; none where no run can be read there."""
    try:
        settings = flat(recorded_in(run_dir))
    except ConfigError:
        return {}  # `find_earlier` says what is wrong
    return {name: settings[name] for name in settings.get("chosen", [])}


def has_step(run_dir: Path) -> bool:
    """Whether a run in the folder has saved a checkpoint or finished an epoch; until then it may be begun anew."""
    history = run_dir / "history.jsonl"
    is_saved = any(path.parent.name == SAVED for path in own_files(run_dir, FolderKind.run))
    return is_saved or (history.exists() and history.stat().st_size > 0)


def remove_given_up(run_dir: Path) -> None:
    """Remove our files of a start that saved no step, so that another run begins here; its `run.log` goes on."""
    for path in _given_up(run_dir):
        if path.name != "run.log":
            path.unlink()


def _given_up(run_dir: Path) -> list[Path]:
    return [path for path in own_files(run_dir, FolderKind.run) if path.name not in (LOCK, LOCK_HOLDER)]


def _why(refused: Sequence[Change]) -> str:
    shorter = any(change.key == "train.epochs" for change in refused)
    return "fewer epochs than planned, and so another rate curve" if shorter else "that would be another run"


def _is_path(key: str, value: Any) -> bool:
    """Whether the value of one of the PLACES is no word with a meaning of its own, such as a tag of weights."""
    return not key.startswith("model.") or (isinstance(value, str) and os.path.isabs(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings, nested by section, as a state carries them: JSON by dotted key."""
    return json.dumps({key: value for key, value in flat(settings).items() if key not in NOT_OF_THE_RUN})


def digest_of(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change with each setting that needs `resume_force`, and with `train.epochs`.

    Settings at their defaults do not count, so that a later version of the program with more of them finds the same.
    """
    defaults = flat(as_dict(Conf()))
    skipped = (*NOT_OF_THE_RUN, *FREE, *ROUNDING)
    own = {
        key: value
        for key, value in flat(settings).items()
        if key not in skipped and value != defaults.get(key) and not (key in PLACES and _is_path(key, value))
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()[:16]


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
        return flat(recorded_in(run_dir))
    except ConfigError as error:
        raise RefusedError(f"{error.problems[0]}; nothing was changed") from error


def _read_result(path: Path) -> Result:
    """The content of `result.json`; a run that was killed before it wrote the file counts as interrupted."""
    try:
        return {**UNKNOWN, **read_result(path)}
    except FileNotFoundError:
        return dict(UNKNOWN)
    except DamagedError as error:
        raise RefusedError(str(error)) from error
