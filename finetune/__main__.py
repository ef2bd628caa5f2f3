"""The entry, `finetune` and `python -m finetune`: the first word may name a command; without one it trains.

Here an exception becomes an exit code and a line on stderr.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from finetune.commands import COMMANDS
from finetune.config import nearest
from finetune.system.errors import EXPECTED_ERRORS, ConfigError, fault_line
from finetune.system.signals import exit_codes
from finetune.system.terminal import complain, open_closed_streams

SHOW_TRACEBACK = "FINETUNE_TRACEBACK"  # environment variable: 1 prints the traceback of a fault


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0; 1 after a failure; 2 for an unusable command line; 130 after Ctrl-C."""
    open_closed_streams()
    try:
        with exit_codes():
            return _run_command(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        for problem in error.problems:
            complain(problem)
        return error.code
    except BrokenPipeError:  # `finetune --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED_ERRORS as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C")
        return 130
    except Exception as error:
        if os.environ.get(SHOW_TRACEBACK) == "1":
            traceback.print_exc()
        complain(fault_line(error, f"{SHOW_TRACEBACK}=1 in front of the command prints the traceback"))
        return 1


def _run_command(words: list[str]) -> int:
    """Run the command that the first word names, or `train`; its exit code."""
    name = "train"
    if words and words[0] in COMMANDS:
        name = words.pop(0)
    elif words and words[0].isidentifier():
        complain(
            f"{words[0]}: no such command, expected one of {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)};"
            " a setting is written KEY=VALUE"
        )
        return 2
    # Only the command's own module is imported: `finetune report` needs no torch, `finetune --help` nothing at all.
    command = importlib.import_module(f"finetune.commands.{name}")
    return int(command.main(words))


if __name__ == "__main__":
    sys.exit(main())
