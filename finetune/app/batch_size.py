"""The memory of a GPU: the largest micro-batch that fits, and what to change where a batch did not fit."""

import bisect
import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch

from finetune.app.build import Run
from finetune.app.rate_plan import peak_optim
from finetune.config import Conf, PrefixCache
from finetune.core.freezing import set_up_layers
from finetune.core.loop import train_step
from finetune.core.optim import build_optimizer
from finetune.prefix.choice import SHARE
from finetune.system.errors import UserError
from finetune.system.limits import in_bytes
from finetune.system.terminal import counted

logger = logging.getLogger("finetune")

DEFAULT_BATCH = 64  # of `data.batch_size`; images in an optimizer step where no recipe says how many
SPARE = 0.08  # share of the memory left free in the trial, for fragmentation, larger images and the loader


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of `sizes`, ascending, that fits, found by bisection; None if even the first does not fit."""
    number = bisect.bisect_right(sizes, False, key=lambda size: not fits(size))  # of sizes that fit
    return sizes[number - 1] if number else None


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _target_images_per_step(conf: Conf) -> int:
    return conf.optim.recipe_batch or DEFAULT_BATCH * conf.train.accumulate


def with_batch(conf: Conf, size: int) -> Conf:
    """`conf` with micro-batches of `size` images, accumulated to as many images a step as before."""
    data = dataclasses.replace(conf.data, batch_size=size)
    train = dataclasses.replace(conf.train, accumulate=_target_images_per_step(conf) // size)
    return dataclasses.replace(conf, data=data, train=train)


def choose_batch(run: Run) -> int:
    """The micro-batch of `data.batch_size=fit`: the largest divisor of the images in a step that fits the GPU.

    A divisor, so that each step learns from exactly the same images as with one large batch. On other devices than
    CUDA memory cannot be measured, and the largest divisor up to the default is taken.

    Raises:
        UserError: Not even one image fits.
    """
    sizes = divisors(_target_images_per_step(run.conf))
    if run.device.type != "cuda":
        size = next(size for size in reversed(sizes) if size <= DEFAULT_BATCH)
        logger.warning("data.batch_size=fit: memory cannot be measured on %s, taking %d", run.device.type, size)
        return size
    found = largest_fitting(sizes, lambda size: _fits(run, size))
    if found is None:
        advice = _advice(with_batch(run.conf, 1), is_auto=True)
        raise UserError(f"data.batch_size=fit: not even one image fits. {advice}")
    fit, step = counted(found, "image"), counted(sizes[-1], "image")
    logger.info("data.batch_size=fit: %s a micro-batch fit, times %d: %s a step", fit, sizes[-1] // found, step)
    return found


def _fits(run: Run, size: int) -> bool:
    """Try two steps of `size` images on the run's model at rate 0; weights and statistics stay as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in run.model.net.buffers()]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(run.device)
    try:
        _try_steps(run, size)
        total = torch.cuda.get_device_properties(run.device).total_memory
        # Activations may later be cached on the GPU, too, in a share of the memory that is free then.
        may_cache = run.model.num_frozen and run.conf.prefix.cache in (PrefixCache.auto, PrefixCache.device)
        share = (1 - SPARE) * (1 - SHARE[PrefixCache.device] * bool(may_cache))
        return torch.cuda.max_memory_reserved(run.device) <= share * total
    except torch.OutOfMemoryError:
        return False
    finally:
        run.model.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.empty_cache()


def _try_steps(run: Run, size: int) -> None:
    conf, pixels, device = run.conf, run.built.preprocess.size, run.device
    set_up_layers(run.model, conf.optim, train=conf.train)
    optimizer = build_optimizer(run.model, peak_optim(with_batch(conf, size)))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    state = run.state(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0))
    run.model.train()
    targets = torch.zeros(size, dtype=torch.int64, device=device)
    if run.source.is_multilabel or conf.augment.mixup or conf.augment.cutmix:
        targets = torch.zeros(size, len(run.source.classes), device=device)
    batch = (torch.zeros(size, run.model.channels, pixels, pixels, device=device), targets, torch.arange(size))
    for _ in range(2):  # the first step creates the optimizer's moments, so only the second one reaches the peak
        train_step(state, [batch], conf.train)


def out_of_memory(run: Run, *, step: int | None = None) -> str:
    """The message of a run that ran out of memory, after `step` steps of training: the peak, and what to change."""
    where = f"out of memory on {run.device}" + ("" if step is None else f" in step {step + 1}")
    if run.device.type == "cuda":
        total = torch.cuda.get_device_properties(run.device).total_memory
        peak = torch.cuda.max_memory_allocated(run.device)
        where += f": a peak of {in_bytes(peak)}, and the GPU has {in_bytes(total)}"
    return f"{where}. {_advice(run.conf, is_auto=run.is_auto_batch)}"


def _advice(conf: Conf, *, is_auto: bool) -> str:
    size, accumulate = conf.data.batch_size, conf.train.accumulate
    half = max(1, size // 2)
    smaller = f"data.batch_size={half} train.accumulate={-(-size * accumulate // half)}"
    is_in_memory = conf.prefix.cache in (PrefixCache.ram, PrefixCache.device)
    # Each possible change, and whether it would help this run.
    changes = {
        f"{smaller} learns from as many images a step": size > 1,
        "train.recompute=true computes activations twice instead of storing them": not conf.train.recompute,
        "precision=bf16 halves the activations": conf.precision == "fp32",
        "optim.fix_layer=N stores no activations of the layers that it freezes": conf.optim.fix_layer < 0,
        "prefix.cache=disk or none takes the frozen layers' activations out of memory": is_in_memory,
        "data.batch_size=fit finds what fits": not is_auto,
        "or take a smaller model or model.image_size": True,
    }
    return "Try: " + "; ".join(text for text, helps in changes.items() if helps)
