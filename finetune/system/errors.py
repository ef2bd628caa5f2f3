"""Mistakes of people, apart from faults of the program."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Something that the person at the keyboard can mend; its text says what happened, what was expected, and how.

    The commands show it as one line and end with exit code 1. Any other exception is a fault of the program, and is
    shown as one, with the place of its traceback.
    """


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line a problem.

    Attributes:
        problems: The lines.
        code: What the process exits with: 1, or 2 where the command line itself cannot be read.
    """

    def __init__(self, problems: Sequence[str], code: int = 1) -> None:
        """Keep the lines and the exit code; the text of the exception is the lines."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.code = code


# Shown as one line without a traceback: a mistake, a file that cannot be read or written, a run that diverged. A
# ValueError of torch or numpy is none of them.
EXPECTED_ERRORS = (UserError, OSError, FloatingPointError)


def fault_line(error: BaseException, how_to_see: str) -> str:
    """A fault of the program in one line: the error, the line of ours that it came from, and where its traceback is.

    Args:
        error: Was raised.
        how_to_see: Where the traceback is, or how to get it.
    """
    package = Path(__file__).resolve().parent.parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    place = f" ({Path(own[-1].filename).relative_to(package.parent)}, line {own[-1].lineno})" if own else ""
    return f"finetune is at fault: {type(error).__name__}: {error}{place}; {how_to_see}"
