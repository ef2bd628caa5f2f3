"""Look at the data before training: `finetune check data=folder data.root=PATH`.

Takes the same settings as `finetune`. Decodes every image, prints what there is and what is wrong, and draws training
images exactly as the model will see them. Leaves `data.txt`, `contact_sheet.png` and, where there is something to
list, `unreadable.txt` and `duplicates.txt` in `outputs/<date>/<time>/` or `hydra.run.dir`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import Conf, OnError
from finetune.config.words import parse_command_line
from finetune.runs.folders import run_folder
from finetune.system.files import write_text
from finetune.system.log import say
from finetune.system.terminal import printable

if TYPE_CHECKING:
    from finetune.data import Source
    from finetune.data.checks.examine import Bad

USAGE = """usage: finetune check [GROUP=CHOICE ...] [KEY=VALUE ...]

Decodes every image of data=... and says what is there and what is wrong with it; takes the same settings as finetune,
such as data=folder data.root=PATH augment=clip. Exit code 1 where images cannot be read and data.on_error=stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 1 for images that cannot be read.
    """
    line = parse_command_line(sys.argv[1:] if argv is None else argv)
    if "--help" in line.flags:
        print(USAGE)
        return 0
    if line.multirun:
        line.problems.append("--multirun: one set of data at a time")
    from finetune.config.words.composition import read_settings

    prepared = read_settings(line)
    with run_folder(prepared.run_dir, multirun=False) as folder:
        return check(prepared.conf, folder)


def check(conf: Conf, folder: Path) -> int:
    """Look at the data of `conf`, print what was found, and leave it in `folder`; the exit code.

    Raises:
        ValueError: The data or the model cannot be opened.
    """
    from finetune.data import open_source
    from finetune.data.checks.examine import examine
    from finetune.data.checks.start import duplicate_lines
    from finetune.data.checks.summary import summary
    from finetune.data.checks.verdicts import Verdicts

    source = open_source(conf.data)
    findings = examine(source, Verdicts(conf.data.cache_dir, source.location))
    text = summary(source, findings)
    write_text(folder / "data.txt", text.encode("utf-8", "backslashreplace").decode() + "\n")
    say(text)
    _list(
        "images are the same to the last byte in several splits or classes", duplicate_lines(source, findings), folder
    )
    bad = [f"{item.name}\t{item.split}\t{item.reason}" for item in findings.bad]
    _list("images cannot be read", bad, folder, file="unreadable.txt", shown=len(bad))
    _draw(conf, _readable(source, findings.bad), folder)
    say(f"all of it: {folder}")
    return 1 if findings.bad and conf.data.on_error == OnError.stop else 0


def _list(what: str, lines: Sequence[str], folder: Path, *, file: str = "duplicates.txt", shown: int = 20) -> None:
    """Say how many there are, show the first and write all down."""
    if not lines:
        return
    safe = [printable(line, keep="\t") for line in lines]
    write_text(folder / file, "".join(f"{line}\n" for line in safe))
    say(f"\n{len(lines):,} {what} ({folder / file}):")
    for line in safe[:shown]:
        say(f"  {line}")
    if len(lines) > shown:
        say(f"  ... and {len(lines) - shown:,} more")


def _readable(source: Source, bad: Sequence[Bad]) -> Source:
    """The source without what cannot be read."""
    return source.without({name: [item.index for item in bad if item.split == name] for name in source.splits})


def _draw(conf: Conf, source: Source, folder: Path) -> None:
    """The contact sheet: the first images of the first epoch, by the model's own preprocessing."""
    from finetune.data.checks.contact_sheet import write_contact_sheet
    from finetune.models import build_model

    preprocess = build_model(conf.model, source.classes).preprocess
    write_contact_sheet(folder / "contact_sheet.png", source, preprocess, conf)
    say(f"\n{folder / 'contact_sheet.png'}: training images as {conf.model.name} will see them")
