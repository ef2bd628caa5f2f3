"""Epochs: train, validate, `scheduler.step()`, note the best epoch, stop early. One step is in `loop.py`."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice

import torch

from finetune.config import Interval, TrainConf
from finetune.core.layers import LayeredModel
from finetune.core.loop import Batch, TrainState, train_step
from finetune.core.losses import cross_entropy
from finetune.core.metrics import LabelMeter, Meter, Sums
from finetune.system.errors import UserError

Row = dict[str, object]  # an epoch in the history: name of a number to its value

# On a GPU `FiniteGuard.look` waits for the device, so it is called once in this many steps.
LOOK_EVERY = 50


@dataclass
class Validation:
    """The pass over the validation split that ends an epoch. The meters hold the results of the latest one."""

    batches: Callable[[Meter], Iterable[Batch]]  # from the meter that will score them, to the validation batches
    meter: Meter = field(default_factory=lambda: LabelMeter(cross_entropy))  # scores the weights
    ema_meter: Meter = field(default_factory=lambda: LabelMeter(cross_entropy))  # scores the averaged weights, if any
    monitor: str = "val/top1"  # the metric that picks the best epoch


def fit(
    state: TrainState,
    conf: TrainConf,
    *,
    train_batches: Callable[[int, int], Iterable[Batch]],
    validation: Validation | None,
    on_step_end: Callable[[TrainState], bool],
    on_epoch_end: Callable[[TrainState, Row], None],
) -> bool:
    """Train and validate epoch by epoch, from wherever `state` stands; False where `on_step_end` stopped the run.

    `train_batches(epoch, n)` gives the micro-batches of an epoch (0 is the first) without its first `n`. `on_step_end`
    is called after each optimizer step; True stops the run there. `on_epoch_end` gets the epoch's row of the history,
    after the scheduler has stepped. Without `validation` the latest epoch counts as the best.

    Raises:
        NotFiniteError: See `train_one_epoch`.
        UserError: `validation.monitor` is no metric of this validation.
    """
    # Early stopping: `patience` epochs in a row were no better than the best one; 0 never stops.
    while state.epoch < conf.epochs and not 0 < conf.patience <= state.epoch - state.best_epoch:
        began = time.perf_counter()
        images_before = state.sums.count if state.batch else 0
        finished = train_one_epoch(state, train_batches(state.epoch, state.batch), conf, on_step_end=on_step_end)
        trained_s = time.perf_counter() - began
        if not finished:
            state.seconds += trained_s
            return False
        row: Row = {"epoch": state.epoch + 1}
        row |= {f"train/{name}": value for name, value in state.sums.means().items()}
        row |= {} if validation is None else _scores(state, validation)
        row |= {"lr": state.rates, "images_per_s": (state.sums.count - images_before) / trained_s}
        if state.interval == Interval.epoch:
            state.scheduler.step()
        state.epoch += 1
        state.batch = 0
        if validation is None:  # nothing says when averaged weights are worse, so they count where the run has them
            state.best_epoch, state.best_is_ema = state.epoch, state.ema is not None
        else:
            _note_best(state, row, validation.monitor)
        row["seconds"] = seconds = time.perf_counter() - began
        state.seconds += seconds
        on_epoch_end(state, row)
    return True


def train_one_epoch(
    state: TrainState, batches: Iterable[Batch], conf: TrainConf, *, on_step_end: Callable[[TrainState], bool]
) -> bool:
    """Learn from the rest of the current epoch, which `batches` hold; False where `on_step_end` asked to stop.

    Raises:
        NotFiniteError: More steps were not finite than the guard allows; no weight has changed since.
    """
    state.model.train()
    if state.batch == 0:
        # A run that is resumed within an epoch goes on with the sums and rates of its checkpoint.
        state.sums = Sums(state.device)
        state.rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    look_every = LOOK_EVERY if state.device.type == "cuda" else 1
    micro_batches = iter(batches)
    while window := list(islice(micro_batches, conf.accumulate)):  # the last one may be shorter
        train_step(state, window, conf)
        if state.step % look_every == 0:
            state.guard.look()
        if state.interval == Interval.step:
            state.scheduler.step()
        if on_step_end(state):
            state.guard.look()
            return False
    state.guard.look()
    return True


@torch.inference_mode()
def validate(
    model: LayeredModel,
    batches: Iterable[Batch],
    autocast: AbstractContextManager[object],
    *,
    meter: Meter | None = None,
    start: int = 0,
) -> dict[str, float]:
    """Exact metrics over `batches`, the output of the layers below `start`; leaves the model in eval mode.

    `meter` is reset, then filled; by default it measures loss, top1 and top5. `autocast` must be reusable.
    """
    model.eval()
    meter = meter or LabelMeter(cross_entropy)
    meter.reset()
    for inputs, targets, _ in batches:
        with autocast:
            logits = model(inputs, start=start)
        meter.add(logits, targets)
    return meter.results()


def _scores(state: TrainState, validation: Validation) -> Row:
    """Metrics of the weights as `val/...`, and of their averages, where the run has them, as `val_ema/...`."""

    def scored_by(meter: Meter) -> dict[str, float]:
        return validate(state.model, validation.batches(meter), state.autocast, meter=meter, start=state.first_layer)

    row: Row = {f"val/{name}": value for name, value in scored_by(validation.meter).items()}
    if state.ema is not None:
        with state.ema.swapped_in():
            row |= {f"val_ema/{name}": value for name, value in scored_by(validation.ema_meter).items()}
    return row


def is_better(score: float, best: float, monitor: str, *, loss: float = math.nan, best_loss: float = math.nan) -> bool:
    """Whether `score` beats `best` (NaN: there is none yet). NaN never wins.

    A monitor that ends in `loss` or `ece` is minimised, any other maximised. Of equal scores the one with the lower
    loss is better: on few images many epochs have one score, and it says nothing more about them.
    """
    if math.isnan(score) or math.isnan(best):
        return not math.isnan(score)
    if score == best:
        return not math.isnan(loss) and not loss >= best_loss
    return score < best if monitor.endswith(("loss", "ece")) else score > best


def _note_best(state: TrainState, row: Row, monitor: str) -> None:
    """Update the best score and epoch, if the weights of the epoch just finished or their averages are better."""
    for name in [monitor] if state.ema is None else [monitor, monitor.replace("val/", "val_ema/", 1)]:
        score = row.get(name)
        if not isinstance(score, float):
            names = ", ".join(name for name in row if name.startswith("val/"))
            raise UserError(f"train.monitor={monitor}: validation gives {names}")
        loss = float(str(row.get(f"{name.partition('/')[0]}/loss", math.nan)))
        if is_better(score, state.best_score, monitor, loss=loss, best_loss=state.best_loss):
            state.best_score, state.best_epoch, state.best_is_ema = score, state.epoch, name != monitor
            state.best_loss = loss
