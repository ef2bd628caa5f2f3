"""The whole of a training step, an epoch and a run; nothing here knows of files, logs or data formats.

Read this file and `layers.py`, and you have read a training step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import Interval, TrainConf
from finetune.core.ema import Ema
from finetune.core.finite import FiniteGuard, Seen
from finetune.core.finite import NotFiniteError as NotFiniteError
from finetune.core.layers import LayeredModel
from finetune.core.losses import Criterion, cross_entropy
from finetune.core.metrics import LabelMeter, Meter, Sums, top1
from finetune.system.errors import UserError

# Normalised images (batch, 3, size, size), or what the frozen layers make of them (see `TrainState.first_layer`), and
# targets on the device; and on the host the images' numbers (batch,) in their split, by which a bad batch is named.
# Targets are labels (batch,), or shares of every class (batch, classes): several labels an image, or the mixtures of
# MixUp and CutMix.
Batch = tuple[Tensor, Tensor, Tensor]
Row = dict[str, object]

# On a GPU the host looks for a loss that is not finite this often (steps): a look waits for the device.
CHECK_EVERY = 50


@dataclass
class Task:
    """What the model learns by, and what it is judged by."""

    criterion: Criterion = cross_entropy
    meter: Meter = field(default_factory=lambda: LabelMeter(cross_entropy))  # holds the latest validation
    monitor: str = "val/top1"  # what `train.monitor=auto` is
    ema_meter: Meter = field(default_factory=lambda: LabelMeter(cross_entropy))  # the same of the averaged weights


@dataclass
class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    model: LayeredModel
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    sums: Sums  # of the current epoch's training batches
    guard: FiniteGuard  # keeps a step that is not finite from changing anything
    task: Task = field(default_factory=Task)
    first_layer: int = 0  # id of the first layer that the loop runs; whoever makes the batches has run those below
    compiled: Callable[[Tensor, int], Tensor] | None = None  # stands in for the model in training steps
    ema: Ema | None = None  # averages of the weights, where `train.ema` asks for them
    epoch: int = 0  # epochs finished
    batch: int = 0  # micro-batches of the current epoch already learned from
    step: int = 0  # optimizer steps taken since the start
    skipped: int = 0  # steps that the fp16 scaler skipped
    rates: dict[str, float] = field(default_factory=dict)  # what each group's rate was as the current epoch began
    best_score: float = math.nan
    best_epoch: int = 0
    best_is_ema: bool = False  # whether the best epoch's averages, not its weights, had that score
    seconds: float = 0.0  # of training and validation, over all sessions of a resumed run

    @classmethod
    def start(
        cls, model: LayeredModel, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler
    ) -> TrainState:
        """A run that has not begun, on the device of the model's parameters."""
        device = next(model.parameters()).device
        return cls(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            sums=Sums(device),
            guard=FiniteGuard(model, device),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.sums.device

    @property
    def epochs_without_better(self) -> int:
        """Epochs finished since the best one."""
        return self.epoch - self.best_epoch


def train_step(
    state: TrainState, window: list[Batch], conf: TrainConf, autocast: AbstractContextManager[object]
) -> None:
    """One optimizer step over a window of micro-batches.

    Each image weighs the same: losses are summed and divided by the images of the window, so a short last micro-batch,
    or a short last window, counts for what it holds.

    Args:
        state: Changed in place.
        window: `train.accumulate` micro-batches, fewer at the end of an epoch.
        conf: Clipping and label smoothing.
        autocast: Context of the forward pass, reusable.
    """
    num_images = sum(len(ids) for _, _, ids in window)
    window_loss = torch.zeros((), device=state.device)
    state.guard.begin()
    for inputs, targets, _ in window:
        assert not inputs.requires_grad, "gradients would run on into layers that are frozen"
        with autocast:
            logits = (state.compiled or state.model)(inputs, state.first_layer)
        losses = state.task.criterion(logits, targets, conf.label_smoothing)
        loss = losses.sum() / num_images
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        window_loss += loss.detach()
        state.sums.add(loss=losses, top1=top1(logits.detach(), targets))
    seen = Seen(state.epoch, state.step + 1, state.batch, torch.cat([ids for _, _, ids in window]))
    _update(state, window_loss, conf.clip_grad, seen)
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.step)
    state.batch += len(window)


def _update(state: TrainState, loss: Tensor, clip_grad: float, seen: Seen) -> None:
    """Unscale, clip, and step, unless they are not finite. Waits for the device with fp16 or unfused kernels."""
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    if clip_grad > 0:
        torch.nn.utils.clip_grads_with_norm_(learning, clip_grad, norm)
    if scaler.is_enabled():
        # An infinite gradient is the scaler's own business (it skips the step and halves its scale); a loss is not.
        state.guard.judge(torch.isfinite(loss), seen)
        state.guard.look()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        state.skipped += scaler.get_scale() < scale
    else:
        state.guard.judge(torch.isfinite(loss) & torch.isfinite(norm), seen)
        state.guard.step(optimizer)  # changes nothing where they are not
    optimizer.zero_grad(set_to_none=True)


def windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group micro-batches by `size`; the last group may be shorter."""
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


def train_one_epoch(
    state: TrainState,
    batches: Iterable[Batch],
    conf: TrainConf,
    *,
    interval: Interval,
    autocast: AbstractContextManager[object],
    on_step_end: Callable[[TrainState], bool],
) -> bool:
    """Learn from what is left of the current epoch; False where `on_step_end` asked to stop.

    Args:
        state: Changed in place.
        batches: Micro-batches, from number `state.batch` on.
        conf: The loop's settings.
        interval: Whether the scheduler steps here, after each optimizer step.
        autocast: Context of the forward pass, reusable.
        on_step_end: Saving, signals, bars; its answer stops the run.

    Raises:
        NotFiniteError: The loss was NaN or infinite; no weight has changed since.
    """
    state.model.train()
    if state.batch == 0:
        state.sums = Sums(state.device)
        state.rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    look_every = CHECK_EVERY if state.device.type == "cuda" else 1
    for window in windows(batches, conf.accumulate):
        train_step(state, window, conf, autocast)
        if state.step % look_every == 0:
            state.guard.look()
        if interval == Interval.step:
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
    meter: Meter | None = None,
    start: int = 0,
) -> dict[str, float]:
    """Exact numbers over `batches`, in eval mode: those of `meter`, by default the means of loss, top1 and top5.

    Layers from id `start` on are run; the batches hold what those below give.
    """
    model.eval()
    meter = meter or LabelMeter(cross_entropy)
    meter.reset()
    for inputs, targets, _ in batches:
        with autocast:
            logits = model(inputs, start=start)
        meter.add(logits, targets)
    return meter.results()


def is_better(score: float, best: float, monitor: str) -> bool:
    """Whether `score` beats `best` (NaN: none yet); a monitor that ends in `loss` or `ece` is minimised.

    NaN never wins.
    """
    if math.isnan(score):
        return False
    if math.isnan(best):
        return True
    return score < best if monitor.endswith(("loss", "ece")) else score > best


def fit(
    state: TrainState,
    conf: TrainConf,
    *,
    train_batches: Callable[[int, int], Iterable[Batch]],
    val_batches: Callable[[int], Iterable[Batch]],
    interval: Interval,
    autocast: AbstractContextManager[object],
    on_step_end: Callable[[TrainState], bool],
    on_epoch_end: Callable[[TrainState, Row], None],
) -> bool:
    """Train, validate, `scheduler.step()`, epoch by epoch, from wherever `state` stands.

    Args:
        state: Changed in place.
        conf: The loop's settings.
        train_batches: From epoch (0 is the first) and micro-batches to leave out, to the epoch's batches.
        val_batches: From epoch to the validation batches.
        interval: The scheduler's unit.
        autocast: Context of the forward pass, reusable.
        on_step_end: Called after each optimizer step; True stops the run there.
        on_epoch_end: Called with the epoch's row of the history, after the scheduler has stepped.

    Returns:
        False where `on_step_end` stopped the run, else True.

    Raises:
        NotFiniteError: See `train_one_epoch`.
        ValueError: `train.monitor` is no metric of this validation.
    """
    while state.epoch < conf.epochs and not _is_patience_over(state, conf):
        began = time.perf_counter()
        images_before = state.sums.count if state.batch else 0
        batches = train_batches(state.epoch, state.batch)
        finished = train_one_epoch(state, batches, conf, interval=interval, autocast=autocast, on_step_end=on_step_end)
        trained_s = time.perf_counter() - began
        if not finished:
            state.seconds += trained_s
            return False
        row: Row = {"epoch": state.epoch + 1}
        row |= {f"train/{name}": value for name, value in state.sums.means().items()}
        scores = validate(state.model, val_batches(state.epoch), autocast, state.task.meter, state.first_layer)
        row |= {f"val/{name}": value for name, value in scores.items()}
        if state.ema is not None:
            with state.ema.swapped_in():
                scores = validate(
                    state.model, val_batches(state.epoch), autocast, state.task.ema_meter, state.first_layer
                )
            row |= {f"val_ema/{name}": value for name, value in scores.items()}
        row |= {"lr": state.rates, "images_per_s": (state.sums.count - images_before) / trained_s}
        if interval == Interval.epoch:
            state.scheduler.step()
        state.epoch += 1
        state.batch = 0
        _keep_best(state, row, state.task.monitor if conf.monitor == "auto" else conf.monitor)
        row["seconds"] = time.perf_counter() - began
        state.seconds += time.perf_counter() - began
        on_epoch_end(state, row)
    return True


def _keep_best(state: TrainState, row: Row, monitor: str) -> None:
    """Note whether the epoch just finished, by its weights or by their averages, is the best so far."""
    for name in [monitor] if state.ema is None else [monitor, monitor.replace("val/", "val_ema/", 1)]:
        score = row.get(name)
        if not isinstance(score, float):
            names = ", ".join(name for name in row if name.startswith("val/"))
            raise UserError(f"train.monitor={monitor}: validation gives {names}")
        if is_better(score, state.best_score, monitor):
            state.best_score, state.best_epoch, state.best_is_ema = score, state.epoch, name != monitor


def _is_patience_over(state: TrainState, conf: TrainConf) -> bool:
    """Early stopping: `train.patience` epochs in a row were no better than the best one."""
    return conf.patience > 0 and state.epoch > 0 and state.epochs_without_better >= conf.patience
