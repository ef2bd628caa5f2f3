"""Continue a run: find its newest checkpoint, restore it, and say how equal the result is to an unbroken run."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.sched import Curve
from finetune.runs.checkpoint import Content, restore
from finetune.runs.earlier import ROUNDING, EarlierRun
from finetune.runs.epoch_files import latest_state, settle
from finetune.runs.history import History
from finetune.runs.records import read_rates
from finetune.runs.weights import restore_frozen
from finetune.system.errors import UserError
from finetune.system.reading import DamagedError

logger = logging.getLogger("finetune")

Saved = tuple[Content, Path]  # a state, and the file that holds it

# Strongest first.
PROMISES = {
    "bitwise": "bitwise: stopped and continued on this machine, the run ends equal to an unbroken one to the last bit",
    "close": "close, not bitwise: stopped and continued, the run is equal to an unbroken one but for rounding",
    "none": "none: the result is neither that of the run as it was begun nor that of the new settings",
}


@dataclasses.dataclass
class Promise:
    """How equal a run that is stopped and continued is to one that was never stopped."""

    kind: str = "bitwise"  # a key of PROMISES
    reasons: list[str] = dataclasses.field(default_factory=list)  # why it is not bitwise

    def weaken(self, kind: str, reason: str) -> None:
        """Promise `kind` at most, and note why, once."""
        self.kind = max(self.kind, kind, key=list(PROMISES).index)
        if reason not in self.reasons:
            self.reasons.append(reason)

    def __str__(self) -> str:
        """The promise in words, with its reasons."""
        return PROMISES[self.kind] + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def first_promise(earlier: EarlierRun, device: torch.device, *, deterministic: bool, is_compiled: bool) -> Promise:
    """The promise of a run on `device`, from its settings and its earlier starts; `find_state` may weaken it."""
    promise = Promise()
    result = earlier.result or {}
    for reason in result.get("promise_reasons", []):
        promise.weaken(str(result["promise"]), str(reason))
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


def find_state(
    checkpoints: Path, model: LayeredModel, notes: Mapping[str, str], promise: Promise, *, force: bool
) -> Saved | None:
    """The newest checkpoint that can be read; None where nothing was saved. Restores the frozen layers of `model`.

    Call it after the model is frozen, and before anything runs the frozen layers. The promise is weakened if the
    checkpoint was saved with other `notes` (machine, versions, training images).

    Raises:
        UserError: No checkpoint can be read, the images differ without `force`, or see `restore_frozen`.
    """
    found = latest_state(checkpoints)
    if found is None:
        return None
    changed = {name: before for name, before in found[0]["notes"].items() if before != notes[name]}
    for name, before in changed.items():
        if name == "images" and not force:
            raise UserError(
                f"the training images are not those that the run began with ({before} -> {notes[name]}: number, names"
                " or labels differ); put them back, start a new run, or add resume_force=true"
            )
        promise.weaken("none" if name == "images" else "close", f"{name}: {before} -> {notes[name]}")
    restore_frozen(model, found[0]["frozen"], found[1])
    return found


def restore_run(run_dir: Path, state: TrainState, found: Saved | None) -> None:
    """Bring `state`, the history and the weights files back to the checkpoint that `find_state` found.

    Raises:
        UserError: The checkpoint is of another model.
    """
    if found is not None:
        restore(found[0], state, str(found[1]))
        logger.info("resumed at step %d (epoch %d, batch %d)", state.step, state.epoch + 1, state.batch)
    rows = History(run_dir / "history.jsonl")
    settle(run_dir / "checkpoints", state, len(rows.rows()))
    rows.cut(state.epoch)


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


def earlier_curve(path: Path) -> dict[str, Any] | None:
    """The curve from before an earlier change of `train.epochs`, which `rates.json` at `path` carries along."""
    try:
        return read_rates(path).get("before")
    except (FileNotFoundError, DamagedError):  # the file is written anew soon, and only a picture shows this curve
        return None
