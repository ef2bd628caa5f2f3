"""Mistakes of people, apart from faults of the program."""

import contextlib
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake that a person can mend; its text says what happened, what was expected, and how to mend it.

    The commands show it as one line and end with exit code 1.
    """


class ConfigError(UserError):
    """All mistakes of a configuration, one line each; `code` is the exit code: 2 where the grammar is wrong."""

    def __init__(self, problems: Sequence[str], code: int = 1) -> None:
        """The text of the exception is the lines."""
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.code = code


# Shown as one line without a traceback: a mistake, a file that cannot be read or written, a run that diverged. All
# others, also a ValueError of torch or numpy, are faults of the program and shown as such.
EXPECTED_ERRORS = (UserError, OSError, FloatingPointError)

# What the system's loader says of a compiled library for which there is no memory.
_NO_ROOM = re.compile("failed to map segment|[Cc]annot allocate memory")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError name `path`: a full disk, unlike a missing file, raises one that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def fault_line(error: BaseException, how_to_see: str) -> str:
    """A fault of the program in one line: the error, the place in this package, and `how_to_see` its traceback."""
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and _NO_ROOM.search(str(error))):
        why = str(error) or "no more is free"
        return f"out of memory ({why}): lower data.batch_size, model.image_size or data.workers"
    package = Path(__file__).resolve().parent.parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    place = f" ({Path(own[-1].filename).relative_to(package.parent)}, line {own[-1].lineno})" if own else ""
    return f"finetune is at fault: {type(error).__name__}: {error}{place}; {how_to_see}"
