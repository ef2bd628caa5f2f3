"""The configuration in a run directory's `config.yaml`, which `resume=` starts from."""

import os
from pathlib import Path
from typing import Any

from finetune.config.conf import Conf, find_problems
from finetune.config.words.settings import SETTINGS, build, read_tree
from finetune.system.errors import ConfigError
from finetune.system.reading import DamagedError, read_yaml


def read_conf(run_dir: Path) -> Conf:
    """The configuration of the run in `run_dir`; a ConfigError where `run_dir` holds none, or a damaged one.

    A setting that is newer than the run has its default.
    """
    conf = base_of(run_dir)
    if problems := find_problems(conf):
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in problems])
    return conf


def base_of(run_dir: Path) -> Conf:
    """`read_conf` without the rules between settings, since words beside `resume=run_dir` may still change them.

    The folder may come from a stranger: `data.allow_pipe` is false, whatever the file says.
    """
    path = run_dir / "config.yaml"
    if not os.path.lexists(path):
        lack = "it has no config.yaml, so no run was begun there" if run_dir.exists() else "there is no such folder"
        raise ConfigError([f"resume={run_dir}: {lack}; give a run directory, such as outputs/<date>/<time>"])
    try:
        reading = read_tree(read_yaml(path, dict[str, Any], mend="restore the file, or start a new run"))
    except DamagedError as error:
        raise ConfigError([str(error)]) from None
    if reading.problems:
        lost = "; another version of finetune wrote it"
        lines = [f"{path}: {text}{'' if name in SETTINGS else lost}" for name, text in reading.problems.items()]
        raise ConfigError(lines)
    if reading.references:  # a run writes values; a reference could bring in a variable of the environment
        name = min(reading.references)
        raise ConfigError([f"{path}: {name} is a reference ${{...}}, which no run writes; put its value there"])
    return build({**reading.values, "data.allow_pipe": False})
