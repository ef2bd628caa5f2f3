"""Many runs, one answer: the table, `summary.csv` and `sweep.png` of a sweep, and which setting won on validation.

No torch: a finished sweep can be summed up on any machine, also one in which jobs failed.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.figure import number, read_json, save_figure
from finetune.files import write_text
from finetune.log import say, table
from finetune.sweep_figure import Score, sweep_figure
from finetune.terminal import command, printable

SCORES = ("zeroshot/top1", "val/top1", "test/top1")
# Longest error shown on the console; `run.log` of the job has it all.
ERROR_CHARS = 300


@dataclass(frozen=True)
class Job:
    """One run of a sweep, as far as its folder tells.

    Attributes:
        folder: `<sweep>/<number>`.
        status: finished, failed, diverged or interrupted.
        words: Its overrides as typed.
        overrides: The same by key.
        scores: zeroshot/top1, val/top1 (best) and test/top1; NaN for what is not known.
        epochs: Finished epochs; NaN for not known.
        seconds: Of training; NaN for not known.
        error: Why it did not finish, in one line; empty where it did.
    """

    folder: Path
    status: str
    words: list[str]
    overrides: dict[str, str]
    scores: dict[str, float]
    epochs: float
    seconds: float
    error: str

    @property
    def is_finished(self) -> bool:
        """Whether its scores count."""
        return self.status == "finished"


@dataclass(frozen=True)
class Setting:
    """Finished jobs that differ in nothing but their seed.

    Attributes:
        overrides: What the sweep varied, without the seed.
        jobs: At least one.
    """

    overrides: dict[str, str]
    jobs: list[Job]

    def mean(self, score: str) -> float:
        """Mean over the jobs that have this score; NaN where none has."""
        values = self._values(score)
        return statistics.fmean(values) if values else math.nan

    def std(self, score: str) -> float | None:
        """Sample standard deviation (n - 1) over the jobs that have this score; None for fewer than two."""
        values = self._values(score)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, score: str) -> list[float]:
        return [job.scores[score] for job in self.jobs if math.isfinite(job.scores[score])]

    @property
    def best_job(self) -> Job:
        """The first job with the highest validation score."""
        return max(self.jobs, key=lambda job: _or_lowest(job.scores["val/top1"]))


def summarize(sweep_dir: Path) -> int:
    """Write `summary.csv` and `sweep.png`, print the tables and the answer.

    Args:
        sweep_dir: Holds a numbered folder for each job; other folders are left alone.

    Returns:
        How many jobs did not finish. A job without a `result.json`, or with a damaged one, is among them.

    Raises:
        FileNotFoundError: `sweep_dir` is no folder.
        OSError: A file could not be written.
    """
    if not sweep_dir.is_dir():
        raise FileNotFoundError(f"{printable(str(sweep_dir))} is no folder: give the folder of a sweep")
    jobs = [read_job(folder) for folder in job_folders(sweep_dir)]
    varied = varied_keys(jobs)
    found = settings(jobs, varied)
    write_csv(sweep_dir / "summary.csv", jobs, varied)
    say("\n".join(_tables(sweep_dir, jobs, varied, found)))
    finished = [job for job in jobs if job.is_finished and math.isfinite(job.scores["val/top1"])]
    if finished:
        scores = [Score(_values_of(j, varied), j.scores["val/top1"], j.scores["test/top1"]) for j in finished]
        save_figure(sweep_figure(scores, varied, num_missing=len(jobs) - len(finished)), sweep_dir / "sweep.png")
    say("\n" + "\n".join(_answer(sweep_dir, jobs, found)))
    return sum(not job.is_finished for job in jobs)


# --- reading ---------------------------------------------------------------------------------------------------------


def job_folders(sweep_dir: Path) -> list[Path]:
    """The numbered folders of a sweep, 2 before 10."""
    folders = [path for path in sweep_dir.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    return sorted(folders, key=lambda path: (int(path.name), path.name))


def read_job(folder: Path) -> Job:
    """What a job left; a missing or damaged `result.json` makes it a failed one that says so."""
    try:
        result = read_json(folder / "result.json")
    except FileNotFoundError:
        return _as_job(folder, {"status": "failed", "error": "no result: it never started, or was killed"})
    except (OSError, ValueError) as error:
        return _as_job(folder, {"status": "failed", "error": str(error)})
    status = result.get("status")
    if status == "running":
        # A run in progress writes this first; once the sweep is over, it means killed.
        result |= {"status": "interrupted", "error": "it stopped without a word: killed, or out of memory"}
    elif not isinstance(status, str):
        result |= {"status": "failed", "error": "result.json is damaged: it has no status"}
    return _as_job(folder, result)


def _as_job(folder: Path, result: dict[str, Any]) -> Job:
    given = result.get("overrides")
    words = [word for word in given if isinstance(word, str)] if isinstance(given, list) else []
    error = result.get("error")
    lines = str(error).strip().splitlines() if error else []
    return Job(
        folder=folder,
        status=printable(result["status"]),
        words=words,
        overrides=dict(_split(word) for word in words),
        scores={name: number(result.get(name)) for name in SCORES},
        epochs=number(result.get("epochs")),
        seconds=number(result.get("seconds")),
        error=printable(lines[0]) if lines else "" if result["status"] == "finished" else "no reason given",
    )


def _split(word: str) -> tuple[str, str]:
    """(key, value) of an override; Hydra's marks for adding and deleting are no part of the key."""
    key, _, value = word.partition("=")
    return key.lstrip("+~"), value


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Overrides that differ between jobs, in the order typed; all of them where none does, as in a sweep of one job."""
    told = [job.overrides for job in jobs if job.overrides]
    keys = list(dict.fromkeys(key for overrides in told for key in overrides))
    # A job may lack a key that others have: that differs too.
    varied = [key for key in keys if len({overrides.get(key) for overrides in told}) > 1]
    return varied or keys


def settings(jobs: Sequence[Job], varied: Sequence[str]) -> list[Setting]:
    """Finished jobs with a validation score, put together where they differ in their seed alone."""
    groups: dict[tuple[tuple[str, str], ...], Setting] = {}
    for job in jobs:
        if job.is_finished and math.isfinite(job.scores["val/top1"]):
            identity = tuple(sorted((key, value) for key, value in job.overrides.items() if key != "seed"))
            shown = {key: value for key, value in _values_of(job, varied).items() if key != "seed"}
            groups.setdefault(identity, Setting(shown, [])).jobs.append(job)
    return list(groups.values())


def _values_of(job: Job, keys: Sequence[str]) -> dict[str, str]:
    return {key: job.overrides[key] for key in keys if key in job.overrides}


def _or_lowest(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


# --- tables and the answer -------------------------------------------------------------------------------------------


def _tables(sweep_dir: Path, jobs: Sequence[Job], varied: Sequence[str], found: Sequence[Setting]) -> list[str]:
    """What is printed ahead of the answer: jobs, seeds where there are several, and what failed with its error."""
    failed = [job for job in jobs if not job.is_finished]
    lines = ["", f"sweep {sweep_dir}: {len(jobs) - len(failed)} of {len(jobs)} jobs finished"]
    if jobs:
        columns = ["", "job", *varied, "val/top1", "test/top1", "seconds", "status"]
        lines += ["", table(_job_rows(jobs, varied), columns=columns)]
    if any(len(setting.jobs) > 1 for setting in found):
        lines += ["", "over seeds, mean and standard deviation:", "", _seeds_table(found)]
    if failed:
        lines += ["", "did not finish:"]
    for job in failed:
        which = f"job {job.folder.name}{_in_brackets(_values_of(job, varied))}"
        lines.append(f"  {which}: {job.status}: {job.error[:ERROR_CHARS]}")
    return lines


def write_csv(path: Path, jobs: Sequence[Job], varied: Sequence[str]) -> None:
    """One row a job, with full precision; what is not known is an empty cell.

    Raises:
        OSError: It could not be written; an earlier table is untouched.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_cell(name) for name in ["job", "status", *varied, *SCORES, "epochs", "seconds", "error"]])
    for job in jobs:
        numbers = [*job.scores.values(), job.epochs, job.seconds]
        shown = [f"{value:.10g}" if math.isfinite(value) else "" for value in numbers]
        values = [job.overrides.get(key, "") for key in varied]
        writer.writerow([_csv_cell(cell) for cell in [job.folder.name, job.status, *values, *shown, job.error]])
    write_text(path, text.getvalue())


def _csv_cell(text: str) -> str:
    """Text that a spreadsheet shows and never runs: a leading = + - @ gets an apostrophe, unless it is a number."""
    text = printable(text)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return text


def _job_rows(jobs: Sequence[Job], varied: Sequence[str]) -> list[dict[str, object]]:
    """Rows of the printed table; a star at the best validation score, a dash for what a failed job lacks."""
    finished = [job for job in jobs if job.is_finished]
    top = max((_or_lowest(job.scores["val/top1"]) for job in finished), default=-math.inf)
    rows = []
    for job in jobs:
        is_best = job.is_finished and job.scores["val/top1"] == top
        row: dict[str, object] = {"": "*" if is_best else "", "job": job.folder.name, "status": job.status}
        row |= {key: job.overrides.get(key, "-") for key in varied}
        for name in ("val/top1", "test/top1"):
            row[name] = _score(job.scores[name]) if job.is_finished else None
        row["seconds"] = f"{job.seconds:.1f}" if math.isfinite(job.seconds) else None
        rows.append(row)
    return rows


def _seeds_table(found: Sequence[Setting]) -> str:
    """Mean and sample standard deviation of each setting over its seeds; a star at the highest mean."""
    top = max(setting.mean("val/top1") for setting in found)
    rows = []
    for setting in found:
        row: dict[str, object] = {"": "*" if setting.mean("val/top1") == top else "", "seeds": len(setting.jobs)}
        row |= {key: setting.overrides.get(key, "-") for each in found for key in each.overrides}
        for name in ("val/top1", "test/top1"):
            row[f"{name} mean"] = _score(setting.mean(name))
            std = setting.std(name)
            row[f"{name} std"] = None if std is None else f"{std:.4f}"
        rows.append(row)
    keys = dict.fromkeys(key for setting in found for key in setting.overrides)
    return table(rows, columns=["", *keys, "seeds", "val/top1 mean", "val/top1 std", "test/top1 mean", "test/top1 std"])


def _score(value: float) -> str | None:
    return f"{value:.4f}" if math.isfinite(value) else None


def _in_brackets(values: dict[str, str]) -> str:
    return f" ({' '.join(f'{key}={value}' for key, value in values.items())})" if values else ""


def _answer(sweep_dir: Path, jobs: Sequence[Job], found: Sequence[Setting]) -> list[str]:
    """The closing lines: the best setting by validation, where its run is, what to type next."""
    if not jobs:
        return [f"no jobs in {sweep_dir}: their folders are named 0, 1, 2, ..."]
    if not found:
        return [f"no job finished: the reason of the first is in {jobs[0].folder / 'run.log'}"]
    top = max(setting.mean("val/top1") for setting in found)
    winners = [setting for setting in found if setting.mean("val/top1") == top]
    best, job = winners[0], winners[0].best_job
    name = " ".join(f"{key}={value}" for key, value in best.overrides.items()) or "all jobs share one setting"
    if len(best.jobs) > 1:
        lines = [f"best: {name} ({_spread(best, 'val')}, {_spread(best, 'test')}, {len(best.jobs)} seeds)"]
        lines += [f"its best run: {_run(job)} in {job.folder}"]
    else:
        lines = [f"best: {name} ({_run(job)}) in {job.folder}"]
    if len(winners) > 1:
        lines.append(f"as good on validation: job {', '.join(setting.best_job.folder.name for setting in winners[1:])}")
    lines.append(f"table and picture: {sweep_dir / 'summary.csv'}, {sweep_dir / 'sweep.png'}")
    words = [word for word in job.words if _split(word)[0] != "seed"]
    if len(best.jobs) > 1:
        return [*lines, f"next, a run with the winner: {command(['python', '-m', 'finetune', *words])}"]
    again = command(["python", "-m", "finetune", "-m", *words, "seed=0,1,2"])
    return [*lines, f"next, is it more than luck? {again}"]


def _spread(setting: Setting, split: str) -> str:
    std = setting.std(f"{split}/top1")
    return f"{split} {setting.mean(f'{split}/top1'):.4f}" + (f" ± {std:.4f}" if std is not None else "")


def _run(job: Job) -> str:
    return ", ".join(f"{split} {_score(job.scores[f'{split}/top1']) or 'not scored'}" for split in ("val", "test"))
