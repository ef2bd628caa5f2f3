"""What a run tells a person: lines on the console and in `run.log`."""

import contextlib
import logging
import os
import sys
import textwrap
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.system.ours import open_own
from finetune.system.progress import close_bars, open_bars
from finetune.system.terminal import printable

LOGGER = logging.getLogger("finetune")

_state_before: dict[str, Any] = {}  # the logger's level and propagation before `start_log`


def say(text: str) -> None:
    """Print lines to stdout, above the progress bars; control characters, and letters the console lacks, are escaped.

    Once the reader has gone away (`| head`), later lines are dropped without an error: the run goes on.
    """
    text = printable(text, keep="\n\t")
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if open_bars:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python's manual: without this, the interpreter's last flush fails too, with exit code 120.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class _Console(logging.Handler):
    """Prints lines without time and traceback; a warning or an error starts with that word."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            close_bars()  # the bar of an epoch that broke must not stay under its error
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(prefix + record.getMessage())


class _File(logging.FileHandler):
    """Appends to `run.log`."""

    def _open(self) -> TextIOWrapper:
        file: TextIOWrapper = open_own(Path(self.baseFilename), self.mode, encoding=self.encoding, errors=self.errors)
        return file

    def close(self) -> None:
        """Close the file; on a full disk the last lines are lost, and no error hides the one that ended the run."""
        with contextlib.suppress(OSError):
            super().close()


class _FileFormatter(logging.Formatter):
    """Time, level, message and traceback, with control characters escaped."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        """The traceback, indented: a line break in the error's message must not forge a line of the log."""
        return textwrap.indent(super().formatException(ei), "    ")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def start_log(run_dir: Path, *, quiet: bool = False) -> None:
    """Send the logger `finetune` to the end of `run.log` in `run_dir` and, if not `quiet`, to the console.

    `stop_log` removes these handlers: the jobs of a sweep share a process, and each has a `run.log` of its own.

    Raises:
        OSError: `run.log` cannot be written.
        RefusedError: It is a link or no file.
    """
    stop_log()
    file = _File(run_dir / "run.log", encoding="utf-8", errors="backslashreplace")
    file.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: no stack trace for every line
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
    _state_before.update(level=LOGGER.level, propagate=LOGGER.propagate)
    LOGGER.addHandler(file)
    if not quiet:
        LOGGER.addHandler(_Console(logging.INFO))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False  # Hydra puts handlers on the root logger, which would print every line again


def stop_log() -> None:
    """Close what `start_log` opened, and every progress bar that an error left open; may be called twice."""
    close_bars()
    if not _state_before:
        return
    for handler in list(LOGGER.handlers):
        if isinstance(handler, (_Console, _File)):
            LOGGER.removeHandler(handler)
            handler.close()
    LOGGER.setLevel(_state_before["level"])
    LOGGER.propagate = _state_before["propagate"]
    _state_before.clear()
