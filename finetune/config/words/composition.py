"""Hydra composes the yaml files here, from the folders `--config-dir`, `./conf` and the built-in one.

The primary configuration is stored in Hydra under a name of our own, so that a `config.yaml` in some other project's
`./conf` cannot take its place. The schema's defaults are stored as plain values without types, so that mistakes in yaml
files pass through the composition, and `problems.py` finds all of them at once.
"""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config.conf import PLACES, RULED, Conf, as_dict, find_problems
from finetune.config.environment import escaped, keep_reference
from finetune.config.fields import show
from finetune.config.words import choices
from finetune.config.words.references import Reference, fill_in, fill_in_one
from finetune.config.words.settings import (
    PATH_SETTINGS,
    SECTIONS,
    SETTINGS,
    Reading,
    absolute_place,
    build,
    path_as_typed,
    read_tree,
    with_words,
)
from finetune.system.errors import ConfigError, UserError
from finetune.system.reading import ANY_OF_YAML, yaml_text

PRIMARY_NAME = "finetune_primary_config"
# Hydra 1.4 warns when it is told which version's defaults to use, 1.3 when it is not.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


# Words that yaml may read as something else than a text; the others need no second look.
_MAY_BE_READ = re.compile(r"[-+.0-9][-+.\w:]*|true|false|yes|no|on|off", re.IGNORECASE)


_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class _Folders(SearchPathPlugin):
    """Puts the user's folders ahead of the built-in one, also for completion and `--info`."""

    searched: tuple[Path, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.searched):
            search_path.prepend("finetune", f"{_CheckedFiles.scheme()}://{folder}")


class _CheckedFiles(FileConfigSource):
    """Yaml files of the user, also those that a defaults list brings in: each is checked before Hydra reads it."""

    @staticmethod
    def scheme() -> str:
        return "checked"

    def is_config(self, config_path: str) -> bool:
        # A pipe, a folder or a broken link in the place of a file is no missing choice: `load_config` names it.
        return os.path.lexists(os.path.join(self.path, self._normalize_file_name(config_path)))

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path, self._normalize_file_name(config_path))
        if os.path.lexists(path):
            node, group = choices.read_nodes(path), config_path.rpartition("/")[0]
            found = [*_misread_defaults(node), *_altered(node, group), *_misplaced(path, node, group)]
            if found:
                raise ConfigError([f"{choices.shown(path)}, line {line}" for line in found])
        return super().load_config(config_path)


def register(searched: Sequence[Path], base: Conf | None = None) -> None:
    """Tell Hydra the folders, the primary configuration and the values that the yaml files are laid over.

    For a run that is continued, its configuration `base` takes the place of the schema's defaults and of all default
    choices. A ConfigError where the primary configuration is missing or damaged.
    """
    primary, groups = choices.read_primary(searched), choices.default_choices(searched).keys()
    if base is not None:
        entries = primary["defaults"]
        chosen_none = [dict.fromkeys(e) if isinstance(e, dict) and e.keys() & groups else e for e in entries]
        primary = {"defaults": chosen_none, "hydra": primary.get("hydra", {})}
    store = ConfigStore.instance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1.4 warns of storing a name again, as the second command in a process does
        start = Conf(auto=list(RULED)) if base is None else replace(base, chosen=[])
        store.store(name=choices.SCHEMA_NAME, node=with_words(escaped(as_dict(start))))
        store.store(name=PRIMARY_NAME, node=OmegaConf.create(primary))
    _Folders.searched = tuple(folder for folder in searched if folder != choices.builtin_folder())
    for plugin in (_Folders, _CheckedFiles):
        Plugins.instance().register(plugin)


class Composition:
    """The yaml files as Hydra composes them for one list of overrides; `register` comes first.

    Attributes:
        overrides: In Hydra's grammar, without sweeps.
        cfg: The composed tree, with Hydra's own settings.
        reading: The settings in it, with references filled in.
    """

    def __init__(self, searched: Sequence[Path], overrides: list[str]) -> None:
        """Compose; where Hydra cannot, a ConfigError of one line, with the file where it is known."""
        self._searched, self.overrides = searched, overrides
        try:
            with _hydra():
                self.cfg = hydra.compose(PRIMARY_NAME, self.overrides, return_hydra_config=True)
            self.reading = read_composed(self.cfg)
            filled = fill_in(self.cfg, self.reading.references)
            self.reading.references = {}
            self.reading.add(filled.reading)
        except ANY_OF_HYDRA as error:
            raise ConfigError([self._explained(error)]) from error

    def setter(self, name: str) -> tuple[Path, int] | None:
        """The yaml file that sets the setting `name`, and the line in it, from 1; None where no file does."""
        for entry in reversed(self._entries):  # the last one wins
            path = self._file(str(entry.config_path))
            inside = name.removeprefix(f"{entry.package}.") if entry.package else name
            if path is None or (entry.package and inside == name):
                continue
            line = _line_of(choices.read_nodes(path), inside)
            if line is not None:
                return path, line
        return None

    def place(self, name: str) -> str:
        """`setter` as a prefix for a message; empty where no file sets `name`."""
        found = self.setter(name)
        return "" if found is None else f"{choices.shown(found[0])}, line {found[1]}: "

    @cached_property
    def _entries(self) -> list[ResultDefault]:
        """The yaml files that Hydra lays over each other, in this order."""
        with _hydra():
            loader = GlobalHydra.instance().config_loader()
            entries: list[ResultDefault] = loader.compute_defaults_list(
                PRIMARY_NAME, self.overrides, RunMode.RUN
            ).defaults
            return entries

    def filled(self, name: str, reference: Reference) -> Reading:
        """The setting `name`, as if `reference` stood in its place."""
        return fill_in_one(self.cfg, name, reference).reading

    def _file(self, config_path: str) -> Path | None:
        """The yaml file that Hydra knows as `data/folder`; None for the schema and for Hydra's own nodes."""
        if config_path == PRIMARY_NAME:
            return choices.primary_file(self._searched)
        group, _, option = config_path.rpartition("/")
        return choices.find_option(self._searched, group, option)

    def _explained(self, error: BaseException) -> str:
        """An error of the composition in one line, with the file and line of the defaults list that it came from."""
        if isinstance(error, ConfigError):
            return error.problems[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            return choices.unreadable(Path(error.problem_mark.name), error)
        if isinstance(error, RecursionError):
            return f"{' '.join(self.overrides)}: a defaults list brings in itself"
        group, _, word = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")
        if unmatched := re.search(r"Could not override '([^']+)'\. No match in the defaults list", str(error)):
            word = unmatched[1]
            groups = ", ".join(choices.default_choices(self._searched))
            problem = f"override /{word}: no such group, expected one of {groups}"
        elif word and not group.startswith("hydra"):
            problem = choices.missing_option(self._searched, group, word)
        else:
            return one_line(error)
        # Hydra's message names the file with the bad entry, or the primary one; then it is a file that was chosen.
        named = re.findall(r"^In '([^']+)'", str(error))
        chosen = [override.lstrip("+").replace("'", "").replace("=", "/") for override in self.overrides]
        for path in filter(None, map(self._file, [*named, *chosen])):
            for number, line in enumerate(yaml_text(path, follow=True).splitlines(), start=1):
                if line.lstrip().startswith("-") and word in line:
                    return f"{choices.shown(path)}, line {number}: {problem}"
        return problem


def _line_of(node: yaml.Node | None, name: str) -> int | None:
    """The number of the line, from 1, that sets the dotted key `name`; None where none does."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if key.value == name:
                return int(key.start_mark.line) + 1
            if name.startswith(f"{key.value}.") and (line := _line_of(value, name[len(key.value) + 1 :])):
                return line
    return None


def _altered(node: yaml.Node | None, group: str, name: str = "") -> Iterator[str]:
    """The texts in a yaml file of `group` that yaml reads as something else, such as 010 as 8: `3: data.classes: ...`.

    `name` is the dotted key of `node`, as far as the file has it.
    """
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _altered(value, group, f"{name}.{key.value}" if name else str(key.value))
        return
    known = [key for key in (name, f"{group}.{name}") if key in SETTINGS]
    if not known or SETTINGS[known[0]].kind not in (str, list[str]):
        return
    for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(part, yaml.ScalarNode) and part.style is None and _MAY_BE_READ.fullmatch(part.value):
            read = OmegaConf.create(f"a: {part.value}").a
            if read is not None and str(read) != part.value:
                why = f"{known[0]}: yaml reads {part.value} as {show(read)}; put it in quotes: '{part.value}'"
                yield f"{part.start_mark.line + 1}: {why}"


def _misread_defaults(node: yaml.Node | None) -> Iterator[str]:
    """What Hydra cannot take in the list `defaults` of a yaml file, whose name it does not say: `3: defaults: ...`."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for entries in (value for key, value in pairs if key.value == "defaults"):
        if not isinstance(entries, yaml.SequenceNode):
            yield f"{entries.start_mark.line + 1}: defaults: expected a list with lines like `- model: clip`"
            continue
        for word in (part for entry in entries.value for part in _words_of(entry) if not _is(part, _TEXT)):
            why = "expected lines like `- model: clip`, or `- _self_`"
            if isinstance(word, yaml.ScalarNode):
                why = f"yaml reads {word.value or 'nothing'} as no text; put it in quotes: '{word.value}'"
            yield f"{word.start_mark.line + 1}: defaults: {why}"


def _words_of(entry: yaml.Node) -> list[yaml.Node]:
    """The parts of an entry of a list `defaults` that have to be texts; null in the place of a choice is allowed."""
    if not isinstance(entry, yaml.MappingNode) or len(entry.value) != 1:
        return [] if _is(entry, _NULL) else [entry]
    key, value = entry.value[0]
    if isinstance(value, yaml.SequenceNode):
        return [*value.value, key]
    return [key] if _is(value, _NULL) else [value, key]


def _is(node: yaml.Node, tag: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and bool(node.tag == tag)


def _misplaced(path: Path, node: yaml.Node | None, group: str) -> Iterator[str]:
    """Why an experiment would set nothing, or settings of a section `experiment` that does not exist."""
    if group != "experiment":
        return
    if node is None:
        yield "1: the file is empty: expected settings, such as `optim: {lr: 3e-4}`"
    elif not re.search(r"^#\s*@package\s+_global_\s*$", yaml_text(path, follow=True), re.MULTILINE):
        yield "1: an experiment begins with the line `# @package _global_`, since it sets keys of all groups"


def file_problem(path: Path) -> str | None:
    """Why Hydra cannot read this yaml file, in one line; None where it can."""
    try:
        choices.read_nodes(path)
        tree = OmegaConf.load(path)
    except ConfigError as error:
        return error.problems[0]
    except (*ANY_OF_YAML, OSError, RecursionError, OmegaConfBaseException) as error:
        return choices.unreadable(path, error)
    return None if isinstance(tree, DictConfig) else f"{choices.shown(path)}, line 1: expected lines like `key: value`"


def _hydra() -> AbstractContextManager[None]:
    return hydra.initialize_config_dir(str(choices.builtin_folder()), job_name="finetune", **VERSION_BASE)


def read_composed(cfg: DictConfig) -> Reading:
    """The settings in a composition of Hydra; references such as `${optim.lr}` are not filled in."""
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    return read_tree({name: part for name, part in tree.items() if name != "hydra"})


def to_conf(cfg: DictConfig, start: Path | None = None) -> Conf:
    """A composition as the typed configuration, with references and `~` filled in; a ConfigError for bad values.

    Places become absolute, from the folder `start` (None: the current one), in which a person typed them.
    """
    reading = read_composed(cfg)
    filled = fill_in(cfg, reading.references)
    values = reading.values | filled.reading.values
    reading.problems |= filled.reading.problems
    values |= {name: path_as_typed(values[name]) for name in PATH_SETTINGS if values.get(name) is not None}
    here = str(start or Path.cwd())
    values |= {name: absolute_place(name, values[name], here) for name in PLACES if values.get(name)}
    problems = list(reading.problems.values()) or find_problems(build(values))
    if problems:
        raise ConfigError(problems)
    for name in filled.kept:
        keep_reference(name, values[name], reading.references[name])
    return build(values)


def config_as_yaml(cfg: DictConfig, *, package: str, resolve: bool) -> str:
    """The text of `--cfg job`: the part `package` of a composition, such as `optim`; empty: all but Hydra's own."""
    if not package:
        keys = [str(key) for key in cfg if key != "hydra"]
        return OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, keys), resolve=resolve)
    part = OmegaConf.select(cfg, package)
    if not OmegaConf.is_config(part):
        raise UserError(f"--package {package}: no such part, expected one of {', '.join(sorted(SECTIONS))}")
    return f"# @package {package}\n{OmegaConf.to_yaml(part, resolve=resolve)}"


# Lines that OmegaConf adds for its own developers.
_NOISE = ("full_key:", "object_type=", "reference_type=", "See https://")


def one_line(error: BaseException) -> str:
    """An error of Hydra or OmegaConf, with its cause, in one line."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).partition("Config search path:")[0].splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        parts += [text] if text and text not in " ".join(parts) else []
        current = current.__cause__
    return ": ".join(parts) or type(error).__name__


# On odd input, Hydra's code also raises other exceptions than its own.
ANY_OF_HYDRA = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, ArithmeticError, AssertionError, AttributeError),
    *(LookupError, RecursionError, TypeError, ValueError),
)
