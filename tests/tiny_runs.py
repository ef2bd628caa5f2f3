"""The loop over `tiny.py`'s model and batches, on a CPU in fp32."""

from __future__ import annotations

import contextlib

import torch
from tiny import tiny_batches

from finetune import SchedulerConf, create_scheduler
from finetune.config import Interval, OptimConf, TrainConf
from finetune.core.layers import LayeredModel, freeze
from finetune.core.loop import TrainState, fit
from finetune.core.optim import build_optimizer

SIZES = [8, 8, 8, 3]
CPU32 = contextlib.nullcontext()


def start(
    model: LayeredModel, *, epochs: int = 3, interval: str = "epoch", accumulate: int = 1, fix_layer: int = -1
) -> TrainState:
    freeze(model, fix_layer)
    optimizer = build_optimizer(model, OptimConf(lr=0.02, layer_decay=0.7))
    steps = epochs if interval == "epoch" else epochs * -(-len(SIZES) // accumulate)
    scheduler = create_scheduler(SchedulerConf(mode="cosine_pi", interval=interval), optimizer, steps)
    torch.manual_seed(5)
    return TrainState.start(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))


def run_fit(
    state: TrainState, conf: TrainConf, *, interval: str = "epoch", stop_at: int = -1, rows: list | None = None
) -> bool:
    return fit(
        state,
        conf,
        train_batches=lambda epoch, skip: tiny_batches(SIZES, seed=epoch)[skip:],
        val_batches=lambda epoch: tiny_batches([5, 2], seed=99),
        interval=Interval(interval),
        autocast=CPU32,
        on_step_end=lambda state: state.step == stop_at,
        on_epoch_end=lambda state, row: rows.append(row) if rows is not None else None,
    )
