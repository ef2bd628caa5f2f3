"""Hands runs and sweeps to Hydra's launchers, and says inside a job which one it is."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from finetune.config.words.choices import builtin_folder
from finetune.config.words.composition import ANY_OF_HYDRA, PRIMARY_NAME, VERSION_BASE, one_line, register
from finetune.system.errors import ConfigError


def launch(task: Callable[[DictConfig], Any], arguments: Sequence[str], searched: Sequence[Path]) -> None:
    """Hand over to Hydra, which runs `task` once a job: a run, a sweep, or one of Hydra's own commands.

    `arguments` are flags and overrides in Hydra's grammar; `searched` are the folders of yaml files.

    Raises:
        ConfigError: In place of Hydra's and OmegaConf's exceptions.
        SystemExit: Hydra's own commands end this way.
    """
    register(searched)
    program, before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program[0], *arguments]
    # Hydra would print a stack trace; with this it raises instead, and the error becomes one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(builtin_folder()), config_name=PRIMARY_NAME, **VERSION_BASE)(task)()
    except ConfigError:
        raise
    except ANY_OF_HYDRA as error:
        raise ConfigError([one_line(error)]) from error
    finally:
        sys.argv = program
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@dataclass
class RunningJob:
    """What Hydra says about the job that is running; `number` and `sweep` are None for a single run."""

    folder: Path  # the job's output folder
    overrides: list[str]
    number: int | None  # of the job in its sweep
    sweep: Path | None  # the sweep's folder, absolute
    start: Path  # the folder in which the command was typed


def current_job() -> RunningJob:
    """The job that Hydra is running; to be called inside a task."""
    config = HydraConfig.get()
    multirun = config.mode is not None and config.mode.name == "MULTIRUN"
    number = int(config.job.num) if multirun else None
    folder, start = Path(str(config.runtime.output_dir)), Path(str(config.runtime.cwd))
    # Hydra has made the folder absolute; a person would not type that. Not where `hydra.job.chdir` has gone there.
    if folder.is_relative_to(start) and start == Path.cwd():
        folder = folder.relative_to(start)
    sweep = Path(os.path.abspath(start / str(config.sweep.dir))) if multirun else None
    task: Any = OmegaConf.to_container(config.overrides.task, resolve=False)  # as typed: a reference may hold a secret
    return RunningJob(folder, [str(text) for text in task], number, sweep, start)
