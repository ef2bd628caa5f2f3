"""The configuration in a run directory's `config.yaml`, which `resume=` starts from."""

from pathlib import Path

import yaml

from finetune.config.conf import Conf, find_problems
from finetune.config.words.settings import SETTINGS, build, read_tree
from finetune.system.errors import ConfigError


def read_conf(run_dir: Path) -> Conf:
    """The configuration of the run in `run_dir`; a ConfigError where `run_dir` holds none, or a damaged one.

    A setting that is newer than the run has its default.
    """
    conf = base_of(run_dir)
    if problems := find_problems(conf):
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in problems])
    return conf


def base_of(run_dir: Path) -> Conf:
    """`read_conf` without the rules between settings, since words beside `resume=run_dir` may still change them."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        lack = "it has no config.yaml, so no run was begun there" if run_dir.exists() else "there is no such folder"
        raise ConfigError([f"resume={run_dir}: {lack}; give a run directory, such as outputs/<date>/<time>"])
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path} is damaged: it holds no settings"])
    reading = read_tree(tree)
    if reading.problems:
        lost = "; another version of finetune wrote it"
        lines = [f"{path}: {text}{'' if name in SETTINGS else lost}" for name, text in reading.problems.items()]
        raise ConfigError(lines)
    return build(reading.values)
