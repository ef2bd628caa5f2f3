"""Many runs, one answer: the table, `summary.csv` and `sweep.png` of a sweep, and which setting won on validation.

No torch: a finished sweep can be summed up on any machine, also one in which jobs failed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.report.figure import number, read_json, save_figure
from finetune.report.sweep_figure import Score, rank, sweep_figure
from finetune.runs.folders import JOBS
from finetune.system.files import write_text
from finetune.system.locks import holder
from finetune.system.log import say
from finetune.system.tables import table
from finetune.system.terminal import command, printable

SPLITS = ("zeroshot/", "val/", "test/")
# Longest error shown on the console; `run.log` of the job has it all.
ERROR_CHARS = 300


@dataclass(frozen=True)
class Job:
    """One run of a sweep, as far as its folder tells.

    Attributes:
        folder: `<sweep>/<number>`, or as `hydra.sweep.subdir` has it.
        status: finished, failed, diverged, interrupted or at work; refused, where the folder holds another run.
        words: Its overrides as typed.
        overrides: The same by key.
        scores: What it measured, such as zeroshot/top1, val/top1 (of the best epoch) and test/top1.
        metric: What picked its best epoch, such as top1 or map.
        epochs: Finished epochs; NaN for not known.
        seconds: Of training; NaN for not known.
        error: Why it did not finish, in one line; empty where it did.
    """

    folder: Path
    status: str
    words: list[str]
    overrides: dict[str, str]
    scores: dict[str, float]
    metric: str
    epochs: float
    seconds: float
    error: str

    @property
    def is_finished(self) -> bool:
        """Whether its scores count."""
        return self.status == "finished"

    def score(self, name: str) -> float:
        """A score; NaN where it has none."""
        return self.scores.get(name, math.nan)


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
        return [job.score(score) for job in self.jobs if math.isfinite(job.score(score))]

    def best_job(self, metric: str) -> Job:
        """The first job with the best validation score."""
        return max(self.jobs, key=lambda job: rank(job.score(f"val/{metric}"), metric))


def summarize(sweep_dir: Path) -> int:
    """Write `summary.csv` and `sweep.png`, print the tables and the answer.

    Args:
        sweep_dir: Holds a folder for each job; other folders are left alone.

    Returns:
        How many jobs did not finish. A job without a `result.json`, or with a damaged one, is among them, and one that
        was refused because another run is in its folder.

    Raises:
        FileNotFoundError: `sweep_dir` is no folder.
        OSError: A file could not be written.
    """
    if not sweep_dir.is_dir():
        raise FileNotFoundError(f"{printable(str(sweep_dir))} is no folder: give the folder of a sweep")
    jobs = _jobs_of(sweep_dir)
    varied, metric = varied_keys(jobs), metric_of(jobs)
    val, test = f"val/{metric}", f"test/{metric}"
    found = settings(jobs, varied, metric)
    write_csv(sweep_dir / "summary.csv", jobs, varied, metric)
    say("\n".join(_tables(sweep_dir, jobs, varied, found, metric)))
    finished = [job for job in jobs if job.is_finished and math.isfinite(job.score(val))]
    if finished:
        scores = [Score(_values_of(job, varied), job.score(val), job.score(test)) for job in finished]
        figure = sweep_figure(scores, varied, num_missing=len(jobs) - len(finished), metric=metric)
        save_figure(figure, sweep_dir / "sweep.png")
    say("\n" + "\n".join(_answer(sweep_dir, jobs, found, metric)))
    return sum(not job.is_finished for job in jobs)


def metric_of(jobs: Sequence[Job]) -> str:
    """What finished jobs are ranked by: the metric that picked their best epochs, or top1 where theirs differ."""
    metrics = {job.metric for job in jobs if job.is_finished}
    return metrics.pop() if len(metrics) == 1 else "top1"


# --- reading ---------------------------------------------------------------------------------------------------------


def job_folders(sweep_dir: Path) -> list[Path]:
    """The folders of a sweep's jobs: numbered ones, 2 before 10, then those that `hydra.sweep.subdir` has named."""
    return _folders_of(sweep_dir, _begun(sweep_dir))


def _folders_of(sweep_dir: Path, begun: Sequence[_Begun]) -> list[Path]:
    named = [sweep_dir / each.name for each in begun if each.refused is None]
    above = {parent for each in begun for parent in (sweep_dir / each.name).parents}
    numbered = [
        path
        for path in sweep_dir.iterdir()
        if path.name.isascii() and path.name.isdigit() and path.is_dir()
        if path not in above or (path / "result.json").exists()
    ]
    numbered.sort(key=lambda path: (int(path.name), path.name))
    return list(dict.fromkeys([*numbered, *(folder for folder in named if folder.is_dir())]))


def _jobs_of(sweep_dir: Path) -> list[Job]:
    """Every job; where one was refused its folder, what no job of this sweep has left there counts for nothing."""
    begun = _begun(sweep_dir)
    refused = [each for each in begun if each.refused is not None]
    foreign = {each.name for each in refused} - {each.name for each in begun if each.refused is None}
    folders = [folder for folder in _folders_of(sweep_dir, begun) if os.path.relpath(folder, sweep_dir) not in foreign]
    rows = [_as_job(sweep_dir / each.name, {"status": "refused", "error": each.refused}) for each in refused]
    return [*map(read_job, folders), *rows]


@dataclass(frozen=True)
class _Begun:
    """A job that was begun: its folder in the sweep's, and why it was not run where that is another run's."""

    name: str
    refused: str | None


def _begun(sweep_dir: Path) -> list[_Begun]:
    """What jobs have put on record, in their order; lines that a killed process left half written are passed over."""
    try:
        lines = (sweep_dir / JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, _Begun] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(line)
            if "start" in told:  # what was refused in an earlier sweep may be run by now, or is asked for no more
                found = {ident: begun for ident, begun in found.items() if begun.refused is None}
            elif "refused" in told:
                found[told["id"]] = replace(found[told["id"]], refused=str(told["refused"]))
            else:
                found[told["id"]] = _Begun(str(told["job"]), None)
    return list(found.values())


def read_job(folder: Path) -> Job:
    """What a job left; a missing or damaged `result.json` makes it a failed one that says so."""
    at_work = holder(folder)
    if at_work is not None:
        told = f"process {at_work.pid} on {at_work.host} is working in it"
        return _as_job(folder, {"status": "at work", "error": told})
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
        scores={name: number(value) for name, value in result.items() if name.startswith(SPLITS)},
        metric=str(result.get("monitor") or "val/top1").removeprefix("val/"),
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


def settings(jobs: Sequence[Job], varied: Sequence[str], metric: str = "top1") -> list[Setting]:
    """Finished jobs with a validation score, put together where they differ in their seed alone."""
    groups: dict[tuple[tuple[str, str], ...], Setting] = {}
    for job in jobs:
        if job.is_finished and math.isfinite(job.score(f"val/{metric}")):
            identity = tuple(sorted((key, value) for key, value in job.overrides.items() if key != "seed"))
            shown = {key: value for key, value in _values_of(job, varied).items() if key != "seed"}
            groups.setdefault(identity, Setting(shown, [])).jobs.append(job)
    return list(groups.values())


def _values_of(job: Job, keys: Sequence[str]) -> dict[str, str]:
    return {key: job.overrides[key] for key in keys if key in job.overrides}


# --- tables and the answer -------------------------------------------------------------------------------------------


def _tables(
    sweep_dir: Path, jobs: Sequence[Job], varied: Sequence[str], found: Sequence[Setting], metric: str
) -> list[str]:
    """What is printed ahead of the answer: jobs, seeds where there are several, and what failed with its error."""
    failed = [job for job in jobs if not job.is_finished]
    lines = ["", f"sweep {sweep_dir}: {len(jobs) - len(failed)} of {len(jobs)} jobs finished"]
    if jobs:
        columns = ["", "job", *varied, f"val/{metric}", f"test/{metric}", "seconds", "status"]
        lines += ["", table(_job_rows(jobs, varied, metric), columns=columns)]
    if any(len(setting.jobs) > 1 for setting in found):
        lines += ["", "over seeds, mean and standard deviation:", "", _seeds_table(found, metric)]
    if failed:
        lines += ["", "did not finish:"]
    for job in failed:
        which = f"job {job.folder.name}{_in_brackets(_values_of(job, varied))}"
        lines.append(f"  {which}: {job.status}: {job.error[:ERROR_CHARS]}")
    return lines


def write_csv(path: Path, jobs: Sequence[Job], varied: Sequence[str], metric: str = "top1") -> None:
    """One row a job, with full precision; what is not known is an empty cell.

    Raises:
        OSError: It could not be written; an earlier table is untouched.
    """
    names = dict.fromkeys(f"{split}{name}" for name in ("top1", metric) for split in SPLITS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_csv_cell(name) for name in ["job", "status", *varied, *names, "epochs", "seconds", "error"]])
    for job in jobs:
        numbers = [*map(job.score, names), job.epochs, job.seconds]
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


def _job_rows(jobs: Sequence[Job], varied: Sequence[str], metric: str) -> list[dict[str, object]]:
    """Rows of the printed table; a star at the best validation score, a dash for what a failed job lacks."""
    val = f"val/{metric}"
    top = max((rank(job.score(val), metric) for job in jobs if job.is_finished), default=-math.inf)
    rows = []
    for job in jobs:
        is_best = job.is_finished and math.isfinite(job.score(val)) and rank(job.score(val), metric) == top
        row: dict[str, object] = {"": "*" if is_best else "", "job": job.folder.name, "status": job.status}
        row |= {key: job.overrides.get(key, "-") for key in varied}
        for name in (val, f"test/{metric}"):
            row[name] = _score(job.score(name)) if job.is_finished else None
        row["seconds"] = f"{job.seconds:.1f}" if math.isfinite(job.seconds) else None
        rows.append(row)
    return rows


def _seeds_table(found: Sequence[Setting], metric: str) -> str:
    """Mean and sample standard deviation of each setting over its seeds; a star at the best mean."""
    val, test = f"val/{metric}", f"test/{metric}"
    top = max(rank(setting.mean(val), metric) for setting in found)
    rows = []
    for setting in found:
        is_best = rank(setting.mean(val), metric) == top
        row: dict[str, object] = {"": "*" if is_best else "", "seeds": len(setting.jobs)}
        row |= {key: setting.overrides.get(key, "-") for each in found for key in each.overrides}
        for name in (val, test):
            row[f"{name} mean"] = _score(setting.mean(name))
            std = setting.std(name)
            row[f"{name} std"] = None if std is None else f"{std:.4f}"
        rows.append(row)
    keys = dict.fromkeys(key for setting in found for key in setting.overrides)
    return table(
        rows, columns=["", *keys, "seeds", *(f"{name} {of}" for name in (val, test) for of in ("mean", "std"))]
    )


def _score(value: float) -> str | None:
    return f"{value:.4f}" if math.isfinite(value) else None


def _in_brackets(values: dict[str, str]) -> str:
    return f" ({' '.join(f'{key}={value}' for key, value in values.items())})" if values else ""


def _answer(sweep_dir: Path, jobs: Sequence[Job], found: Sequence[Setting], metric: str) -> list[str]:
    """The closing lines: the best setting by validation, where its run is, what to type next."""
    if not jobs:
        return [f"no jobs in {sweep_dir}: their folders are named 0, 1, 2, ..."]
    if not found:
        ran = [job for job in jobs if job.status != "refused"]
        where = (
            f"no job finished: the reason of the first is in {ran[0].folder / 'run.log'}" if ran else "no job was run"
        )
        return [where]
    means = [rank(setting.mean(f"val/{metric}"), metric) for setting in found]
    winners = [setting for setting, mean in zip(found, means, strict=True) if mean == max(means)]
    best, job = winners[0], winners[0].best_job(metric)
    name = " ".join(f"{key}={value}" for key, value in best.overrides.items()) or "all jobs share one setting"
    if len(best.jobs) > 1:
        lines = [
            f"best: {name} ({_spread(best, 'val', metric)}, {_spread(best, 'test', metric)}, {len(best.jobs)} seeds)"
        ]
        lines += [f"its best run: {_run(job, metric)} in {job.folder}"]
    else:
        lines = [f"best: {name} ({_run(job, metric)}) in {job.folder}"]
    if len(winners) > 1:
        others = ", ".join(setting.best_job(metric).folder.name for setting in winners[1:])
        lines.append(f"as good on validation: job {others}")
    if len({job.metric for job in jobs if job.is_finished}) > 1:
        lines.append(f"ranked by val/{metric}, since the jobs' own train.monitor differ")
    lines.append(f"table and picture: {sweep_dir / 'summary.csv'}, {sweep_dir / 'sweep.png'}")
    words = [word for word in job.words if _split(word)[0] != "seed"]
    if len(best.jobs) > 1:
        return [*lines, f"next, a run with the winner: {command(['python', '-m', 'finetune', *words])}"]
    again = command(["python", "-m", "finetune", "-m", *words, "seed=0,1,2"])
    return [*lines, f"next, is it more than luck? {again}"]


def _spread(setting: Setting, split: str, metric: str) -> str:
    std = setting.std(f"{split}/{metric}")
    mean = f"{_named(split, metric)} {setting.mean(f'{split}/{metric}'):.4f}"
    return mean + (f" ± {std:.4f}" if std is not None else "")


def _run(job: Job, metric: str) -> str:
    scores = {_named(split, metric): _score(job.score(f"{split}/{metric}")) for split in ("val", "test")}
    return ", ".join(f"{name} {score or 'not scored'}" for name, score in scores.items())


def _named(split: str, metric: str) -> str:
    """`val`, and where it is not the accuracy that everybody expects `val/map`."""
    return split if metric == "top1" else f"{split}/{metric}"
