"""`finetune check`: decode every image, print counts and faults, and draw training images as the model will see them.

It leaves `data.txt`, `contact_sheet.png` and, where there is something to list, `unreadable.txt`, `duplicates.txt` and
`similar.txt` in `outputs/<date>/<time>/` or `hydra.run.dir`.
"""

from collections.abc import Sequence

from finetune.commands.flags import configure, parse_command_line
from finetune.config import OnError
from finetune.runs.folders import run_folder
from finetune.system.locks import working_in
from finetune.system.log import say
from finetune.system.ours import FolderKind, claim

USAGE = """usage: finetune check [GROUP=CHOICE ...] [KEY=VALUE ...]

Decodes every image of data=... and prints counts and faults; takes the same settings as finetune, such as data=folder
data.root=PATH augment=clip. Exit code 1 where images cannot be read and data.on_error=stop."""


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code is 1 for images that cannot be read."""
    line = parse_command_line(words)
    if "--help" in line.flags:
        print(USAGE)
        return 0
    if line.multirun:
        line.problems.append("--multirun: one set of data at a time")
    prepared = configure(line)
    # Only now: these rooms import torch.
    from finetune.core.preprocess import as_asked
    from finetune.data import open_source
    from finetune.data.checks.contact_sheet import write_contact_sheet
    from finetune.data.checks.summary import check_source
    from finetune.models import build_model

    conf = prepared.conf
    with run_folder(prepared.run_dir, multirun=False) as folder:
        claim(folder, FolderKind.check)
        with working_in(folder, FolderKind.check):
            source = open_source(conf.data)
            report, text = check_source(source, conf.data.cache_dir, folder)
            say(text)
            # Only how its images are made counts here, and the prompts of a thousand classes would take minutes.
            built = build_model(conf.model, source.classes, reads_names=False)
            preprocess = as_asked(built.preprocess, conf.data)
            readable = source.without(report.unreadable)
            sheet = folder / "contact_sheet.png"
            write_contact_sheet(sheet, readable, preprocess, data=conf.data, augment=conf.augment, seed=conf.seed)
            say(f"\n{sheet}: training images as {conf.model.name} will see them")
            say(f"all of it: {folder}")
        return 1 if report.unreadable and conf.data.on_error == OnError.stop else 0
