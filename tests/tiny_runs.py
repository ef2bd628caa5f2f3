"""Short trainings of the tiny model: a state before its first step, and a few epochs of `fit`."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_batches

from finetune import SchedulerConf, create_scheduler
from finetune.config import Interval, OptimConf, TrainConf
from finetune.core.fit import Row, Validation, fit
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.optim import build_optimizer
from finetune.runs.checkpoint import read_state, restore, snapshot, write_state
from finetune.runs.weights import checksum, copied_weights, frozen_weights, restore_frozen, write_weights

SIZES = [8, 8, 8, 3]  # images of the micro-batches of an epoch


def tiny_state(
    model: LayeredModel,
    conf: OptimConf | None = None,
    *,
    epochs: int = 3,
    interval: str = "epoch",
    fix_layer: int | None = None,
    scaler: float = 0.0,
) -> TrainState:
    """Training of `model` over SIZES before its first step; `scaler` is the scale of an fp16 run, 0 for fp32."""
    conf = conf or OptimConf(lr=0.02, layer_decay=0.7)
    freeze(model, conf.fix_layer if fix_layer is None else fix_layer)
    optimizer = build_optimizer(model, conf)
    steps = epochs if interval == "epoch" else epochs * len(SIZES)
    scheduler = create_scheduler(SchedulerConf(mode="cosine_pi", interval=interval), optimizer, steps)
    torch.manual_seed(5)
    amp = torch.amp.GradScaler("cpu", init_scale=scaler or 1.0, enabled=scaler > 0)
    return TrainState(model, optimizer, scheduler, amp, interval=Interval(interval))


def tiny_fit(
    state: TrainState,
    conf: TrainConf | None = None,
    *,
    stop_at: int = -1,
    rows: list[Row] | None = None,
    monitor: str = "val/top1",
) -> bool:
    """`fit` over SIZES for 3 epochs, or as `conf` says, up to step `stop_at`; appends the history to `rows`."""
    return fit(
        state,
        conf or TrainConf(epochs=3),
        train_batches=lambda epoch, skip: tiny_batches(SIZES, seed=epoch)[skip:],
        validation=Validation(lambda meter: tiny_batches([5, 2], seed=99), monitor=monitor),
        on_step_end=lambda state: state.step == stop_at,
        on_epoch_end=lambda state, row: rows.append(row) if rows is not None else None,
    )


def save_weights(path: Path, model: LayeredModel, metadata: dict[str, str]) -> None:
    write_weights(path, copied_weights(model, {}), metadata)


def save_state(path: Path, state: TrainState) -> None:
    write_state(path, snapshot(state), checksum(frozen_weights(state.model)), weights={})


def load_state(path: Path, state: TrainState) -> None:
    content = read_state(path)
    restore_frozen(state.model, content["frozen"], path)
    restore(content, state, str(path))
