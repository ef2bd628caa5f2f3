"""The memory of a GPU: the largest micro-batch that fits, and what to say where one did not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch

from finetune.app.build import Run
from finetune.config import Conf, PrefixCache
from finetune.core import recipe
from finetune.core.ema import Ema
from finetune.core.freezing import set_up_layers
from finetune.core.loop import TrainState, train_step
from finetune.core.optim import build_optimizer
from finetune.prefix import SHARE
from finetune.system.errors import UserError

logger = logging.getLogger("finetune")

# Images an optimizer step where nothing else says it: the default of `data.batch_size`.
DEFAULT_BATCH = 64
TRIAL_STEPS = 2  # the first makes the optimizer's moments, the second shows the peak
# Share of the memory that training may reach beyond what the trial took: fragments, other image sizes, the loader.
SPARE = 0.08
ON_DEVICE = (PrefixCache.auto, PrefixCache.device)


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of `sizes`, ascending, that fits, by halving; None where not even the first does.

    Args:
        sizes: Candidates, ascending.
        fits: Whether a size does; where one does, every smaller one has to.
    """
    low, high = -1, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle - 1
    return sizes[low] if low >= 0 else None


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def wanted_batch(conf: Conf) -> int:
    """Images an optimizer step that `data.batch_size=auto` keeps: the recipe's, or the default times accumulation."""
    return conf.optim.recipe_batch or DEFAULT_BATCH * conf.train.accumulate


def with_batch(conf: Conf, size: int) -> Conf:
    """`conf` with micro-batches of `size`, and as many of them a step as keep the wanted batch."""
    accumulate = wanted_batch(conf) // size
    data = dataclasses.replace(conf.data, batch_size=size)
    return dataclasses.replace(conf, data=data, train=dataclasses.replace(conf.train, accumulate=accumulate))


def choose_batch(run: Run, fits: Callable[[int], bool] | None = None) -> int:
    """What `data.batch_size=auto` comes to: the largest divisor of the wanted batch that fits the GPU.

    Divisors, so that every step learns from exactly as many images as it would in one piece. Elsewhere than on CUDA
    nothing can be measured, and the default is taken.

    Args:
        run: Model and device.
        fits: For tests; by default steps on made-up images are tried.

    Raises:
        ValueError: Not even one image fits.
    """
    wanted = wanted_batch(run.conf)
    if run.device.type != "cuda" and fits is None:
        size = next(size for size in reversed(divisors(wanted)) if size <= DEFAULT_BATCH)
        logger.warning("data.batch_size=auto: nothing to measure on %s, taking %d", run.device.type, size)
        return size
    size_or_none = largest_fitting(divisors(wanted), fits or (lambda size: _fits(run, size)))
    if size_or_none is None:
        raise UserError(
            f"data.batch_size=auto: not even one image fits. {_advice(with_batch(run.conf, 1), is_auto=True)}"
        )
    logger.info(
        "data.batch_size=auto: %d images a micro-batch fit, times %d make the %d images of a step",
        size_or_none,
        wanted // size_or_none,
        wanted,
    )
    return size_or_none


def _fits(run: Run, size: int) -> bool:
    """Try steps of `size` made-up images on the model itself, at rate 0; leaves weights and statistics as they were."""
    buffers = {name: buffer.detach().clone() for name, buffer in run.model.net.named_buffers()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(run.device)
    try:
        _trial(run, size)
        total = torch.cuda.get_device_properties(run.device).total_memory
        # What the frozen layers give may be kept there, too, out of what is free once this is settled.
        kept = SHARE[PrefixCache.device] if run.model.num_frozen and run.conf.prefix.cache in ON_DEVICE else 0.0
        return torch.cuda.max_memory_reserved(run.device) <= (1 - SPARE) * (1 - kept) * total
    except torch.OutOfMemoryError:
        return False
    finally:
        run.model.zero_grad(set_to_none=True)
        for name, buffer in run.model.net.named_buffers():
            buffer.copy_(buffers[name])
        torch.cuda.empty_cache()


def _trial(run: Run, size: int) -> None:
    conf, pixels = run.conf, run.built.preprocess.size
    set_up_layers(run.model, conf.optim, train=conf.train)
    optimizer = build_optimizer(run.model, recipe.scaled_optim(with_batch(conf, size)))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = TrainState(run.model, optimizer, scheduler, scaler, criterion=run.criterion(), autocast=run.autocast())
    if conf.train.ema:
        state.ema = Ema(run.model, conf.train.ema, warmup=conf.train.ema_warmup)
    run.model.train()
    classes = len(run.source.classes)
    shape = (size, classes) if run.source.is_multilabel or conf.augment.mixup or conf.augment.cutmix else (size,)
    targets = torch.zeros(shape, dtype=torch.float32 if len(shape) == 2 else torch.int64, device=run.device)
    batch = (torch.zeros(size, 3, pixels, pixels, device=run.device), targets, torch.arange(size))
    for _ in range(TRIAL_STEPS):
        train_step(state, [batch], conf.train)


def out_of_memory(run: Run, *, step: int | None = None) -> str:
    """What to say where something did not fit: the measured peak, and what to change.

    Args:
        run: The run's.
        step: Optimizer steps so far; None outside training.
    """
    where = f"out of memory on {run.device}" + ("" if step is None else f" in step {step + 1}")
    if run.device.type == "cuda":
        total = torch.cuda.get_device_properties(run.device).total_memory
        peak = torch.cuda.max_memory_allocated(run.device)
        where += f": a peak of {peak / 2**30:.1f} GiB, and the GPU has {total / 2**30:.1f} GiB"
    return f"{where}. {_advice(run.conf, is_auto=run.is_auto_batch)}"


def _advice(conf: Conf, *, is_auto: bool) -> str:
    size, accumulate = conf.data.batch_size, conf.train.accumulate
    tries = []
    if size > 1:
        half = size // 2
        tries.append(
            f"data.batch_size={half} train.accumulate={-(-size * accumulate // half)} learns from as many images a step"
        )
    if not conf.train.recompute:
        tries.append("train.recompute=true computes activations twice instead of keeping them")
    if conf.precision == "fp32":
        tries.append("precision=bf16 halves the activations")
    if conf.optim.fix_layer < 0:
        tries.append("optim.fix_layer=N keeps no activations of the layers that it freezes")
    if conf.prefix.cache in (PrefixCache.ram, PrefixCache.device):
        tries.append("prefix.cache=disk or none keeps what the frozen layers give elsewhere, or not")
    if not is_auto:
        tries.append("data.batch_size=auto finds what fits")
    tries.append("or take a smaller model or model.image_size")
    return "Try: " + "; ".join(tries)
