"""A new folder for every run and every sweep: never two in one, also when they start in the same instant."""

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

    Made exclusively: where it is there already, the next microsecond is taken. A folder named by the second was shared
    by all the runs that a script started at once, and the last one's files won.

    Raises:
        OSError: It cannot be made; says why in one line.
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


def claim_folder(folder: Path) -> Path:
    """Make the folder that a person named, or see that it can be written.

    Raises:
        OSError: It cannot; says why in one line.
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
    """The folder of a run or sweep: the one that a person named, or a new one, taken away again if it stays empty.

    Raises:
        OSError: It cannot be written; says why in one line.
    """
    if given is not None:
        yield claim_folder(given)
        return
    folder = new_folder(multirun=multirun)
    try:
        yield folder
    finally:
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not empty
                empty.rmdir()


JOBS = "jobs.jsonl"  # in a sweep's folder: every job that was begun, where, and whether it was refused its folder


def record_start(sweep: Path) -> None:
    """Note that a sweep begins: what was refused before may be run now, or is not asked for any more."""
    _append(sweep / JOBS, {"start": datetime.now().isoformat(timespec="seconds")})


def record_job(sweep: Path, folder: Path) -> str:
    """Note beside a sweep's jobs that one of them begins; by lines, since several processes may write at once.

    Args:
        sweep: Its folder.
        folder: The job's.

    Returns:
        What `record_refusal` knows the job by.
    """
    ident = f"{os.getpid()}-{time.time_ns()}"
    name = os.path.relpath(os.path.abspath(folder), sweep)
    _append(sweep / JOBS, {"id": ident, "job": name})
    return ident


def record_refusal(sweep: Path, ident: str, reason: str) -> None:
    """Note that a job was not run, since the run in its folder is another one's."""
    _append(sweep / JOBS, {"id": ident, "refused": reason})


def _append(path: Path, entry: dict[str, object]) -> None:
    """A line more; without it the summary knows less, which is no reason to end a job."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(entry) + "\n")  # whatever a killed process has left of its own line


def record_failure(folder: Path, overrides: list[str], error: Exception) -> None:
    """Leave `result.json` and `run.log` of a job that failed before it could write its own; never over others."""
    result = {"status": "failed", "error": str(error) or type(error).__name__, "overrides": overrides}
    trace = "".join(traceback.format_exception(error))
    for name, text in (("result.json", json.dumps(result, indent=1, ensure_ascii=False)), ("run.log", trace)):
        # The folder itself may be what failed: a file in its place, a full disk.
        with contextlib.suppress(OSError), open(folder / name, "x", encoding="utf-8") as file:
            file.write(text + "\n")
