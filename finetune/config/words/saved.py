"""The configuration in a run directory's `config.yaml`, which `resume=` starts from."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from finetune.config.conf import CHOSEN, Conf, as_dict, find_problems
from finetune.config.environment import escaped, plain
from finetune.config.fields import show
from finetune.config.words.settings import SETTINGS, Reading, build, convert, read_tree, with_words
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


def base_of(run_dir: Path, given: Collection[str] = ()) -> Conf:
    """`read_conf` without the rules between settings, since words beside `resume=run_dir` may still change them.

    A reference `${...}` is never filled in from the file, which may come from anybody: it could send what the
    environment holds to an address of theirs. A setting with one has to be `given` again, or it is a ConfigError. For
    the same reason `data.allow_pipe` is false, whatever the file says.
    """
    reading = _read(run_dir)
    if lost := {name: text for name, text in reading.references.items() if name not in given}:
        why = "came from the environment, which a file in a run folder may not ask; give it again beside resume="
        raise ConfigError([f"{run_dir / 'config.yaml'}: {n} {why}: '{n}={show(text)}'" for n, text in lost.items()])
    return build(reading.values)


def recorded_in(run_dir: Path) -> dict[str, Any]:
    """The settings in `config.yaml` as `environment.recorded` gives them; a ConfigError as of `read_conf`."""
    reading = _read(run_dir)
    tree: dict[str, Any] = escaped(as_dict(build(reading.values)))
    for name, text in reading.references.items():
        section, _, last = name.rpartition(".")
        (tree[section] if section else tree)[last] = text
    return tree


def _read(run_dir: Path) -> Reading:
    """The settings in `config.yaml`; those with a reference are apart."""
    path = run_dir / "config.yaml"
    if not os.path.lexists(path):
        lack = "it has no config.yaml, so no run was begun there" if run_dir.exists() else "there is no such folder"
        raise ConfigError([f"resume={run_dir}: {lack}; give a run directory, such as outputs/<date>/<time>"])
    try:
        tree = read_yaml(path, dict[str, Any], mend="restore the file, or start a new run")
    except DamagedError as error:
        raise ConfigError([str(error)]) from None
    chosen = tree.pop("chosen", [])
    reading = read_tree(with_words(tree))
    if not (isinstance(chosen, list) and all(name in CHOSEN for name in chosen)):
        reading.problems["chosen"] = f"chosen: expected a list out of {', '.join(CHOSEN)}"
    if reading.problems:
        lost = "; another version of finetune wrote it"
        lines = [f"{path}: {text}{'' if name in SETTINGS else lost}" for name, text in reading.problems.items()]
        raise ConfigError(lines)
    for name, text in list(reading.references.items()):
        if (value := plain(text)) is not None:
            reading.values[name] = convert(SETTINGS[name], value)
            del reading.references[name]
    reading.values["data.allow_pipe"] = False
    reading.values["chosen"] = chosen
    return reading
