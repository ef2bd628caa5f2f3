"""`finetune describe`: prints layers, rates, memory and work of a run before it starts. It loads no weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.commands.flags import Parser, configure, parse_command_line
from finetune.config import Conf, nearest
from finetune.report.columns import state_in_words
from finetune.system.errors import ConfigError
from finetune.system.files import json_text
from finetune.system.limits import in_bytes
from finetune.system.log import say
from finetune.system.ours import refuse_unless
from finetune.system.tables import table
from finetune.system.terminal import counted

HELP = """\
Every layer with its rate, memory, work and schedule, before a run starts. Nothing is loaded or trained.

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

FLAGS = ("--json", "--plot", "--classes", "--images", "--config-dir", "--help")
# Headings of the table of layers, and the keys of `describe`'s rows.
COLUMNS = {"id": "id", "layer": "layer", "parameters": "parameters", "state": "state"}
COLUMNS |= {"rate at start": "rate_start", "peak rate": "rate_peak", "weight decay": "weight_decay"}


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code, 0."""
    if {"--help", "-h"} & set(words):
        print(HELP)
        return 0
    flags, rest = take_flags(words)
    conf = _conf(rest)
    from finetune.app.description import describe  # only now: it imports torch

    found, plan = describe(conf, num_classes=flags.classes, num_images=flags.images)
    if flags.plot is not None:
        from finetune.report.look import save_figure
        from finetune.report.rates_figure import rates_figure

        if not flags.plot.parent.is_dir():
            raise FileNotFoundError(f"--plot {flags.plot}: the folder {flags.plot.parent} does not exist")
        refuse_unless("replaced", flags.plot)
        save_figure(rates_figure(plan, []), flags.plot)
    say(json_text(found, indent=2) if flags.json else as_text(found))
    return 0


def take_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns this command's own flags (`json`, `plot`, `classes`, `images`), and all other words in their order."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=lambda text: Path(text).expanduser())
    for name in ("--classes", "--images"):
        parser.add_argument(name, type=_count)
    flags, rest = parser.parse_known_args(list(words))
    if flags.plot is not None and "=" in str(flags.plot) and "--plot" in words:  # most likely the next setting
        parser.error(f"--plot {flags.plot}: expected a file (a name that holds a = is written --plot=NAME)")
    return flags, rest


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 1 to 999,999,999")
    return int(text)


def _conf(words: Sequence[str]) -> Conf:
    """Reads the settings as `finetune train` would; a flag of another command is a ConfigError."""
    line = parse_command_line(words)
    foreign = [name for name in line.flags if name != "--config-dir"]
    foreign += [word for word in words if any(problem.startswith(f"{word}: no such flag") for problem in line.problems)]
    if foreign:
        known = f"finetune describe has the flags {', '.join(FLAGS)}{nearest(foreign[0], FLAGS)}"
        raise ConfigError([f"{foreign[0]}: {known}"], code=2)
    return configure(line).conf


def as_text(found: dict[str, Any]) -> str:
    """Formats the first value that `app.description.describe` returns as lines for a terminal."""
    model, totals, compute = found["model"], found["totals"], found["compute"]
    least = compute["pflop_run_kept"]
    cached = "" if least is None else f", {least:,.4g} with the activations of the frozen layers cached"
    rows = [
        {**{title: row[key] for title, key in COLUMNS.items()}, "state": state_in_words(row)} for row in found["layers"]
    ]
    lines = [
        f"{model['name']} (model={model['family']}), weights {model['pretrained']},"
        f" images of {model['image_size']} pixels a side; {found['assumed']}",
        *found["chosen"],
        f"\n{table(rows, columns=list(COLUMNS))}\n",
        f"parameters  {totals['parameters']:,}, of which {totals['learning']:,} learn"
        f" ({100 * totals['learning_share']:.3g} %) in {counted(totals['groups'], 'group')};"
        f" weight decay reaches {totals['decayed']:,}",
        _memory_line(found["memory"]),
        f"compute     {compute['gflop_forward_image']:.4g} GFLOP an image forward,"
        f" {compute['gflop_training_image']:.4g} in training; {compute['pflop_run']:,.4g} PFLOP the run"
        + cached
        + "; the last block works for the class token only" * compute["class_token_only"],
        _schedule_line(found["schedule"]),
    ]
    return "\n".join([*lines, *([found["notice"]] if found["notice"] else [])])


def _memory_line(memory: dict[str, Any]) -> str:
    names = {"weights": "weights", "gradients": "gradients", "optimizer": memory["optimizer"]}
    names["average"] = "average of weights"
    sizes = {name: in_bytes(memory[f"{name}_bytes"]) for name in (*names, "activations", "total")}
    parts = [f"{word} {sizes[name]}" for name, word in names.items() if memory[f"{name}_bytes"]]
    return (
        f"memory      {' + '.join(parts)} + activations {sizes['activations']} = {sizes['total']} at"
        f" {counted(memory['batch_size'], 'image')} a micro-batch in {memory['precision']};"
        " a GPU needs 1 to 2 GiB beside it"
    )


def _schedule_line(schedule: dict[str, Any]) -> str:
    unit = schedule["interval"]
    warmup = f", {counted(schedule['warmup'], unit)} of warmup" if schedule["warmup"] else ""
    if warmup and unit == "step":
        warmup += f" ({schedule['warmup_epochs']:.3g} epochs)"
    past = ""
    if schedule["cycle"] < schedule["units"]:
        past = f"; a cycle has {counted(schedule['cycle'], unit)}, then {schedule['past_cycle']}"
    epochs, steps = counted(schedule["epochs"], "epoch"), counted(schedule["steps"], "step")
    return (
        f"schedule    {schedule['mode']} by {unit}: {epochs}, {steps} of {counted(schedule['batch'], 'image')}"
        f"{warmup}{past}; the head's rate {schedule['lr_start']:.3g} at the start,"
        f" {schedule['lr_peak']:.3g} at its peak, {schedule['lr_last']:.3g} in the last {unit}"
    )
