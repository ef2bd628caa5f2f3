"""One optimizer step: forward, loss, backward, the judgement whether the update is applied, the update itself.

This file and `layers.py` are the whole of a training step; `fit.py` repeats it over epochs.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import Interval, TrainConf
from finetune.core.ema import Ema
from finetune.core.finite import NotFiniteError, StepRecord
from finetune.core.layers import LayeredModel
from finetune.core.losses import Criterion, cross_entropy
from finetune.core.metrics import Sums, top1

# A micro-batch: inputs, targets, ids. Inputs are normalised images (batch, 3, size, size), or the activations that
# `TrainState.first_layer` takes. Targets are labels (batch,), or shares of every class (batch, classes). Both are on
# the device. Ids, (batch,), are the images' numbers in their split and stay on the host, to name a bad batch.
Batch = tuple[Tensor, Tensor, Tensor]


class FiniteGuard:
    """Makes a step whose loss or gradient is NaN or infinite change no weight, moment or running statistic.

    Reading a verdict after every step would make the host wait for the device. So verdicts stay on the device, as a
    mask that fused kernels read, and `look` reads those of many steps at once.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Guard the weights and running statistics of `model`, which is on `device`."""
        self.limit = 0  # bad steps that are skipped; the next one ends the run, and no step after it is applied
        self.total = 0  # bad steps of the whole run that the host knows of
        self.mask = torch.zeros((), device=device)  # 1.0 where weights, moments and averages must stay as they are
        self._unread_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._unread: list[tuple[StepRecord, Tensor]] = []
        self._found: list[StepRecord] = []
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]

    def begin(self) -> None:
        """Call before a step's forward pass, which over a NaN ruins BatchNorm's statistics before any update."""
        self._before = [buffer.clone() for buffer in self._statistics]

    def judge(self, is_finite: Tensor, record: StepRecord) -> None:
        """Set the mask by `is_finite`, a truth value () on the device, after the backward pass. Waits for nothing."""
        is_bad = ~is_finite
        self._unread_bad += is_bad
        # The second term is sticky: beyond the limit even good steps are masked, until the host looks and stops.
        self.mask.copy_(is_bad | (self._unread_bad + self.total > self.limit))
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(torch.where(self.mask > 0, before, buffer))
        self._unread.append((record, is_bad))

    def step(self, optimizer: Optimizer) -> None:
        """Apply the update unless the mask is set; then weights, moments and step counts keep every bit."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # its kernels read the flag `found_inf`
            optimizer.found_inf = self.mask  # type: ignore[attr-defined]
            optimizer.step()
        elif not self.mask.item():  # waits for the device once a step; on a CPU that costs nothing
            optimizer.step()

    def look(self) -> None:
        """Read the verdicts since the last call. Waits for the device.

        Raises:
            NotFiniteError: More steps were bad than `limit`; names the first beyond it.
        """
        if not self._unread:
            return
        flags = torch.stack([flag for _, flag in self._unread]).tolist()
        bad = [record for (record, _), flag in zip(self._unread, flags, strict=True) if flag]
        self._unread.clear()
        self._unread_bad.zero_()
        first_beyond = self.limit - self.total
        self.total += len(bad)
        self._found += bad
        if self.total > self.limit:
            raise NotFiniteError(bad[first_beyond], self.limit)

    def take(self) -> list[StepRecord]:
        """The bad steps that `look` found since the last call."""
        found, self._found = self._found, []
        return found


@dataclass
class TrainState:
    """All that changes while training, which a checkpoint holds, and the settings that a step is computed with."""

    model: LayeredModel
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    criterion: Criterion = cross_entropy
    autocast: AbstractContextManager[object] = field(default_factory=nullcontext)  # of the forward pass; reusable
    interval: Interval = Interval.epoch  # when the scheduler steps
    first_layer: int = 0  # id of the first layer that the loop runs; batches hold the output of the layers below
    compiled: Callable[[Tensor, int], Tensor] | None = None  # runs instead of the model in training steps
    ema: Ema | None = None  # averages of the weights
    epoch: int = 0  # epochs finished
    batch: int = 0  # micro-batches of the current epoch that were learned from
    step: int = 0  # optimizer steps since the start
    skipped: int = 0  # steps that the fp16 scaler skipped
    rates: dict[str, float] = field(default_factory=dict)  # each group's rate at the start of the current epoch
    best_score: float = math.nan
    best_loss: float = math.nan  # of the same weights
    best_epoch: int = 0
    best_is_ema: bool = False  # whether the averages of the best epoch had that score, and not its weights
    seconds: float = 0.0  # of training and validation, over all sessions of a resumed run

    def __post_init__(self) -> None:
        """Start the sums of the current epoch's training batches, and the guard, on the device of the model."""
        self.device = next(self.model.parameters()).device
        self.sums, self.guard = Sums(self.device), FiniteGuard(self.model, self.device)


def train_step(state: TrainState, window: list[Batch], conf: TrainConf) -> None:
    """One optimizer step over a window of at most `train.accumulate` micro-batches; changes `state`."""
    # Losses are summed, then divided by the images of the window: so each image weighs the same in a short window too.
    num_images = sum(len(ids) for _, _, ids in window)
    window_loss = torch.zeros((), device=state.device)
    state.guard.begin()
    for inputs, targets, _ in window:
        assert not inputs.requires_grad, "gradients would run on into layers that are frozen"
        with state.autocast:
            logits = (state.compiled or state.model)(inputs, state.first_layer)
        losses = state.criterion(logits, targets, conf.label_smoothing)
        loss = losses.sum() / num_images
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        window_loss += loss.detach()
        state.sums.add(loss=losses, top1=top1(logits.detach(), targets))
    ids = torch.cat([ids for _, _, ids in window])
    _update(state, window_loss, conf.clip_grad, StepRecord(state.epoch, state.step + 1, state.batch, ids))
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.step, skipped=state.guard.mask)
    state.batch += len(window)


def _update(state: TrainState, loss: Tensor, clip_grad: float, record: StepRecord) -> None:
    """Unscale and clip the gradients, judge the step, apply it. Waits for the device with fp16 or unfused kernels."""
    optimizer, scaler, guard = state.optimizer, state.scaler, state.guard
    scaler.unscale_(optimizer)  # before the norm: a scaled gradient would be clipped too hard
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    if clip_grad > 0:
        torch.nn.utils.clip_grads_with_norm_(learning, clip_grad, norm)
    if scaler.is_enabled():
        # An infinite gradient is the scaler's business: it skips the step and halves its scale. A loss is not.
        guard.judge(torch.isfinite(loss), record)
        guard.look()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            state.skipped += 1
            guard.mask.fill_(1.0)
    else:
        guard.judge(torch.isfinite(loss) & torch.isfinite(norm), record)
        guard.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
