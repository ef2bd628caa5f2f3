"""Continue a run: find its newest checkpoint, restore it, and say how equal the result is to an unbroken run."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.sched import Curve
from finetune.runs.checkpoint import Content, restore
from finetune.runs.earlier import ROUNDING, Change, EarlierRun, as_text
from finetune.runs.epoch_files import settle
from finetune.runs.history import History
from finetune.runs.records import Number, PromiseKind
from finetune.runs.weights import restore_frozen
from finetune.system.errors import UserError
from finetune.system.reading import DamagedError, UnfitError, parse_json

logger = logging.getLogger("finetune")

Saved = tuple[Content, Path]  # a state, and the file that holds it
# Names of the notes that a checkpoint carries.
SETTINGS, PROMISE, BEFORE, EPOCHS_BEFORE = "settings", "promise", "scores before training", "epochs before"
MAX_EPOCHS = 10_000_000  # a checkpoint that says more is damaged
# Notes without which a run would be another one -> what is wrong where they differ.
DIFFERENT = {
    "images": "the training images are not those that the run began with (or of val, or test)",
    "content": "the images are not those that the run began with, by their sizes or bytes",
    "batch": "result.json (auto_batch_size) says another number of images a step than the run has learned with",
    "pretrained": "model.pretrained is not the file that the run began with",
    "class_names": "model.class_names is not the file that the run began with",
}

# Strongest first.
PROMISES = {
    "bitwise": "bitwise: stopped and continued on this machine, the run ends equal to an unbroken one to the last bit",
    "close": "close, not bitwise: stopped and continued, the run is equal to an unbroken one but for rounding",
    "none": "none: the result is neither that of the run as it was begun nor that of the new settings",
}


@dataclasses.dataclass
class Promise:
    """How equal a run that is stopped and continued is to one that was never stopped."""

    kind: PromiseKind = "bitwise"  # a key of PROMISES
    reasons: list[str] = dataclasses.field(default_factory=list)  # why it is not bitwise

    def weaken(self, kind: PromiseKind, reason: str) -> None:
        """Promise `kind` at most, and note why, once."""
        self.kind = max(self.kind, kind, key=list(PROMISES).index)
        if reason not in self.reasons:
            self.reasons.append(reason)

    def carry(self, kind: PromiseKind, reasons: Sequence[str]) -> None:
        """Promise no more than an earlier start did."""
        for reason in reasons:
            self.weaken(kind, reason)

    def __str__(self) -> str:
        """The promise in words, with its reasons."""
        return PROMISES[self.kind] + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def first_promise(earlier: EarlierRun, device: torch.device, *, deterministic: bool, is_compiled: bool) -> Promise:
    """The promise of a run on `device`, from its settings and its earlier starts; `compare_state` may weaken it."""
    promise = Promise()
    result = earlier.result or {}
    promise.carry(result.get("promise", "none"), result.get("promise_reasons", []))
    if device.type == "cuda" and not deterministic:
        promise.weaken("close", "CUDA kernels add up in any order; deterministic=true makes it bitwise")
    if device.type == "mps":
        promise.weaken("close", "Apple's kernels do not promise equal bits")
    if is_compiled:
        promise.weaken("close", "compiled kernels are chosen by how fast they ran; train.compile=none makes it bitwise")
    for change in earlier.changes:
        if change.key in ROUNDING:
            promise.weaken("close", str(change))
        elif not change.is_allowed:
            promise.weaken("none", f"forced {change}")
    return promise


def notes_of(
    first: Mapping[str, str], settings: Mapping[str, Any], promise: Promise, epochs_before: int | None
) -> dict[str, str]:
    """The notes that every checkpoint of a start carries: machine, versions and images; its settings and promise."""
    notes = {**first, SETTINGS: as_text(settings), PROMISE: json.dumps(dataclasses.asdict(promise))}
    return notes if epochs_before is None else {**notes, EPOCHS_BEFORE: str(epochs_before)}


def scores_before(found: Saved) -> dict[str, float | None]:
    """The scores of the model before its first step, by their names in `result.json`, that a checkpoint carries.

    Raises:
        DamagedError: They are no scores, or they are missing.
    """
    content, path = found
    try:
        return parse_json(content["notes"].get(BEFORE, "").encode(), dict[str, Number])
    except UnfitError as error:
        raise DamagedError.because(path, f"its {BEFORE}: {error}") from None


def compare_state(
    found: Saved,
    model: LayeredModel,
    notes: Mapping[str, str],
    promise: Promise,
    changes: Sequence[Change],
    *,
    force: bool,
) -> None:
    """Compare a checkpoint with this start, and restore the frozen layers of `model`.

    Call it after the model is frozen, and before anything runs the frozen layers. The promise is weakened to the one
    that the checkpoint carries, and if it was saved with other `notes` (machine, versions, images, batch).

    Raises:
        UserError: One of DIFFERENT without `force`, or see `restore_frozen`. The content of images counts only if they
            lie elsewhere now, by the `changes` of settings: one that was damaged on its place is left out by the run.
    """
    content, path = found
    changed = {name: before for name, before in content["notes"].items() if name in notes and before != notes[name]}
    moved = [str(change) for change in changes if change.is_place]
    for name, before in changed.items():
        if name in DIFFERENT and not force and (name != "content" or moved):
            where = f" ({'; '.join(moved)})" if moved else ""
            raise UserError(
                f"{DIFFERENT[name]}{where}: {before} -> {notes[name]}; put back what was there, start a new run, or add"
                " resume_force=true"
            )
        promise.weaken("none" if name in DIFFERENT else "close", f"{name}: {before} -> {notes[name]}")
    if PROMISE in content["notes"]:
        saved = parse_json(content["notes"][PROMISE].encode(), Promise)
        promise.carry(saved.kind, saved.reasons)
    restore_frozen(model, content["frozen"], path)


def restore_run(run_dir: Path, state: TrainState, found: Saved | None) -> dict[str, str]:
    """Bring `state`, the history and the weights files back to the checkpoint `found`; None: to the beginning.

    Returns the checksums of the weights files that belong to the checkpoint, by their names.

    Raises:
        UserError: The checkpoint is of another model, or weights beside it are of another run.
    """
    if found is not None:
        restore(found[0], state, str(found[1]))
        logger.info("resumed at step %d (epoch %d, batch %d)", state.step, state.epoch + 1, state.batch)
    history = History(run_dir / "history.jsonl")
    rows = history.readable_rows()
    written: dict[str, str] = {} if found is None else found[0]["weights"]
    settle(run_dir / "checkpoints", state, len(rows), written)
    history.restore("" if found is None else found[0]["history"], rows)
    return written


def compare_curves(before: Curve, now: Curve, promise: Promise, position: int) -> None:
    """Log how another number of epochs changes the rate curve; the promise is `none` if the past would be another.

    `position` is the scheduler's unit at which the run continues.
    """
    epochs, old, new = f"train.epochs {before.epochs} -> {now.epochs}", before.factors(), now.factors()
    if all(one == other for one, other in zip(old[: position + 1], new, strict=False)):
        logger.info("%s: the rate curve up to here is the same", epochs)
        return
    promise.weaken("none", f"{epochs} draws another rate curve; the epochs so far had an earlier one")
    factors = []
    for unit in range(position, len(new), max(1, (len(new) - position) // 5)):
        planned = f" (was to be {old[unit]:.3g})" if unit < len(old) else ""
        factors.append(f"epoch {unit // now.units_per_epoch + 1}: {new[unit]:.3g}{planned}")
    logger.info("the rate's factor from here on, lr.png shows both curves: %s", ", ".join(factors))


def epochs_before(found: Saved) -> int | None:
    """The `train.epochs` from before the latest change of it, which a checkpoint carries; None: it was never changed.

    Raises:
        DamagedError: It is no number of epochs.
    """
    content, path = found
    if EPOCHS_BEFORE not in content["notes"]:
        return None
    try:
        epochs = parse_json(content["notes"][EPOCHS_BEFORE].encode(), int)
        if not 1 <= epochs <= MAX_EPOCHS:
            raise UnfitError(f"expected a number from 1 to {MAX_EPOCHS:,}")
        return epochs
    except UnfitError as error:
        raise DamagedError.because(path, f"its {EPOCHS_BEFORE}: {error}") from None
