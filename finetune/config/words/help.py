"""The page behind `--help`, for a person: what can be chosen, what is worth changing, and how to write it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from finetune.config.words.check import Reader
from finetune.config.words.commandline import FLAGS
from finetune.config.words.settings import SETTINGS, show
from finetune.config.words.yamlfiles import builtin_folder, options, shown

WIDTH = 100
SHOWN = (
    "train.epochs",
    "optim.lr",
    "optim.layer_decay",
    "optim.fix_layer",
    "optim.weight_decay",
    "sched.mode",
    "sched.warmup",
    "data.root",
    "data.batch_size",
    "seed",
)
EXAMPLES = (
    ("fine-tune the bundled CLIP on handwritten digits", "model=clip sched.mode=cosine_pi"),
    ("your own images, one folder a class", "model=vit data=folder data.root=~/my photos"),
    ("a sweep: nine runs, then one table", "-m optim.layer_decay=0.65,0.75,0.85 seed=0,1,2"),
)


def help_page(searched: Sequence[Path]) -> str:
    """The whole page.

    Args:
        searched: The folders of yaml files; choices of the user's own are marked.

    Raises:
        FileNotFoundError: The built-in configuration is missing.
    """
    reader = Reader(searched)
    lines = [
        "finetune: fine-tune CLIP or a ViT on a folder of images, with every learning rate accounted for.",
        "",
        "Usage: finetune [FLAG ...] [GROUP=CHOICE ...] [KEY=VALUE ...]      (or: python -m finetune ...)",
        "",
        "Groups and their choices (the default first):",
        *_groups(reader),
        "",
        "Ten settings that matter (default; meaning):",
        *_settings(),
        f"All {len(SETTINGS)} settings with their values: finetune --cfg job. Ranges and meanings: finetune/config.py.",
        "",
        "Examples:",
        *(line for what, words in EXAMPLES for line in (f"  # {what}", f"  finetune {_typed(words)}")),
        "",
        "Flags (they may stand anywhere):",
        *(f"  {_flag_names(flag.names, flag.value):<26}{flag.help}" for flag in FLAGS if flag.help),
        "",
        'Completion of groups, choices and settings with <TAB>:  eval "$(finetune -sc install=bash)"',
        "Your own yaml files: ./conf/GROUP/NAME.yaml where the command is run (or --config-dir DIR), then GROUP=NAME.",
        "Runs go to outputs/<date>/<time>/ or hydra.run.dir=PATH, sweeps to outputs/sweeps/<date>/<time>/<job>/.",
    ]
    return "\n".join(lines)


def _groups(reader: Reader) -> list[str]:
    lines, own = [], False
    for group in reader.groups:
        found = options(reader.searched, group)
        names = sorted(found, key=lambda name, group=group: name not in reader.defaults[group])  # type: ignore[misc]
        marked = [name if found[name].parent.parent == builtin_folder() else f"{name}*" for name in names]
        own = own or any(name.endswith("*") for name in marked)
        lines += textwrap.wrap(f"  {group + '=':<13}{', '.join(marked)}", WIDTH, subsequent_indent=" " * 15)
    if own:
        places = [shown(folder) for folder in reader.searched if folder != builtin_folder()]
        lines.append(f"  * from {', '.join(places)}")
    return lines


def _settings() -> list[str]:
    lines = []
    for name in SHOWN:
        start = f"  {f'{name}={show(SETTINGS[name].default)}':<26}"
        lines += textwrap.wrap(SETTINGS[name].meaning, WIDTH, initial_indent=start, subsequent_indent=" " * 28)
    return lines


def _typed(words: str) -> str:
    """An example as a shell wants it: a value with a space in quotes."""
    return words.replace("data.root=~/my photos", 'data.root="~/my photos"')


def _flag_names(names: Sequence[str], value: str) -> str:
    shown_names = ", ".join(reversed(names))
    return f"{shown_names} {value}" if value else shown_names
