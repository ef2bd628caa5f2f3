"""The folders of runs and sweeps: a new one for each, also for those that start in the same instant."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

OUTPUTS = Path("outputs")


def new_folder(*, multirun: bool, now: datetime | None = None) -> Path:
    """Make `outputs/<date>/<time>/` (a sweep: `outputs/sweeps/<date>/<time>/`), time with microseconds.

    If the folder exists it takes the next microsecond, so that runs which a script starts at once do not share one.

    Raises:
        OSError: The folder cannot be made; says why in one line.
    """
    when = datetime.now() if now is None else now
    base = OUTPUTS / "sweeps" if multirun else OUTPUTS
    while True:
        folder = base / when.strftime("%Y-%m-%d") / when.strftime("%H-%M-%S-%f")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise _unusable(folder, "a file is in its way") from None
            when += timedelta(microseconds=1)
        except OSError as error:
            raise _unusable(folder, error.strerror or type(error).__name__) from None


def usable_folder(folder: Path) -> Path:
    """Make the folder that a person named, or check that files can be written there; the folder.

    Raises:
        OSError: They cannot; says why in one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise _unusable(folder, "a file is in its way") from None
    except OSError as error:
        raise _unusable(folder, error.strerror or type(error).__name__) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "it may not be written")
    return folder


def _unusable(folder: Path, reason: str) -> OSError:
    elsewhere = "give another place with hydra.run.dir=PATH (a sweep: hydra.sweep.dir=PATH)"
    return OSError(f"cannot write to {folder}: {reason}; {elsewhere}")


@contextmanager
def run_folder(given: Path | None, *, multirun: bool) -> Iterator[Path]:
    """The folder of a run or sweep: the one that a person named, or a new one, which is removed if it stays empty.

    Raises:
        OSError: The folder cannot be written; says why in one line.
    """
    if given is not None:
        yield usable_folder(given)
        return
    folder = new_folder(multirun=multirun)
    try:
        yield folder
    finally:
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not empty
                empty.rmdir()


JOBS = "jobs.jsonl"


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
        with contextlib.suppress(OSError), open(self.sweep / JOBS, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # the first line break ends the torn line of a killed process


def record_failure(folder: Path, overrides: list[str], error: Exception) -> None:
    """Write `result.json` and `run.log` for a run that failed before it wrote its own; replaces no file."""
    result = {"status": "failed", "error": str(error) or type(error).__name__, "overrides": overrides}
    trace = "".join(traceback.format_exception(error))
    for name, text in (("result.json", json.dumps(result, indent=1, ensure_ascii=False)), ("run.log", trace)):
        # The disk may be full, or the folder may be missing.
        with contextlib.suppress(OSError), open(folder / name, "x", encoding="utf-8") as file:
            file.write(text + "\n")
