"""`finetune [train]`: check the command line, then run it, or every job of a sweep."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import finetune
from finetune.commands.flags import CommandLine, configure, hydra_flags, parse_command_line
from finetune.commands.help import main as help_command
from finetune.config.words.choices import folders
from finetune.config.words.quoting import quote
from finetune.runs.folders import SweepRecord, record_failure, run_folder, where_traceback
from finetune.system.errors import EXPECTED_ERRORS, ConfigError, fault_line
from finetune.system.locks import InUseError
from finetune.system.ours import FolderKind, RefusedError, claim, refuse_links
from finetune.system.terminal import complain, counted

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from finetune.config import Conf
    from finetune.config.words.configuration import Prepared


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code, 0, or 1 where a run failed; a ConfigError has every mistake of the line."""
    line = parse_command_line(words)
    if "--version" in line.flags:
        print(f"finetune {finetune.__version__}")
        return 0
    if line.flags.keys() & {"--help", "--help-all"}:
        return help_command(words)
    from finetune.app.launchers import launch
    from finetune.config.words.composition import config_as_yaml

    if line.flags.keys() & {"--hydra-help", "--info", "--shell-completion"} and not line.problems:
        if "--shell-completion" in line.flags:
            _refuse_query_by_hand(line)
        launch(lambda cfg: None, hydra_flags(line) + line.overrides, folders(line.config_dir))  # Hydra answers itself
        return 0
    prepared = configure(line)
    if line.flags.get("--cfg") == "job":
        package, resolve = line.flags.get("--package", ""), "--resolve" in line.flags
        print(config_as_yaml(prepared.cfg, package=package, resolve=resolve), end="")
        return 0
    if "--cfg" in line.flags:
        launch(lambda cfg: None, hydra_flags(line) + prepared.first, folders(line.config_dir))
        return 0
    return (_sweep if line.multirun else _single)(line, prepared)


def _refuse_query_by_hand(line: CommandLine) -> None:
    """Raise a ConfigError for `query=SHELL` without a command line to complete, which a shell gives."""
    queries = [word for word in line.overrides if word.startswith("query=")]
    if queries and not os.environ.get("COMP_LINE", "").strip():
        why = "a shell asks this, with the line typed so far in COMP_LINE; a person installs completion once"
        raise ConfigError([f'--shell-completion {queries[0]}: {why}: eval "$(finetune -sc install=bash)"'])


def _single(line: CommandLine, prepared: Prepared) -> int:
    from finetune.app.launchers import launch

    if prepared.conf.resume is not None and prepared.run_dir is not None:
        return _finish(prepared.conf, prepared.run_dir, prepared.overrides)[0]
    codes: list[int] = []
    with run_folder(prepared.run_dir, multirun=False) as folder:
        arguments = [*prepared.overrides, f"hydra.run.dir={quote(str(folder))}"]
        launch(lambda cfg: _job(cfg, codes), arguments, folders(line.config_dir))
    return codes[0]


def _sweep(line: CommandLine, prepared: Prepared) -> int:
    """Every job, one after the other, also after one that failed; then the table, also after Ctrl-C; the exit code."""
    from finetune.app.launchers import launch
    from finetune.prefix.sweep_memory import shared_between_runs

    codes: list[int] = []
    with run_folder(prepared.run_dir, multirun=True) as folder, shared_between_runs():
        claim(folder, FolderKind.sweep)
        print(f"{counted(prepared.jobs, 'job')}, in {folder}", flush=True)
        SweepRecord(folder).start()
        arguments = ["--multirun", *prepared.overrides, f"hydra.sweep.dir={quote(str(folder))}"]
        try:
            launch(lambda cfg: _job(cfg, codes), arguments, folders(line.config_dir))
        finally:
            from finetune.report.sweep import summarize

            failed = summarize(folder)
    # Jobs that a launcher ran in other processes are known by their files alone, beside those of earlier sweeps.
    return int(any(codes) if len(codes) == prepared.jobs else failed > 0)


def _job(cfg: DictConfig, codes: list[int]) -> float | None:
    """One job inside Hydra's launcher; its folder tells whether it failed.

    `codes` gets its exit code, but not from a launcher with other processes. Returns the best epoch's validation score
    by `train.monitor`, for sweepers that search; None if the job failed.
    """
    from finetune.app.launchers import current_job
    from finetune.config.words.composition import to_conf

    job = current_job()
    if job.number is not None:
        print(f"\njob {job.number}: {' '.join(job.overrides)}", flush=True)
    code, score, ident = 1, None, ""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.sweep is not None:
            refuse_links(job.sweep, job.folder)
            ident = SweepRecord(job.sweep).begin_job(job.folder)
        code, score = _finish(to_conf(cfg, job.start), job.folder, job.overrides)
    except RefusedError as error:
        if job.sweep is not None:
            SweepRecord(job.sweep).refuse_job(ident, str(error))
        complain(str(error))
    except EXPECTED_ERRORS as error:
        record_failure(job.folder, job.overrides, error)
        complain(str(error))
    finally:
        codes.append(code)
    return score


def _finish(conf: Conf, folder: Path, overrides: list[str]) -> tuple[int, float | None]:
    """Run to the end in `folder`; returns 0, or 1 if the run failed, and its validation score.

    Raises:
        RefusedError: The folder holds another run; nothing is written there.
    """
    try:
        # Torch's CPU threads spin while they wait for each other, by default so long that on busy cores all starve: 10
        # images/s instead of 90 on two. Short spins cost nothing on quiet cores.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        from finetune.app.run import run  # only now: it imports torch
        from finetune.report.reading import number

        result = run(conf, folder, overrides)
    except RefusedError:
        raise
    except InUseError as error:  # another process does this very run, and writes its result
        complain(str(error))
        return 1, None
    except Exception as error:  # a mistake, or a fault of the program: a sweep goes on after either
        record_failure(folder, overrides, error)
        is_expected = isinstance(error, EXPECTED_ERRORS)
        text = str(error) if is_expected else fault_line(error, where_traceback(folder, error))
        if not folder.is_dir():
            gone = "it was moved or removed while the run worked in it; resume=PATH continues it where it lies now"
            text = f"{folder} is gone ({text}): {gone}"
        complain(text)
        return 1, None
    score = number(result.get(str(result.get("monitor", "val/top1"))))
    return 0, score if math.isfinite(score) else None
