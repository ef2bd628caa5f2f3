"""The yaml files that a choice stands for: `model=clip` is `model/clip.yaml`. No Hydra, so that `--help` is quick."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.config.fields import nearest
from finetune.system.errors import ConfigError
from finetune.system.reading import ANY_OF_YAML, UnfitError, YamlLoader, yaml_problem, yaml_text

SCHEMA_NAME = "finetune_schema"  # first in the defaults list of conf/config.yaml, and so the mark of a file of ours
PRIMARY = "config.yaml"


def shown(path: Path) -> str:
    """A path for a message: relative to the current folder where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def builtin_folder() -> Path:
    """The yaml files of this program: `<repository>/conf` in a source tree, `<package>/conf` installed."""
    package = Path(__file__).resolve().parent.parent.parent
    source = package.parent / "conf"  # installed, this may be a folder of another package in site-packages
    with contextlib.suppress(UnfitError):
        if _is_ours(source / PRIMARY):
            return source
    return package / "conf"


def folders(config_dir: str | None = None) -> list[Path]:
    """The folders to search for yaml files, the first match wins: `--config-dir`, `./conf`, the built-in one."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError([f"--config-dir {config_dir}: no such folder"])
    own = [Path(name).resolve() for name in (config_dir, "conf") if name is not None and Path(name).is_dir()]
    return list(dict.fromkeys([*own, builtin_folder()]))


def _is_ours(path: Path) -> bool:
    """Whether this `config.yaml` names our schema, and so does not belong to some other project.

    Raises:
        UnfitError: It is too large, no text, or may not be read, so nobody knows.
    """
    try:
        text = yaml_text(path, follow=True)
    except FileNotFoundError:
        return False
    return re.search(rf"^\s*-\s*{SCHEMA_NAME}\b", text, re.MULTILINE) is not None


def primary_file(searched: Sequence[Path]) -> Path:
    """The `config.yaml` that names the groups and the default choices; a ConfigError where there is none.

    One that is no file, too large, or may not be read, is not passed over: nobody knows whether it is ours.
    """
    for folder in searched:
        path = folder / PRIMARY
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.R_OK)):
            raise ConfigError([f"{shown(path)}: cannot be read: expected a file with the right to read it; move it"])
        try:
            if _is_ours(path):
                return path
        except UnfitError as error:
            raise ConfigError([f"{unreadable(path, error)}; move it, or start in another folder"]) from None
    raise ConfigError([f"{searched[-1] / PRIMARY} is missing or not ours: install finetune again"])


def read_primary(searched: Sequence[Path]) -> dict[str, Any]:
    """The content of `primary_file`; a ConfigError where it is missing or damaged."""
    path = primary_file(searched)
    try:
        tree: dict[str, Any] = yaml.load(yaml_text(path, follow=True), Loader=YamlLoader)  # a loader of plain values
    except ANY_OF_YAML as error:  # also an UnfitError
        raise ConfigError([unreadable(path, error)]) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("defaults"), list):
        raise ConfigError([f"{shown(path)}: expected lines like `key: value`, with a list `defaults`"])
    return tree


def read_nodes(path: Path) -> yaml.Node | None:
    """The nodes of a person's yaml file; a ConfigError where it is too large or too deep to go on with, or no yaml."""
    try:
        node: yaml.Node | None = yaml.compose(yaml_text(path, follow=True), Loader=YamlLoader)
    except (*ANY_OF_YAML, OSError) as error:
        raise ConfigError([unreadable(path, error)]) from None
    return node


def default_choices(searched: Sequence[Path]) -> dict[str, str | None]:
    """Every group of the primary file with its default choice; None where there is none."""
    entries = [entry for entry in read_primary(searched)["defaults"] if isinstance(entry, dict)]
    pairs = [pair for entry in entries for pair in entry.items()]
    return {group: choice for group, choice in pairs if not group.startswith("override ")}


def unreadable(path: Path, error: Exception) -> str:
    """Why a yaml file cannot be read: one line, with the line number in the file where the parser gives it."""
    where, reason = shown(path), str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        reason = error.problem or error.context or "not yaml"
        if error.problem_mark is not None:
            where += f", line {error.problem_mark.line + 1}"
    elif isinstance(error, FileNotFoundError):  # the name is there, so it is a link
        reason = "it is a link to a file that is not there"
    elif not isinstance(error, UnfitError):
        reason = yaml_problem(error)
    return f"{where}: cannot be read: {' '.join(reason.split())}"


def find_option(searched: Sequence[Path], group: str, option: str) -> Path | None:
    """The path that `group=option` stands for, or None; what is there may be no readable file, see `read_nodes`."""
    name = option.removesuffix(".yaml")
    if not name or ".." in Path(name).parts or Path(name).is_absolute():
        return None
    paths = (folder / group / f"{name}.yaml" for folder in searched)
    return next((path for path in paths if os.path.lexists(path)), None)  # False for a name that is too long


def options(searched: Sequence[Path], group: str) -> dict[str, Path]:
    """Every choice of a group with its file, in alphabetical order; the folder searched first wins."""
    found = {path.stem: path for folder in reversed(searched) for path in (folder / group).glob("*.yaml")}
    return dict(sorted(found.items()))


def missing_option(searched: Sequence[Path], group: str, option: str) -> str:
    """Why `group=option` is no choice, with the list of choices, the nearest one, and how to add one."""
    for folder in searched:
        if os.path.isfile(folder / group / f"{option}.yml"):
            return f"{group}={option}: {shown(folder / group / option)}.yml has to end in .yaml"
    found = list(options(searched, group))
    words = f"expected one of {', '.join(found)}" if found else "there are none yet"
    own = f"your own goes into ./conf/{group}/{option}.yaml"
    return f"{group}={option}: no such choice, {words}{nearest(option, found)}; {own}"
