"""The entry, `finetune` and `python -m finetune`: the first word may name a command; without one it trains."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from finetune.commands import COMMANDS
from finetune.config import nearest
from finetune.system.terminal import complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 1 where something failed; 2 for an unusable command line; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = "train"
    if words and words[0] in COMMANDS:
        name = words.pop(0)
    elif words and words[0].isidentifier():
        complain(f"{words[0]}: no such command, expected one of {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)}")
        return 2
    # Only the command's own module: `finetune report` needs no torch, `finetune --help` nothing at all.
    command = importlib.import_module(f"finetune.commands.{name}")
    return int(command.main(words))


if __name__ == "__main__":
    sys.exit(main())
