"""One start of a run: what the user asked for, what the folder held before, and the record that the start leaves."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.app.build import Run
from finetune.config import Conf, recorded
from finetune.core.finite import NotFiniteError
from finetune.report.columns import headlines
from finetune.report.reading import number
from finetune.runs.earlier import Change, EarlierRun, digest_of
from finetune.runs.finished import CHECKSUMS, checksums
from finetune.runs.records import Result
from finetune.runs.resume import SETTINGS, Saved
from finetune.system.files import write_json, write_text
from finetune.system.ours import RefusedError
from finetune.system.signals import Interrupted
from finetune.system.terminal import counted, printable, without_secrets

logger = logging.getLogger("finetune")

# Files of a finished run, as far as it wrote them, and what they show.
FILES = {
    ("lr.png",): "every layer's rate, planned and used",
    ("curves.png",): "the learning curves",
    ("metrics.json",): "every class: how well",
    ("confusion.png", "confusion_val.csv"): "every class: what it was taken for",
    ("checkpoints/best.safetensors",): "the best epoch's weights, with classes and preprocessing inside",
}


@dataclass
class Session:
    """One start of a run. A start that is refused before `accept` leaves the files of an earlier start as they were."""

    conf: Conf  # the settings that the user asked for
    run_dir: Path
    overrides: list[str]  # the words of the command line
    earlier: EarlierRun  # what the folder held before
    result: Result = field(default_factory=dict)  # the content of `result.json`, filled step by step
    is_accepted: bool = False  # whether `accept` was called
    has_chosen: bool = False  # whether this start has chosen settings that were open
    is_refused: bool = False  # whether this start may not continue the run; then no file is written

    def __post_init__(self) -> None:
        """Begin the result."""
        before: Result = self.earlier.result or self.earlier.given_up or {"overrides": [], "resumed_at": []}
        overrides = self.overrides
        if self.conf.resume is not None:  # the first start's words stay where no word beside `resume=` changes them
            changed = {word.partition("=")[0] for word in overrides}
            overrides = [word for word in before["overrides"] if word.partition("=")[0] not in changed] + overrides
        self.result |= {"status": "running", "error": None, "overrides": overrides, "seed": self.conf.seed}
        self.result["resumed_at"] = list(before["resumed_at"])
        self.result["settings"] = digest_of(recorded(self.conf))

    def choose(self, conf: Conf) -> None:
        """Take `conf`, in which the run has chosen what was open; a run that was begun already has chosen before."""
        if conf == self.conf:
            return
        self.conf, self.has_chosen = conf, True
        self.result["settings"] = digest_of(recorded(conf))
        if self.is_accepted:
            self._write_config()

    def _write_config(self) -> None:
        own = dataclasses.replace(self.conf, resume=None, resume_force=False)
        config = yaml.safe_dump(recorded(own), sort_keys=False, allow_unicode=True)
        write_text(self.run_dir / "config.yaml", config)

    def announce(self) -> None:
        """Log what the folder holds of an earlier start."""
        if self.earlier.given_up is not None:
            logger.info("the start before this one in %s saved no step: the run begins anew", self.run_dir)
        if self.earlier.result is None:
            return
        logger.info("continuing the run in %s, so far %s", self.run_dir, self.earlier.result["status"])
        if self.earlier.changes:
            logger.info("changed beside resume=%s:", self.run_dir)
            _log_changes(self.earlier.changes)

    def agree(self, found: Saved | None) -> EarlierRun:
        """What the folder held, with the changes since the checkpoint `found`; logs those that are not announced yet.

        Raises:
            RefusedError: Some need `resume_force`; or the run has finished, and its state is gone.
        """
        if found is None:
            if self.earlier.result is not None and self.earlier.result["status"] == "finished":
                self.is_refused = True
                raise RefusedError(
                    f"{self.run_dir / 'checkpoints'} has no last.pt any more, so this finished run cannot go on;"
                    " nothing was changed: put the file back, or start a new run in another folder"
                )
            return self.earlier
        force, text = self.conf.resume_force, found[0]["notes"].get(SETTINGS, "{}")
        try:
            earlier = self.earlier.since_state(text, recorded(self.conf), force=force)
        except RefusedError:
            self.is_refused = True
            raise
        if new := [change for change in earlier.changes if change not in self.earlier.changes]:
            logger.warning("changed in config.yaml since the checkpoint was made:")
            _log_changes(new)
        return earlier

    def accept(self, carried_over: Result | None = None, plan: dict[str, Any] | None = None) -> None:
        """Write this start into the folder: from here on nothing can refuse it.

        A run that is continued brings the entries `carried_over` of its earlier result, and a new `plan` of rates.
        """
        self.is_accepted = True
        if self.earlier.result is None:
            self._write_config()  # first, since a folder without it is no run
            self.write_result()
            return
        # In this order: a kill in between may lose a promise, but leaves none that the new settings break.
        self.result |= {**(carried_over or {}), **self.result}
        self.write_result()
        write_json(self.run_dir / "rates.json", plan)
        if self.earlier.changes or self.has_chosen:
            self._write_config()

    def write_result(self) -> None:
        """Write `result.json` as far as it is known."""
        write_json(self.run_dir / "result.json", self.result)

    def write_end(self) -> None:
        """Write the last `result.json`; an earlier run that could not be continued gets the new status and error only.

        One that has finished stays so: its weights and scores are what they were.

        Raises:
            OSError: The disk is full and the run has finished. After another error it is logged: it must not hide that.
        """
        if not self.is_accepted:
            before = self.earlier.result or {}
            if self.earlier.changes or self.is_refused or before.get("status") == "finished":
                return
            self.result = {**before, **{name: self.result[name] for name in ("status", "error")}}
        try:
            if self.is_accepted:
                self.result[CHECKSUMS] = checksums(self.run_dir, self.result)
            self.write_result()
        except OSError as error:
            if self.result["status"] == "finished":
                raise
            if self.run_dir.is_dir():  # else the first error says it
                logger.error("result.json could not be written: %s", error)


def _log_changes(changes: Sequence[Change]) -> None:
    for change in changes:
        key, before, now = map(printable, (change.key, *change.words))
        logger.info("  - %s: %s", key, before)
        logger.info("  + %s: %s%s", key, now, "" if change.is_allowed else "   (forced)")


def carried_over(run: Run, earlier: EarlierRun, *, is_found: bool) -> Result:
    """The entries of the earlier start's result that stay true for this one.

    Test scores are not among them: they are of other weights. Without a checkpoint, that is if not `is_found`, training
    begins anew, and its scores go too.
    """
    names = ("promise", *(["auto_"] if run.is_auto_batch else []))
    if is_found:
        names += ("val/", "epochs", "best_", "seconds", "zeroshot/", "probe/")
    return {name: value for name, value in (earlier.result or {}).items() if name.startswith(names)}


def outcome(error: BaseException) -> tuple[str, str]:
    """(status, error) for `result.json` of a run that ended early."""
    if isinstance(error, NotFiniteError):
        return "diverged", str(error)
    if isinstance(error, Interrupted):
        return "interrupted", f"stopped by {error.signal_name}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by Ctrl-C"
    return "failed", without_secrets(str(error)) or type(error).__name__


def log_summary(run_dir: Path, result: Result) -> None:
    """Log what a run has reached: its scores and its files."""
    splits = [split for split in ("val", "test") if result["data"][split]]
    names = headlines(result["monitor"])
    zeroshot = {"val": "zeroshot/", "test": "test/zeroshot/"}
    if any(f"{zeroshot[split]}{name}" in result for split in splits for name in names):
        shown = "   ".join(_scores(result, split, zeroshot[split], names) for split in splits)
        logger.info("zero-shot   %s", shown)
    epochs, best, seconds = (result.get(name, math.nan) for name in ("epochs", "best_epoch", "seconds"))
    which = (
        f"best of {counted(epochs, 'epoch')}: {best}" if "val" in splits else f"the last of {counted(epochs, 'epoch')}"
    )
    which += ", averaged weights" if result.get("best_weights") == "ema" else ""
    scores = [*(f"{_scores(result, split, f'{split}/', names)}   " for split in splits), f"({which}; {seconds:.1f} s)"]
    logger.info("fine-tuned  %s", "".join(scores))
    for line in _about_splits(splits):
        logger.info("%s", line)
    logger.info("run directory: %s", run_dir)
    for files, text in FILES.items():
        if there := [name for name in files if (run_dir / name).exists()]:
            logger.info("  %-32s %s", " ".join(there), text)


def _scores(result: Result, split: str, prefix: str, names: Sequence[str]) -> str:
    """`val/map 0.6120  val/top1 0.7000`; NaN where there is none, as where the monitor was NaN in every epoch."""
    values = [number(result.get(f"{prefix}{name}")) for name in names]
    return "  ".join(f"{split}/{name} {value:.4f}" for name, value in zip(names, values, strict=True))


def _about_splits(splits: Sequence[str]) -> list[str]:
    """What the scores of a run are worth that has only the images of `splits` beside its training images."""
    if splits == ["val"]:
        how = "a test/ beside the val/ of your data; where val is cut from train, data.test_fraction=0.1"
        return [f"no test images: the epoch was picked by this score, so it is a little high. To have a test: {how}"]
    if "val" in splits:
        return []
    kept = "no validation images: no score picked an epoch, and the weights of the last one are kept"
    return [kept] if splits else [f"{kept}; no test images either, so nothing is scored"]
