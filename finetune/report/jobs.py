"""Reads a sweep: the result of each job, which settings differ between jobs, and jobs that differ only in the seed."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from finetune.report.columns import judge_of
from finetune.report.reading import number
from finetune.runs.finished import check_finished
from finetune.runs.folders import JOBS
from finetune.runs.records import JobEntry, read_result
from finetune.system.locks import holder
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, parse_json, read_file
from finetune.system.terminal import printable

SPLITS = ("zeroshot/", "val/", "test/")
LENGTHS = ("epochs", "seconds")


@dataclass(frozen=True)
class JobResult:
    """The result of one job of a sweep."""

    folder: Path  # `<sweep>/<number>`, or as `hydra.sweep.subdir` names it
    status: str  # finished, failed, diverged, interrupted or at work; refused, where the folder holds another run
    words: list[str]  # overrides as typed
    numbers: dict[str, float]  # scores (val/top1 of the best epoch, test/top1, ...), `epochs` and `seconds`
    metric: str = "top1"  # that picked the best epoch
    error: str = ""  # why the job did not finish, in one line

    @property
    def is_finished(self) -> bool:
        """Whether the job's scores count."""
        return self.status == "finished"

    @cached_property
    def overrides(self) -> dict[str, str]:
        """The overrides, by key."""
        return {key_of(word): word.partition("=")[2] for word in self.words}

    def number(self, name: str) -> float:
        """The score of this name, or `epochs` or `seconds`; NaN where the job has none."""
        return self.numbers.get(name, math.nan)

    def values_of(self, keys: Sequence[str]) -> dict[str, str]:
        """The overrides of `keys`, without those that the job does not set."""
        return {key: self.overrides[key] for key in keys if key in self.overrides}


@dataclass(frozen=True)
class JobGroup:
    """Finished jobs with the same overrides of some keys, such as of all keys but the seed."""

    overrides: dict[str, str]  # without the keys that the jobs do not set
    jobs: list[JobResult]  # at least one

    def scores(self, name: str) -> list[float]:
        """The score of this name of each job that has one."""
        return [job.number(name) for job in self.jobs if math.isfinite(job.number(name))]

    def mean(self, name: str) -> float:
        """Mean of `scores`; NaN where there is none."""
        scores = self.scores(name)
        return statistics.fmean(scores) if scores else math.nan

    def std(self, name: str) -> float | None:
        """Sample standard deviation (n - 1) of `scores`; None for fewer than two."""
        scores = self.scores(name)
        return statistics.stdev(scores) if len(scores) > 1 else None

    def value(self, key: str) -> str:
        """The override of `key`; the word `default` where the jobs do not set it."""
        return self.overrides.get(key, "default")

    def best_job(self, metric: str) -> JobResult:
        """The first job with the best validation score."""
        return max(self.jobs, key=lambda job: rank(job.number(f"val/{metric}"), metric))


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read from its folder."""

    folder: Path
    jobs: list[JobResult]
    varied: list[str]  # keys of overrides that differ between jobs
    metric: str  # that ranks the jobs, such as top1
    strangers: list[Path]  # numbered folders of runs that this sweep did not start, such as copies of another's jobs

    @property
    def scored(self) -> list[JobResult]:
        """Finished jobs that have a validation score."""
        return [job for job in self.jobs if job.is_finished and math.isfinite(job.number(f"val/{self.metric}"))]

    @property
    def groups(self) -> list[JobGroup]:
        """Scored jobs, grouped where they differ in their seed alone."""
        return group_jobs(self.scored, [key for key in self.varied if key != "seed"])


def rank(score: float, metric: str) -> float:
    """A number that is greater for the better score: a lower loss or ECE is better; NaN is the worst."""
    if not math.isfinite(score):
        return -math.inf
    return -score if metric.endswith(("loss", "ece")) else score


def varied_keys(jobs: Sequence[JobResult]) -> list[str]:
    """Keys of overrides that differ between jobs, in the order typed; all keys where none differs."""
    known = [job.overrides for job in jobs if job.overrides]
    keys = list(dict.fromkeys(key for overrides in known for key in overrides))
    # A key that only some jobs set differs, too.
    return [key for key in keys if len({overrides.get(key) for overrides in known}) > 1] or keys


def group_jobs(jobs: Sequence[JobResult], keys: Sequence[str]) -> list[JobGroup]:
    """Groups jobs by their overrides of `keys`, in order of appearance."""
    groups: dict[tuple[str | None, ...], JobGroup] = {}
    for job in jobs:
        identity = tuple(job.overrides.get(key) for key in keys)
        groups.setdefault(identity, JobGroup(job.values_of(keys), [])).jobs.append(job)
    return list(groups.values())


class _Record(NamedTuple):
    """An entry of `jobs.jsonl`: a job that began."""

    name: str  # its folder, relative to the sweep's
    refused: str | None  # why it did not run: its folder holds another run; None: it ran


def read_sweep(sweep_dir: Path) -> Sweep:
    """Returns the sweep in a folder; its metric is the one that picked the jobs' best epochs, top1 if they differ."""
    jobs, strangers = read_jobs(sweep_dir)
    metrics = {job.metric for job in jobs if job.is_finished}
    return Sweep(sweep_dir, jobs, varied_keys(jobs), metrics.pop() if len(metrics) == 1 else "top1", strangers)


def read_jobs(sweep_dir: Path) -> tuple[list[JobResult], list[Path]]:
    """Returns the results of a sweep's jobs, and the numbered folders of runs that it did not start.

    The last rows are those of jobs whose folder held another run: they were refused.
    """
    records, is_whole = _records(sweep_dir)
    refused = [record for record in records if record.refused is not None]
    foreign = {record.name for record in refused} - {record.name for record in records if record.refused is None}
    folders = [path for path in _folders(sweep_dir, records) if os.path.relpath(path, sweep_dir) not in foreign]
    rows = [_as_job(sweep_dir / record.name, {"status": "refused", "error": record.refused}) for record in refused]
    # Without its record a sweep has the jobs that its folder has.
    started = {record.name for record in records} if is_whole else set()
    strangers = [path for path in folders if started and os.path.relpath(path, sweep_dir) not in started]
    return [*(read_job(path) for path in folders if path not in strangers), *rows], strangers


def _folders(sweep_dir: Path, records: Sequence[_Record]) -> list[Path]:
    """The folders of jobs that ran: numbered ones, 2 before 10, then those that `hydra.sweep.subdir` has named."""
    named = [sweep_dir / record.name for record in records if record.refused is None]
    # With `hydra.sweep.subdir='${seed}/${optim.lr}'` a numbered folder may only hold the folders of jobs.
    above = {parent for record in records for parent in (sweep_dir / record.name).parents}
    numbered = [path for path in sweep_dir.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    numbered = [path for path in numbered if path not in above or (path / "result.json").exists()]
    numbered.sort(key=lambda path: (int(path.name), path.name))
    return list(dict.fromkeys([*numbered, *(folder for folder in named if os.path.isdir(folder))]))


def _records(sweep_dir: Path) -> tuple[list[_Record], bool]:
    """The entries of `jobs.jsonl`, in order, and whether each line is one: a killed process may leave a part."""
    try:
        lines = [line for line in read_file(sweep_dir / JOBS, limit=MAX_BYTES).splitlines() if line.strip()]
    except (FileNotFoundError, UnfitError):
        return [], False
    found: dict[str, _Record] = {}
    broken = 0
    for line in lines:
        try:
            entry = parse_json(line, JobEntry)
            if "start" in entry:  # the sweep was started again: a job refused before may run now
                found = {ident: record for ident, record in found.items() if record.refused is None}
            elif "refused" in entry:
                found[entry["id"]] = found[entry["id"]]._replace(refused=entry["refused"])
            else:
                found[entry["id"]] = _Record(entry["job"], None)
        except (UnfitError, KeyError):
            broken += 1
    return list(found.values()), not broken


def read_job(folder: Path) -> JobResult:
    """Returns a job's result; a job whose `result.json` is missing or damaged is a failed one that says so."""
    if owner := holder(folder):
        return _as_job(folder, {"status": "at work", "error": f"process {owner.pid} on {owner.host} is working in it"})
    try:
        result = read_result(folder / "result.json")
        check_finished(folder, result)
    except FileNotFoundError:
        return _as_job(folder, {"status": "failed", "error": "no result: it never started, or was killed"})
    except DamagedError as error:
        return _as_job(folder, {"status": "failed", "error": str(error)})
    if result["status"] == "running":  # a run writes this first; no process works in the folder, so the run was killed
        result |= {"status": "interrupted", "error": "it stopped without a word: killed, or out of memory"}
    return _as_job(folder, result)


def _as_job(folder: Path, result: dict[str, Any]) -> JobResult:
    lines = (result.get("error") or "").strip().splitlines()
    return JobResult(
        folder=folder,
        status=printable(result["status"]),
        words=result.get("overrides", []),
        numbers={name: number(value) for name, value in result.items() if name.startswith((*SPLITS, *LENGTHS))},
        metric=judge_of(result),
        error=printable(lines[0]) if lines else "" if result["status"] == "finished" else "no reason given",
    )


def key_of(word: str) -> str:
    """The key of an override as typed, without Hydra's marks for adding (`+`) and deleting (`~`)."""
    return word.partition("=")[0].lstrip("+~")
