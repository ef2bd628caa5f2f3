"""The configuration that a run directory holds in its `config.yaml`: what `resume=` starts from."""

from __future__ import annotations

from pathlib import Path

import yaml

from finetune.config.conf import Conf, find_problems
from finetune.config.words.settings import SETTINGS, build, read_tree
from finetune.system.errors import ConfigError


def read_conf(run_dir: Path) -> Conf:
    """The configuration of the run in `run_dir`; a setting that is newer than the run has its default.

    Raises:
        ConfigError: It is no run directory, or the file is damaged.
    """
    conf = base_of(run_dir)
    problems = find_problems(conf)
    if problems:
        raise ConfigError([f"{run_dir / 'config.yaml'}: {problem}" for problem in problems])
    return conf


def base_of(run_dir: Path) -> Conf:
    """The same before the rules between settings are checked: words beside `resume=run_dir` may still change it.

    Raises:
        ConfigError: It is no run directory, or the file is damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError([_no_run(run_dir)])
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


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"resume={folder}: there is no such folder; give a run directory, or resume=latest"
    inside = folder.parent if folder.name == "checkpoints" else folder.parent.parent
    if folder.name in ("checkpoints", "last.pt") and (inside / "config.yaml").exists():
        return f"resume={folder}: give the run directory itself, resume={inside}"
    no_run = "it has no config.yaml, so no run was begun there"
    return f"resume={folder}: {no_run}; give a run directory, such as outputs/<date>/<time>"
