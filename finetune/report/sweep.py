"""Sums up a sweep: the tables, `summary.csv`, `sweep.png`, and which setting is best on validation."""

import math
from contextlib import nullcontext
from pathlib import Path

from finetune.report import look
from finetune.report.jobs import LENGTHS, SPLITS, JobGroup, Sweep, key_of, rank, read_sweep
from finetune.report.sweep_figure import sweep_figure
from finetune.runs.folders import JOBS
from finetune.system.files import write_text
from finetune.system.locks import working_in
from finetune.system.log import say
from finetune.system.ours import FolderKind
from finetune.system.tables import csv_text, table
from finetune.system.terminal import command, counted, printable

PATIENCE_S = 60.0  # how long a summary waits for another of the same sweep, such as of `finetune report`


def summarize(sweep_dir: Path, *, is_picture_asked: bool = False) -> int:
    """Write `summary.csv` and `sweep.png` into the folder of a sweep, print the tables and the best setting.

    A picture that cannot be drawn is an error only where somebody asked for it (`finetune report`).
    Returns the number of jobs that did not finish, also for want of a good `result.json`, or were refused their folder.
    """
    with working_in(sweep_dir, FolderKind.sweep, PATIENCE_S):
        sweep = read_sweep(sweep_dir)
        _write_csv(sweep)
        say("\n".join(_tables(sweep)))
        if sweep.scored:
            path = sweep_dir / "sweep.png"
            with nullcontext() if is_picture_asked else look.dispensable(path, lambda line: say(f"warning: {line}")):
                look.save_figure(sweep_figure(sweep), path)
    say("\n" + "\n".join(_answer(sweep)))
    return sum(not job.is_finished for job in sweep.jobs)


def _tables(sweep: Sweep) -> list[str]:
    """The lines ahead of the answer: all jobs, means over seeds where there are several, and failed jobs."""
    failed = [job for job in sweep.jobs if not job.is_finished]
    lines = ["", f"sweep {sweep.folder}: {len(sweep.jobs) - len(failed)} of {counted(len(sweep.jobs), 'job')} finished"]
    if sweep.strangers:
        names, count = ", ".join(printable(path.name) for path in sweep.strangers[:5]), len(sweep.strangers)
        text = f"{counted(count, 'folder')} left out, since this sweep started no job there ({JOBS}): {names}"
        lines.append(text + ", ..." * (count > 5))
    if sweep.jobs:
        lines += ["", _jobs_table(sweep)]
    if any(len(group.jobs) > 1 for group in sweep.groups):
        lines += ["", "over seeds, mean and standard deviation:", "", _seeds_table(sweep)]
    if failed:
        lines += ["", "did not finish:"]
    for job in failed:
        values = _typed(job.values_of(sweep.varied))
        name = f"job {job.folder.name} ({values})" if values else f"job {job.folder.name}"
        lines.append(f"  {name}: {job.status}: {job.error[:300]}")  # `run.log` of the job has all of it
    return lines


def _jobs_table(sweep: Sweep) -> str:
    """One row for each job: a star at the best validation score, a dash for a number that a failed job lacks."""
    names = [f"val/{sweep.metric}", f"test/{sweep.metric}"]
    top = max((rank(job.number(names[0]), sweep.metric) for job in sweep.scored), default=math.inf)
    rows = []
    for job in sweep.jobs:
        is_best = job.is_finished and rank(job.number(names[0]), sweep.metric) == top
        row: dict[str, object] = {"": "*" if is_best else "", "job": job.folder.name, "status": job.status}
        row |= {key: job.overrides.get(key, "-") for key in sweep.varied}
        row |= {name: _digits(job.number(name)) if job.is_finished else None for name in names}
        rows.append(row | {"seconds": _digits(job.number("seconds"), 1)})
    return table(rows, columns=["", "job", *sweep.varied, *names, "seconds", "status"])


def _seeds_table(sweep: Sweep) -> str:
    """Mean and sample standard deviation of each setting over its seeds; a star at the best mean."""
    names = [f"val/{sweep.metric}", f"test/{sweep.metric}"]
    keys = list(dict.fromkeys(key for group in sweep.groups for key in group.overrides))
    best = _best_groups(sweep)
    rows = []
    for group in sweep.groups:
        row: dict[str, object] = {"": "*" if group in best else "", "seeds": len(group.jobs)}
        row |= {key: group.overrides.get(key, "-") for key in keys}
        for name in names:
            std = group.std(name)
            row |= {f"{name} mean": _digits(group.mean(name)), f"{name} std": None if std is None else f"{std:.4f}"}
        rows.append(row)
    return table(rows, columns=["", *keys, "seeds", *(f"{name} {of}" for name in names for of in ("mean", "std"))])


def _best_groups(sweep: Sweep) -> list[JobGroup]:
    """The groups with the best mean on validation: one, or several where they are equal."""
    means = [rank(group.mean(f"val/{sweep.metric}"), sweep.metric) for group in sweep.groups]
    return [group for group, mean in zip(sweep.groups, means, strict=True) if mean == max(means)]


def _digits(value: float, count: int = 4) -> str | None:
    return f"{value:.{count}f}" if math.isfinite(value) else None


def _typed(overrides: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _write_csv(sweep: Sweep) -> None:
    """Write `summary.csv`: one row for each job, with all digits; an unknown value is an empty cell."""
    names = list(dict.fromkeys(f"{split}{name}" for name in ("top1", sweep.metric) for split in SPLITS))
    rows = [["job", "status", *sweep.varied, *names, *LENGTHS, "error"]]
    for job in sweep.jobs:
        numbers = map(job.number, [*names, *LENGTHS])
        shown = [f"{value:.10g}" if math.isfinite(value) else "" for value in numbers]
        values = [job.overrides.get(key, "") for key in sweep.varied]
        rows.append([job.folder.name, job.status, *values, *shown, job.error])
    write_text(sweep.folder / "summary.csv", csv_text(rows))


def _answer(sweep: Sweep) -> list[str]:
    """The closing lines: the best setting by validation, the folder of its best run, and the next command."""
    if not sweep.jobs:
        return [f"no jobs in {sweep.folder}: their folders are named 0, 1, 2, ..."]
    if not sweep.groups:
        if any(job.is_finished for job in sweep.jobs):
            return [f"no job has a finite val/{sweep.metric}, so nothing ranks them: ranking needs validation images"]
        ran = [job for job in sweep.jobs if job.status != "refused"]
        return [f"no job finished: the reason of the first is in {ran[0].folder / 'run.log'}" if ran else "no job ran"]
    best, *equals = _best_groups(sweep)
    job = best.best_job(sweep.metric)
    name = _typed(best.overrides) or "all jobs share one setting"
    scores = _scores_line(JobGroup({}, [job]), sweep.metric)
    words = [word for word in job.words if key_of(word) != "seed"]
    if len(best.jobs) > 1:
        lines = [f"best: {name} ({_scores_line(best, sweep.metric)}, {len(best.jobs)} seeds)"]
        lines += [f"its best run: {scores} in {job.folder}"]
        next_line = f"next, a run with the winner: {command(['python', '-m', 'finetune', *words])}"
    else:
        lines = [f"best: {name} ({scores}) in {job.folder}"]
        next_line = f"next, is it more than luck? {command(['python', '-m', 'finetune', '-m', *words, 'seed=0,1,2'])}"
    if equals:
        others = ", ".join(group.best_job(sweep.metric).folder.name for group in equals)
        lines.append(f"as good on validation: job {others}")
    if len({job.metric for job in sweep.jobs if job.is_finished}) > 1:
        lines.append(f"ranked by val/{sweep.metric}, since the jobs' own train.monitor differ")
    files = [path for name in ("summary.csv", "sweep.png") if (path := sweep.folder / name).exists()]
    lines.append(f"{'table and picture' if len(files) > 1 else 'table'}: {', '.join(map(str, files))}")
    return [*lines, next_line]


def _scores_line(group: JobGroup, metric: str) -> str:
    """`val 0.9820 ± 0.0028, test 0.9720 ± 0.0028`; with another metric than top1 `val/map 0.6000, ...`."""
    parts = []
    for split in ("val", "test"):
        name = f"{split}/{metric}"
        std = group.std(name)
        spread = "" if std is None else f" ± {std:.4f}"
        parts.append(f"{split if metric == 'top1' else name} {_digits(group.mean(name)) or 'not scored'}{spread}")
    return ", ".join(parts)
