"""What a run will be, before it is: every layer with its rate, memory, work and schedule. Nothing is loaded or trained.

    finetune describe [--json] [--plot FILE] [--classes N] [--images N] [KEY=VALUE ...]

The model is built without weights and without memory, so a laptop can look at a model that only a cluster can train.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config import Conf, Interval, Precision, PrefixCache, SourceKind, nearest
from finetune.config.words import ConfigError, parse_command_line
from finetune.core import recipe
from finetune.system.errors import UserError
from finetune.system.log import say, table
from finetune.system.terminal import complain

if TYPE_CHECKING:
    import torch

    from finetune.core.cost import Flops, Memory
    from finetune.core.layers import LayeredModel
    from finetune.core.preprocess import Preprocess

HELP = """\
What a run will be, before it is: every layer with its rate, memory, work and schedule. Nothing is loaded or trained.

Usage: finetune describe [FLAG ...] [GROUP=CHOICE ...] [KEY=VALUE ...]

Flags (they may stand anywhere):
  --json            one JSON object instead of tables
  --plot FILE       draw every layer's rate over the run into FILE, a PNG
  --classes N       classes of the classifier; without it those of data=digits, else 1,000 (ImageNet-1k's)
  --images N        training images; without it those of data=digits, else 1,281,167 (ImageNet-1k's)
  --config-dir DIR  search DIR for yaml files ahead of ./conf and the built-in ones
  --help            this page

Examples:
  finetune describe model=clip_l14 optim.fix_layer=11 precision=bf16 data.batch_size=256
  finetune describe experiment=ft_clip_b16 --plot rates.png"""

IMAGENET_CLASSES, IMAGENET_IMAGES = 1000, 1_281_167
FLAGS = ("--json", "--plot", "--classes", "--images")
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Options:
    """Flags of this command.

    Attributes:
        as_json: Print JSON.
        plot: Where to draw the rates.
        classes: As given, or None.
        images: As given, or None.
    """

    as_json: bool = False
    plot: Path | None = None
    classes: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Sizes:
    """What the data would say: how many classes, how many training batches an epoch, and how that is known."""

    classes: tuple[str, ...]
    images: int
    batches: int
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 1 where something is wrong with the configuration; 2 for an unusable command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(HELP)
        return 0
    try:
        options, rest = take_options(words)
        found, plan = describe(_conf(rest), options)
        if options.plot is not None:
            _draw(plan, options.plot)
        say(json.dumps(found, indent=2, ensure_ascii=False) if options.as_json else as_text(found))
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
        return error.code
    except (ValueError, OSError) as error:
        complain(str(error))
        return 1
    return 0


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's own flags, and all other words.

    Raises:
        ConfigError: A flag lacks its value, or has a bad one.
    """
    found: dict[str, str] = {}
    rest, words, problems = [], list(argv), []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            rest.append(word)
        elif name == "--json":
            found[name] = ""
            problems += [f"{word}: --json takes no value"] * bool(equals)
        elif equals or (words and not words[0].startswith("-") and "=" not in words[0]):  # KEY=VALUE is no value of it
            found[name] = value if equals else words.pop(0)
        else:
            held = f" (one that holds a = is written {name}=VALUE)" if words and "=" in words[0] else ""
            problems.append(f"{name} needs a value{held}")
    counts: dict[str, int | None] = {"--classes": None, "--images": None}
    for name in counts:
        if name in found and not (found[name].isascii() and found[name].isdigit() and int(found[name]) > 0):
            problems.append(f"{name} {found[name]}: expected a whole number of at least 1")
        elif name in found:
            counts[name] = int(found[name])
    if problems:
        raise ConfigError(problems, code=2)
    plot = Path(found["--plot"]).expanduser() if "--plot" in found else None
    return Options("--json" in found, plot, counts["--classes"], counts["--images"]), rest


def _conf(words: Sequence[str]) -> Conf:
    """The configuration of the rest of the command line, as the main entry would read it."""
    line = parse_command_line(words)
    foreign = [name for name in line.flags if name != "--config-dir"]
    foreign += [word for word in words if any(problem.startswith(f"{word}: no such flag") for problem in line.problems)]
    if foreign:
        hint = nearest(foreign[0], (*FLAGS, "--config-dir", "--help"))
        raise ConfigError(
            [f"{foreign[0]}: finetune describe looks at one run and has the flags {', '.join(FLAGS)},"
             f" --config-dir and --help{hint}"],
            code=2,
        )  # fmt: skip
    from finetune.config.words.composition import prepare

    return prepare(line).conf


def describe(conf: Conf, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that `--json` prints, and the planned rates as `rates.json` holds them.

    Raises:
        ValueError: A model, a setting or a frozen layer that does not exist.
        FileNotFoundError: A file that the model is made from.
    """
    if not conf.data.batch_size:
        raise UserError(
            "data.batch_size=auto is found by trying sizes on the device, and finetune describe tries nothing:"
            " give a number, such as data.batch_size=64"
        )
    import torch

    from finetune.core.cost import count_flops, estimate_memory
    from finetune.core.device import WIDE
    from finetune.core.plan import planned_rates, prepare
    from finetune.models import build_model
    from finetune.models.patches import products_dominate

    sizes = _sizes(conf, options)
    built = build_model(conf.model, sizes.classes, device="meta")
    model = built.model
    prepare(model, conf)
    steps = recipe.steps_per_epoch(conf, sizes.batches)
    is_wide = products_dominate(model.net, WIDE)
    dtype, precision = _precision(conf, cuda=torch.cuda.is_available(), is_wide=is_wide)
    memory = estimate_memory(
        model,
        built.preprocess.size,
        batch_size=conf.data.batch_size,
        dtype=dtype,
        averaged=conf.train.ema > 0,
        optim=conf.optim,
    )
    flops = count_flops(model, built.preprocess.size)
    plan = planned_rates(model, conf, steps)
    layers = layer_rows(model, conf, steps)
    totals = _totals(layers)
    return {
        "model": _model(conf, built.preprocess),
        "assumed": sizes.note,
        "layers": layers,
        "totals": totals,
        "memory": _memory(conf, memory, precision),
        "compute": {
            "gflop_forward_image": flops.forward / 1e9,
            "gflop_training_image": flops.training / 1e9,
            "class_token_only": model.class_token_only,
            "pflop_run": flops.training * sizes.images * conf.train.epochs / 1e15,
            "pflop_run_kept": _pflop_kept(conf, flops, sizes.images),
        },
        "schedule": _schedule(conf, steps),
        "notice": recipe.batch_notice(conf),
    }, plan


def _pflop_kept(conf: Conf, flops: Flops, images: int) -> float | None:
    """Work of the run where what the frozen layers give is kept; None where nothing is, or may be."""
    from finetune.data.streams import num_views
    from finetune.prefix import why_not_in_training

    if not flops.frozen or conf.prefix.cache == PrefixCache.none or why_not_in_training(conf) is not None:
        return None
    epochs = conf.train.epochs
    once = min(num_views(conf.augment), epochs)
    return (flops.training * epochs - flops.frozen * (epochs - once)) * images / 1e15


def _sizes(conf: Conf, options: Options) -> Sizes:
    """Counts of the data where they cost nothing to know; else as given, or assumed."""
    classes, images = options.classes, options.images
    notes = []
    if conf.data.source == SourceKind.digits and None in (classes, images):
        from finetune.data import open_source

        source = open_source(conf.data)
        classes = classes or len(source.classes)
        images = images or len(source.splits["train"])
        notes.append("data=digits counted")
    if classes is None:
        classes = IMAGENET_CLASSES
        notes.append("ImageNet-1k's number of classes assumed (--classes N)")
    if images is None:
        images = IMAGENET_IMAGES
        notes.append("ImageNet-1k's number of images assumed (--images N)")
    shown = (conf.data.epoch_images or images) * conf.augment.repeats
    batches = -(-shown // conf.data.batch_size)
    text = f"{classes:,} classes, {images:,} training images"
    names = tuple(f"class {index}" for index in range(classes))
    return Sizes(names, shown, batches, f"{text}: {'; '.join(notes) or 'as given'}")


def _precision(conf: Conf, *, cuda: bool, is_wide: bool) -> tuple[torch.dtype, str]:
    """What the forward pass computes in; `auto` is what it would be on this machine, or on a GPU that is named."""
    import torch

    from finetune.core.device import pick_precision

    word, note = conf.precision, ""
    if word == Precision.auto:
        named = "cuda" if conf.device == "auto" and cuda else "cpu" if conf.device == "auto" else conf.device
        on_gpu = named.startswith("cuda")
        device = torch.device(named)
        is_here = not on_gpu or (cuda and (device.index or 0) < torch.cuda.device_count())
        # A GPU that is not in this machine is taken for one of today.
        has_bf16 = not is_here or pick_precision(word, device, is_wide=is_wide) == torch.bfloat16
        word = Precision.bf16 if has_bf16 else Precision.fp32
        note = " (precision=auto without a GPU that has bfloat16; say precision=bf16 for one)"
        if has_bf16:
            note = " (precision=auto)" if on_gpu else " (precision=auto: this CPU has it, and the model is wide enough)"
    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
    return dtypes.get(word, torch.float32), f"{word}{note}"


def _model(conf: Conf, preprocess: Preprocess) -> dict[str, Any]:
    return {
        "family": str(conf.model.family),
        "name": conf.model.name,
        "pretrained": conf.model.pretrained,
        "head": str(conf.model.head),
        "image_size": preprocess.size,
    }


def layer_rows(model: LayeredModel, conf: Conf, steps: int) -> list[dict[str, Any]]:
    """A row a layer, from the stem up, as the optimizer's groups will hold it; the model is frozen already.

    `rate_start` and `rate_peak` are those of the layer's fastest group; where `optim.layer_rule=timm` gives it two
    rates, `rates_peak` has both. `decayed` counts the parameters that weight decay reaches.
    """
    from finetune.core.optim import param_groups
    from finetune.core.sched import lr_factor

    groups = param_groups(model, recipe.scaled_optim(conf))
    first = lr_factor(0, recipe.timed_sched(conf.sched, steps), recipe.num_units(conf, steps))
    sizes = [0] * len(model.layers)
    for name, parameter in model.net.named_parameters():
        sizes[model.layer_ids[name]] += parameter.numel()
    rows = []
    for index, layer in enumerate(model.layers):
        own = [group for group in groups if group["layer_id"] == index]
        peaks = sorted({group["lr"] for group in own}, reverse=True)
        decayed = [group for group in own if group["weight_decay"] > 0]
        rows.append(
            {
                "id": index,
                "layer": layer.name,
                "parameters": sizes[index],
                "state": "frozen" if index < model.num_frozen else "learns" if own else "empty",
                "rate_start": peaks[0] * first if peaks else 0.0,
                "rate_peak": peaks[0] if peaks else 0.0,
                "rates_peak": peaks,
                "weight_decay": decayed[0]["weight_decay"] if decayed else 0.0,
                "decayed": sum(p.numel() for group in decayed for p in group["params"]),
                "groups": len(own),
            }
        )
    return rows


def _totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parameters = sum(row["parameters"] for row in rows)
    learning = sum(row["parameters"] for row in rows if row["state"] == "learns")
    return {
        "parameters": parameters,
        "learning": learning,
        "learning_share": learning / parameters,
        "decayed": sum(row["decayed"] for row in rows),
        "groups": sum(row["groups"] for row in rows),
    }


def _memory(conf: Conf, memory: Memory, precision: str) -> dict[str, Any]:
    sizes = {f"{name}_bytes": size for name, size in dataclasses.asdict(memory).items()}
    words = {"batch_size": conf.data.batch_size, "precision": precision, "optimizer": f"optimizer ({conf.optim.name})"}
    return {**words, **sizes, "total_bytes": memory.total}


def _schedule(conf: Conf, steps: int) -> dict[str, Any]:
    """The head's rate at the turning points of the run."""
    from finetune.core.sched import lr_factor

    sched, units = recipe.timed_sched(conf.sched, steps), recipe.num_units(conf, steps)
    peak = recipe.peak_lr(conf)
    per_epoch = steps if conf.sched.interval == Interval.step else 1
    return {
        "mode": str(sched.mode),
        "interval": str(sched.interval),
        "epochs": conf.train.epochs,
        "steps": steps * conf.train.epochs,
        "units": units,
        "warmup": sched.warmup,
        "warmup_epochs": sched.warmup / per_epoch,
        "cycle": sched.cycle or units,
        "past_cycle": str(sched.past_cycle),
        "batch": recipe.effective_batch(conf),
        "lr_start": peak * lr_factor(0, sched, units),
        "lr_peak": peak,
        "lr_last": peak * lr_factor(units - 1, sched, units),
    }


def as_text(found: dict[str, Any]) -> str:
    """What a person reads; takes what `describe` gives."""
    model, totals, compute = found["model"], found["totals"], found["compute"]
    least = compute["pflop_run_kept"]
    kept = "" if least is None else f", {least:,.4g} where what the frozen layers give is kept"
    rows = [
        {
            "id": row["id"],
            "layer": row["layer"],
            "parameters": row["parameters"],
            "state": row["state"],
            "rate at start": row["rate_start"],
            "peak rate": row["rate_peak"],
            "weight decay": row["weight_decay"],
        }
        for row in found["layers"]
    ]
    lines = [
        f"{model['name']} (model={model['family']}), weights {model['pretrained']},"
        f" images of {model['image_size']} pixels a side; {found['assumed']}",
        "",
        table(rows, columns=list(rows[0])),
        "",
        f"parameters  {totals['parameters']:,}, of which {totals['learning']:,} learn"
        f" ({100 * totals['learning_share']:.3g} %) in {totals['groups']} groups;"
        f" weight decay reaches {totals['decayed']:,}",
        _memory_line(found["memory"]),
        f"compute     {compute['gflop_forward_image']:.4g} GFLOP an image forward,"
        f" {compute['gflop_training_image']:.4g} in training; {compute['pflop_run']:,.4g} PFLOP the run"
        + kept
        + "; the last block works for the class token only" * compute["class_token_only"],
        _schedule_line(found["schedule"]),
    ]
    return "\n".join([*lines, *([found["notice"]] if found["notice"] else [])])


def _memory_line(memory: dict[str, Any]) -> str:
    names = {"weights": "weights", "gradients": "gradients", "optimizer": memory["optimizer"]}
    names["average"] = "average of weights"
    unit, scale = ("GiB", GIB) if memory["total_bytes"] >= GIB else ("MiB", MIB)
    parts = [f"{word} {memory[f'{name}_bytes'] / scale:.4g}" for name, word in names.items() if memory[f"{name}_bytes"]]
    return (
        f"memory      {' + '.join(parts)} + activations {memory['activations_bytes'] / scale:.4g} ="
        f" {memory['total_bytes'] / scale:.4g} {unit} at {memory['batch_size']} images a micro-batch in"
        f" {memory['precision']}; a GPU needs 1 to 2 GiB beside it"
    )


def _schedule_line(schedule: dict[str, Any]) -> str:
    unit = schedule["interval"]
    warmup = ""
    if schedule["warmup"]:
        warmup = f", {schedule['warmup']:,} {unit}s of warmup"
        warmup += f" ({schedule['warmup_epochs']:.3g} epochs)" if unit == "step" else ""
    past = ""
    if schedule["cycle"] < schedule["units"]:
        past = f"; a cycle has {schedule['cycle']:,} {unit}s, then {schedule['past_cycle']}"
    return (
        f"schedule    {schedule['mode']} by {unit}: {schedule['epochs']} epochs, {schedule['steps']:,} steps of"
        f" {schedule['batch']:,} images{warmup}{past}; the head's rate {schedule['lr_start']:.3g} at the start,"
        f" {schedule['lr_peak']:.3g} at its peak, {schedule['lr_last']:.3g} in the last {unit}"
    )


def _draw(plan: dict[str, Any], path: Path) -> None:
    from finetune.report.figure import save_figure
    from finetune.report.rates_figure import rates_figure

    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot {path}: the folder {path.parent} does not exist")
    save_figure(rates_figure(plan, []), path)
