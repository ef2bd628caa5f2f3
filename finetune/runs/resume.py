"""Going on with a run: what it restores, what it promises, and what it says where something has changed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.app.build import Run as Parts
from finetune.config import CompileMode, Conf, Interval
from finetune.core import recipe
from finetune.core.device import environment
from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.plan import planned_rates
from finetune.core.sched import lr_factor
from finetune.runs.checkpoint import Content, restore, restore_frozen
from finetune.runs.claim import CLOSE, Change, Holding
from finetune.runs.history import History
from finetune.runs.saving import latest_state, settle
from finetune.system.errors import UserError
from finetune.system.tables import table
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")

Saved = tuple[Content, Path]  # a state, and the file that it was read from

# Strongest first. bitwise: equal to an unbroken run to the last bit. close: equal but for rounding. none: another run.
PROMISES = ("bitwise", "close", "none")


@dataclasses.dataclass
class Promise:
    """What a run, stopped and continued, has in common with one that was never stopped.

    Attributes:
        kind: One of PROMISES.
        reasons: Why it is not bitwise.
    """

    kind: str = "bitwise"
    reasons: list[str] = dataclasses.field(default_factory=list)

    def weaken(self, kind: str, reason: str) -> None:
        """Promise `kind` at most, and say why, once."""
        self.kind = max(self.kind, kind, key=PROMISES.index)
        if reason not in self.reasons:
            self.reasons.append(reason)

    def __str__(self) -> str:
        """The promise in words, and why it is no stronger."""
        meaning = {
            "bitwise": "bitwise: stopped and continued on this machine, the run ends equal to an unbroken one to the"
            " last bit",
            "close": "close, not bitwise: stopped and continued, the run is equal to an unbroken one but for rounding",
            "none": "none: what comes out is neither the run as it was begun nor one with the new settings",
        }[self.kind]
        return meaning + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def first_promise(conf: Conf, device: torch.device, holding: Holding) -> Promise:
    """What holds for a run on `device`, given what was weakened in earlier sessions and by changed settings."""
    promise = Promise()
    if holding.earlier is not None:
        for reason in holding.earlier.get("promise_reasons", []):
            promise.weaken(str(holding.earlier["promise"]), str(reason))
    if device.type == "cuda" and not conf.deterministic:
        promise.weaken("close", "CUDA kernels add up in any order; deterministic=true makes it bitwise")
    if device.type == "mps":
        promise.weaken("close", "Apple's kernels do not promise equal bits")
    if conf.train.compile != CompileMode.none:
        promise.weaken(
            "close", "compiled kernels may be chosen by how fast they ran; train.compile=none makes it bitwise"
        )
    for change in holding.changes:
        if change.key in CLOSE:
            promise.weaken("close", str(change))
        elif not change.is_allowed:
            promise.weaken("none", f"forced {change}")
    return promise


def notes_of(parts: Parts) -> dict[str, str]:
    """What travels with a state, and is compared when it is loaded."""
    return {**environment(parts.device), "images": parts.fingerprint()}


def say_changes(changes: list[Change]) -> None:
    """The settings that differ from the run's own, as a diff."""
    for change in changes:
        allowed = "" if change.is_allowed else "   (forced)"
        logger.info("  - %s: %s", printable(change.key), printable(str(change.before)))
        logger.info("  + %s: %s%s", printable(change.key), printable(str(change.now)), allowed)


def find_state(parts: Parts, holding: Holding, promise: Promise, *, steps_per_epoch: int) -> Saved | None:
    """The newest checkpoint that loads, its frozen layers already in the run's model; None where there is none.

    Call it once the model is frozen, and before anything runs the frozen layers or keeps what they give.

    Args:
        parts: The run's.
        holding: What the folder held.
        promise: Weakened where machine or versions differ, or where more epochs make another rate curve.
        steps_per_epoch: Optimizer steps an epoch.

    Raises:
        ValueError: No checkpoint loads, the images are others, or see `checkpoint.restore_frozen`.
    """
    found = latest_state(parts.checkpoints)
    if found is not None:
        _compare(found[0]["notes"], notes_of(parts), parts.conf, promise)
        restore_frozen(found[0], parts.model, found[1])
        units = max(int(found[0]["scheduler"]["last_epoch"]), 0)
        for change in holding.changes:
            if change.key == "train.epochs":
                _say_grown(parts.conf, change, units, promise, steps_per_epoch)
    return found


def resume(parts: Parts, state: TrainState, found: Saved | None) -> bool:
    """Continue from the checkpoint that was found, with the history cut back to it; False where there is none.

    Args:
        parts: The run's.
        state: Before its first step; changed in place.
        found: By `find_state`.

    Raises:
        ValueError: It is of another model.
    """
    if found is not None:
        content, path = found
        restore(content, state, str(path))
    settle(parts.checkpoints, state)
    History(parts.folder / "history.jsonl").cut(state.epoch)
    if found is None:
        return False
    logger.info("resumed at step %d (epoch %d, batch %d)", state.step, state.epoch + 1, state.batch)
    return True


def _compare(before: Mapping[str, str], now: Mapping[str, str], conf: Conf, promise: Promise) -> None:
    if before["images"] != now["images"] and not conf.resume_force:
        raise UserError(
            f"the training images are not those that the run began with ({before['images']} -> {now['images']}: number,"
            " names or labels differ); put them back, start a new run, or add resume_force=true"
        )
    for name in before:
        if before[name] != now[name]:
            kind = "none" if name == "images" else "close"
            promise.weaken(kind, f"{name}: {before[name]} -> {now[name]}")


def _say_grown(conf: Conf, change: Change, units: int, promise: Promise, steps_per_epoch: int) -> None:
    """The new rate curve beside the old one, from `units` of the scheduler on."""
    per_epoch = steps_per_epoch if conf.sched.interval == Interval.step else 1
    old, new = change.before * per_epoch, conf.train.epochs * per_epoch
    sched = recipe.timed_sched(conf.sched, steps_per_epoch)
    factors = [(t, lr_factor(t, sched, old), lr_factor(t, sched, new)) for t in range(new)]
    if all(before == after for t, before, after in factors if t <= units):
        logger.info("train.epochs: %s -> %s; the rate curve up to here is the same", change.before, change.now)
        return
    promise.weaken(
        "none",
        f"train.epochs {change.before} -> {change.now} draws another rate curve; the epochs so far had an earlier one",
    )
    shown = sorted({0, *range(units, new, max(1, (new - units) // 6)), new - 1})
    rows: list[dict[str, object]] = [
        {
            "epoch": t // per_epoch + 1,
            "old factor": factors[t][1] if t < old else None,
            "new factor": factors[t][2],
            "": "<- now" if t == units else "",
        }
        for t in shown
    ]
    logger.info("the rate's factor, as it was planned and as it is from here on (lr.png shows both):")
    logger.info("%s", table(rows, columns=list(rows[0])))


def plan_of(model: LayeredModel, conf: Conf, steps_per_epoch: int, holding: Holding, path: Path) -> dict[str, Any]:
    """`rates.json`: every layer's planned rate; where the run has grown, with the curve of before under `before`."""
    plan = planned_rates(model, conf, steps_per_epoch)
    for change in holding.changes:
        if change.key == "train.epochs":
            train = dataclasses.replace(conf.train, epochs=change.before)
            old = planned_rates(model, dataclasses.replace(conf, train=train), steps_per_epoch)
            plan["before"] = {"epochs": change.before, "x": old["x"], "layers": old["layers"]}
            return plan
    if holding.earlier is not None and path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return plan
        if isinstance(earlier, dict) and "before" in earlier:
            plan["before"] = earlier["before"]
    return plan
