"""`finetune --help`, a page for a person, and `--help-all`, every setting with its default, meaning and range."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from finetune.commands import COMMANDS
from finetune.commands.flags import FLAGS, parse_command_line
from finetune.config.conf import range_in_words
from finetune.config.fields import show
from finetune.config.words.choices import builtin_folder, default_choices, folders, options, shown
from finetune.config.words.settings import SECTIONS, SETTINGS, Setting

WIDTH = 100
# The settings that `--help` shows.
HIGHLIGHTS = (
    *("train.epochs", "optim.lr", "optim.layer_decay", "optim.fix_layer", "optim.weight_decay"),
    *("sched.mode", "sched.warmup", "data.root", "data.batch_size", "seed"),
)
EXAMPLES = (
    ("fine-tune the bundled CLIP on handwritten digits", "model=clip sched.mode=cosine_pi"),
    ("your own images, one folder a class", 'model=vit data=folder data.root="~/my photos"'),
    ("a sweep: nine runs, then one table", "-m optim.layer_decay=0.65,0.75,0.85 seed=0,1,2"),
)


def main(words: Sequence[str]) -> int:
    """Print the short page, or every setting for `all` or `--help-all`; the exit code, 0."""
    line = parse_command_line(words)
    is_all = "--help-all" in line.flags or "all" in line.overrides
    print(all_settings() if is_all else help_page(folders(line.config_dir)))
    return 0


def help_page(searched: Sequence[Path]) -> str:
    """The page of `--help`; choices that are not built in are marked, with the folders `searched`."""
    lines = [
        "finetune: fine-tune CLIP or a ViT on a folder of images, with every learning rate accounted for.",
        "",
        "Usage: finetune [COMMAND] [FLAG ...] [GROUP=CHOICE ...] [KEY=VALUE ...]      (or: python -m finetune ...)",
        "",
        "Commands (finetune COMMAND --help says more):",
        *(f"  {name:<13}{meaning}" for name, meaning in COMMANDS.items()),
        "",
        "Groups and their choices (the default first):",
        *_groups(searched),
        "",
        "Ten settings that matter (default; meaning):",
        *(line for name in HIGHLIGHTS for line in _wrapped(SETTINGS[name], SETTINGS[name].meaning)),
        f"All {len(SETTINGS)} settings with their ranges: finetune --help-all. With their values: finetune --cfg job.",
        "",
        "Examples:",
        *(line for meaning, words in EXAMPLES for line in (f"  # {meaning}", f"  finetune {words}")),
        "",
        "Flags (they may stand anywhere):",
        *(f"  {', '.join(reversed(flag.names)) + ' ' + flag.value:<26}{flag.help}" for flag in FLAGS if flag.help),
        "",
        'Completion of groups, choices and settings with <TAB>:  eval "$(finetune -sc install=bash)"',
        "Your own yaml files: ./conf/GROUP/NAME.yaml where the command is run (or --config-dir DIR), then GROUP=NAME.",
        "Runs go to outputs/<date>/<time>/ or hydra.run.dir=PATH, sweeps to outputs/sweeps/<date>/<time>/<job>/.",
    ]
    return "\n".join(lines)


def all_settings() -> str:
    """The page of `--help-all`: a heading for every section, then its settings."""
    lines = [f"Every setting: KEY=DEFAULT, its meaning, and in brackets its range or words. {len(SETTINGS)} in all."]
    for section in ("", *SECTIONS):
        lines += ["", section or "the run as a whole", "-" * len(section or "the run as a whole")]
        for setting in SETTINGS.values():
            if setting.name.rpartition(".")[0] == section:
                allowed = range_in_words(setting.field.metadata) or ", ".join(setting.words)
                lines += _wrapped(setting, setting.meaning + (f" [{allowed}]" if allowed else ""))
    return "\n".join(lines)


def _groups(searched: Sequence[Path]) -> list[str]:
    lines: list[str] = []
    for group, default in default_choices(searched).items():
        found = options(searched, group)
        names = sorted(found, key=lambda name: name != default)  # the default first, the others as they are
        marked = [name if found[name].parent.parent == builtin_folder() else f"{name}*" for name in names]
        lines += textwrap.wrap(f"  {group + '=':<13}{', '.join(marked)}", WIDTH, subsequent_indent=" " * 15)
    if any("*" in line for line in lines):
        lines.append(f"  * from {', '.join(shown(folder) for folder in searched if folder != builtin_folder())}")
    return lines


def _wrapped(setting: Setting, text: str) -> list[str]:
    """`key=default` and a text beside it, in lines of at most WIDTH letters."""
    start = f"  {f'{setting.name}={show(setting.shown)}':<26}"
    start += " " * (not start.endswith(" "))
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * 28, break_long_words=False)
