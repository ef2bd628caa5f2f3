"""Describes a run before it starts: each layer's rate, the memory, the work and the schedule.

The model is built on torch's `meta` device, without weights and without memory. A laptop can so describe a model that
only a cluster can train.
"""

import dataclasses
from typing import Any

import torch

from finetune.app.rate_plan import batch_notice, images_per_step, peak_optim, run_curve, short_epoch_notice
from finetune.app.rule import with_choices
from finetune.config import Conf, Precision, PrefixCache, SourceKind
from finetune.core.cost import count_flops, estimate_memory
from finetune.core.device import WIDE, pick_precision
from finetune.core.freezing import set_up_layers
from finetune.core.layers import LayeredModel
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.preprocess import as_asked
from finetune.core.rates import rate_table
from finetune.core.sched import Curve
from finetune.data import open_source
from finetune.data.loading.order import in_whole_steps
from finetune.data.streams import num_views
from finetune.models import build_model
from finetune.models.patches import products_dominate
from finetune.prefix.planning import why_not_cacheable
from finetune.system.errors import UserError
from finetune.system.terminal import counted


def describe(
    conf: Conf, *, num_classes: int | None = None, num_images: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns everything that `finetune describe --json` prints, and the planned rates as `rates.json` holds them.

    `num_classes`, and `num_images` for training, are by default those of data=digits, else those of ImageNet-1k.

    Raises:
        UserError: A model, a setting or a frozen layer that does not exist.
        FileNotFoundError: A file that the model is built from is missing.
    """
    if not conf.data.batch_size:
        advice = "finetune describe tries nothing: give a number, such as data.batch_size=64"
        raise UserError(f"data.batch_size=fit is found by trying sizes on the device, and {advice}")
    classes, images, assumed = _data_sizes(conf, num_classes, num_images)
    built = build_model(conf.model, [f"class {index}" for index in range(classes)], device="meta")
    conf, chosen = with_choices(conf, images, built.model)
    epoch_images = (conf.data.epoch_images or images) * conf.augment.repeats
    if conf.data.drop_last:
        epoch_images = in_whole_steps(epoch_images, images_per_step(conf))
    model, size = built.model, as_asked(built.preprocess, conf.data).size
    set_up_layers(model, conf.optim, train=conf.train)
    curve = run_curve(conf, -(-epoch_images // conf.data.batch_size))
    optim = peak_optim(conf)
    plan = layer_rows(model, rate_table(model, optim))
    layers = [{**row, "rate_start": row["rate_peak"] * curve.factors()[0]} for row in plan]
    names = ("parameters", "learning", "decayed", "groups")
    totals: dict[str, Any] = {name: sum(row[name] for row in plan) for name in names}
    totals["learning_share"] = totals["learning"] / totals["parameters"]
    words = {name: str(getattr(conf.model, name)) for name in ("family", "name", "pretrained", "head")}
    found = {
        "model": {**words, "image_size": size},
        "assumed": assumed,
        "chosen": chosen,
        "layers": layers,
        "totals": totals,
        "memory": _memory(model, conf, size),
        "compute": _compute(model, conf, size, epoch_images),
        "schedule": _schedule(conf, curve, optim.lr),
        "notice": batch_notice(conf) or short_epoch_notice(conf, epoch_images),
    }
    return found, planned_rates(plan, curve)


def _data_sizes(conf: Conf, classes: int | None, images: int | None) -> tuple[int, int, str]:
    """Numbers of classes and of training images, and both in words with where they come from.

    Counts data=digits, which costs nothing; for other data it takes the given numbers, or those of ImageNet-1k.
    """
    notes = []
    if conf.data.source == SourceKind.digits and None in (classes, images):
        source = open_source(conf.data)
        classes = classes or len(source.classes)
        images = images or len(source.splits["train"])
        notes.append("data=digits counted")
    if classes is None:
        classes = 1000
        notes.append("ImageNet-1k's number of classes assumed (--classes N)")
    if images is None:
        images = 1_281_167
        notes.append("ImageNet-1k's number of images assumed (--images N)")
    sizes = f"{counted(classes, 'class', 'classes')}, {counted(images, 'training image')}"
    return classes, images, f"{sizes}: {'; '.join(notes) or 'as given'}"


def _memory(model: LayeredModel, conf: Conf, image_size: int) -> dict[str, Any]:
    is_wide, batch_size = products_dominate(model.net, WIDE), conf.data.batch_size
    dtype, precision = forward_precision(conf, cuda=torch.cuda.is_available(), is_wide=is_wide)
    averaged, optim = conf.train.ema > 0, conf.optim
    memory = estimate_memory(model, image_size, batch_size=batch_size, dtype=dtype, averaged=averaged, optim=optim)
    words = {"batch_size": batch_size, "precision": precision, "optimizer": f"optimizer ({optim.name})"}
    sizes = {f"{name}_bytes": size for name, size in dataclasses.asdict(memory).items()}
    return {**words, **sizes, "total_bytes": memory.total}


def forward_precision(conf: Conf, *, cuda: bool, is_wide: bool) -> tuple[torch.dtype, str]:
    """Returns the dtype of the forward pass, and the precision in words for the report.

    With precision=auto: the choice for this machine, or for the GPU that `device=` names. A GPU that this machine does
    not have is assumed to have bfloat16. `cuda` says whether this machine has a CUDA GPU, and `is_wide` whether most of
    the model's work is in matrices of at least `core.device.WIDE` columns.
    """
    word, note = conf.precision, ""
    if word == Precision.auto:
        device = torch.device(conf.device if conf.device != "auto" else "cuda" if cuda else "cpu")
        on_gpu = device.type == "cuda"
        is_here = not on_gpu or (cuda and (device.index or 0) < torch.cuda.device_count())
        has_bf16 = not is_here or pick_precision(word, device, is_wide=is_wide) == torch.bfloat16
        word = Precision.bf16 if has_bf16 else Precision.fp32
        note = " (precision=auto without a GPU that has bfloat16; say precision=bf16 for one)"
        if has_bf16:
            note = " (precision=auto)" if on_gpu else " (precision=auto: this CPU has it, and the model is wide enough)"
    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
    return dtypes.get(word, torch.float32), f"{word}{note}"


def _compute(model: LayeredModel, conf: Conf, image_size: int, epoch_images: int) -> dict[str, Any]:
    """The work of an image and of the run; `pflop_run_kept` if activations of frozen layers are cached, else None."""
    flops, epochs, with_cache = count_flops(model, image_size), conf.train.epochs, None
    fresh = why_not_cacheable(conf.augment, conf.data.epoch_images)
    if flops.frozen and conf.prefix.cache != PrefixCache.none and fresh is None:
        views = min(num_views(conf.augment), epochs)
        with_cache = (flops.training * epochs - flops.frozen * (epochs - views)) * epoch_images / 1e15
    return {
        "gflop_forward_image": flops.forward / 1e9,
        "gflop_training_image": flops.training / 1e9,
        "class_token_only": model.class_token_only,
        "pflop_run": flops.training * epoch_images * epochs / 1e15,
        "pflop_run_kept": with_cache,
    }


def _schedule(conf: Conf, curve: Curve, peak: float) -> dict[str, Any]:
    """The schedule's settings, and the head's rate at the start, at the peak and at the end."""
    sched, factors = curve.sched, curve.factors()
    return {
        **{name: str(getattr(sched, name)) for name in ("mode", "interval", "past_cycle")},
        "epochs": conf.train.epochs,
        "steps": curve.epochs * curve.steps_per_epoch,
        "units": curve.num_units,
        "warmup": sched.warmup,
        "warmup_epochs": sched.warmup / curve.units_per_epoch,
        "cycle": sched.cycle or curve.num_units,
        "batch": images_per_step(conf),
        **{"lr_start": peak * factors[0], "lr_peak": peak, "lr_last": peak * factors[-1]},
    }
