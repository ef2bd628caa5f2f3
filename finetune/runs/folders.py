"""The folders of runs and sweeps: a new one for each, also for those that start in the same instant."""

import contextlib
import errno
import json
import os
import textwrap
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from finetune.system.files import json_text
from finetune.system.ours import MARKER, FolderKind, RefusedError, claim, open_own
from finetune.system.terminal import printable, without_secrets

OUTPUTS, JOBS = Path("outputs"), "jobs.jsonl"


def new_folder(*, multirun: bool, now: datetime | None = None) -> Path:
    """Make `outputs/<date>/<time>/` (a sweep: `outputs/sweeps/<date>/<time>/`), time with microseconds.

    If the folder exists it takes the next microsecond, so that runs which a script starts at once do not share one.
    """
    when = now or datetime.now()
    base = OUTPUTS / "sweeps" if multirun else OUTPUTS
    while True:
        folder = base / when.strftime("%Y-%m-%d") / when.strftime("%H-%M-%S-%f")
        with _explained(folder):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
                return folder
            except FileExistsError:
                if not folder.is_dir():
                    raise
        when += timedelta(microseconds=1)


def usable_folder(folder: Path) -> Path:
    """The folder that a person named, made if it is not there; an OSError if files cannot be written there.

    Where it cannot be made, none of the folders above it is made either.
    """
    with _explained(folder):
        chain = (folder.absolute(), *folder.absolute().parents)
        there = next(path for path in chain if os.path.lexists(path))
        if not there.is_dir():
            raise FileExistsError(errno.EEXIST, "a file is in its way", str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it may not be written")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # such as a name that is too long, below folders that were made already
            for path in chain[: chain.index(there)]:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
    return folder


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn an OSError into one that says in one line why `folder` cannot be used, and how to name another."""
    elsewhere = "give another place with hydra.run.dir=PATH (a sweep: hydra.sweep.dir=PATH)"
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError)
        reason = "a file is in its way" if is_file else error.strerror or type(error).__name__
        raise OSError(f"cannot write to {folder}: {reason}; {elsewhere}") from None


@contextmanager
def run_folder(given: Path | None, *, multirun: bool) -> Iterator[Path]:
    """The folder of a run or sweep: the one that a person named, or a new one, which is removed if it stays empty."""
    folder = new_folder(multirun=multirun) if given is None else usable_folder(given)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            if given is None:
                if [path.name for path in folder.iterdir()] == [MARKER]:
                    (folder / MARKER).unlink()
                folder.rmdir()
                folder.parent.rmdir()


class SweepRecord:
    """`jobs.jsonl` in a sweep's folder: the jobs that began, and those that were refused their folder.

    Several processes may write to it at once, a line each. A line that cannot be written does not end a job: without
    it only the sweep's summary knows less.
    """

    def __init__(self, sweep: Path) -> None:
        """Name the sweep's folder; nothing is written yet."""
        self.sweep = sweep

    def start(self) -> None:
        """Note that a sweep begins; jobs that an earlier sweep in the folder was refused no longer count."""
        self._append({"start": datetime.now().isoformat(timespec="seconds")})

    def begin_job(self, folder: Path) -> str:
        """Note that a job begins in `folder`; the job's id, for `refuse_job`."""
        ident = f"{os.getpid()}-{time.time_ns()}"
        self._append({"id": ident, "job": os.path.relpath(os.path.abspath(folder), self.sweep)})
        return ident

    def refuse_job(self, ident: str, reason: str) -> None:
        """Note that a job did not run, since its folder holds another run."""
        self._append({"id": ident, "refused": reason})

    def _append(self, entry: dict[str, object]) -> None:
        with contextlib.suppress(OSError), open_own(self.sweep / JOBS, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # the first line break ends the torn line of a killed process


def where_traceback(folder: Path, error: Exception) -> str:
    """Where the traceback of a fault is: in `run.log`, unless that could not be written."""
    log = folder / "run.log"
    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0][:80]
    with contextlib.suppress(OSError), open_own(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2**20))
        if printable(last).encode("utf-8", "backslashreplace") in file.read():
            return f"the traceback is in {log}"
    return f"its traceback could not be written to {log}"


def record_failure(folder: Path, overrides: list[str], error: Exception) -> None:
    """Write `result.json` and `run.log` for a run that failed before it wrote its own; replaces no file.

    Writes nothing into a folder with files that are not ours.
    """
    result = {"status": "failed", "error": without_secrets(str(error)) or type(error).__name__, "overrides": overrides}
    trace = without_secrets("".join(traceback.format_exception(error)))
    trace = printable(textwrap.indent(trace, "    "), keep="\n\t")
    # The disk may be full, or the folder may be missing.
    with contextlib.suppress(OSError, RefusedError):
        claim(folder, FolderKind.run)
        for name, text in (("result.json", json_text(result, indent=1)), ("run.log", trace)):
            with contextlib.suppress(FileExistsError), open_own(folder / name, "x", encoding="utf-8") as file:
                file.write(text + "\n")
