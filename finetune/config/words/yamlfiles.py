"""The yaml files under `conf/`: where they are found, and what is wrong with each, by file and line.

Uses PyYAML alone. OmegaConf reads the same files again when Hydra composes; here all mistakes are found at once, and
one unreadable file does not hide the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.config import nearest
from finetune.config.words.settings import NUMBER_WORDS, SECTIONS, SETTINGS, convert, is_interpolation, nearest_setting
from finetune.system.errors import UserError

SCHEMA_NAME = "finetune_schema"  # first in the defaults list of conf/config.yaml, and so the mark of a file of ours
PRIMARY = "config"


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates: OmegaConf reads 2024-01-01 as text, too."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class Entry:
    """One line of a defaults list.

    Attributes:
        group: The group, empty for a sibling file; None for `_self_` and the schema.
        options: The files chosen in it; none where it is null.
        override: Whether it changes a choice made elsewhere instead of adding one.
        line: Where it stands, from 1.
        exotic: Whether it places its contents elsewhere (`@package`): left to Hydra.
        optional: Whether the file may be missing.
    """

    group: str | None
    options: list[str]
    override: bool = False
    line: int = 0
    exotic: bool = False
    optional: bool = False


@dataclass
class YamlFile:
    """One file, read as far as possible.

    Attributes:
        path: Where it is.
        values: Dotted key to converted value, of all that is good.
        defaults: Its defaults list.
        problems: One line each, with file and line.
        unread: Sections of which something could not be read.
        package: The section that its contents go to; empty for the top.
    """

    path: Path
    package: str
    values: dict[str, Any] = field(default_factory=dict)
    defaults: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


def shown(path: Path) -> str:
    """A path as short as it can be: from the current folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def builtin_folder() -> Path:
    """The configuration of the package itself: `<repository>/conf` in a source tree, `<package>/conf` installed."""
    package = Path(__file__).resolve().parent.parent.parent
    source = package.parent / "conf"
    # A neighbour of site-packages/finetune that happens to be called conf is not ours: look for the mark.
    return source if is_primary(source / f"{PRIMARY}.yaml") else package / "conf"


def folders(config_dir: str | None = None) -> list[Path]:
    """The folders that are searched, the first match wins: `--config-dir`, `./conf`, the built-in one.

    Raises:
        FileNotFoundError: `config_dir` is no folder.
    """
    found = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise FileNotFoundError(f"--config-dir {config_dir}: no such folder")
        found.append(Path(config_dir).resolve())
    local = Path.cwd() / "conf"
    if local.is_dir():
        found.append(local.resolve())
    found.append(builtin_folder())
    return list(dict.fromkeys(found))


def is_primary(path: Path) -> bool:
    """Whether this `config.yaml` is one of ours: its defaults list names our schema.

    A `./conf/config.yaml` of some other project in the current folder must not replace ours.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(rf"^\s*-\s*{SCHEMA_NAME}\b", text, re.MULTILINE) is not None


def primary_file(searched: Sequence[Path]) -> Path:
    """The `config.yaml` that names the groups and the default choices."""
    for folder in searched:
        if is_primary(folder / f"{PRIMARY}.yaml"):
            return folder / f"{PRIMARY}.yaml"
    raise FileNotFoundError(f"{searched[-1] / PRIMARY}.yaml is missing or not ours: install finetune again")


def find_option(searched: Sequence[Path], group: str, option: str) -> Path | None:
    """The file that `group=option` stands for, or None."""
    name = option.removesuffix(".yaml")
    if ".." in Path(name).parts or Path(name).is_absolute():
        return None
    for folder in searched:
        path = folder / group / f"{name}.yaml"
        if name and path.is_file():
            return path
    return None


def options(searched: Sequence[Path], group: str) -> dict[str, Path]:
    """Every choice of a group with the file that wins."""
    found: dict[str, Path] = {}
    for folder in searched:
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def read_yaml(path: Path, package: str) -> YamlFile:
    """Read a file and hold it against the schema.

    Args:
        path: The file.
        package: The section that its contents belong to where it has no `# @package` line; empty for the top.
    """
    file = YamlFile(path, package)
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        file.problems.append(_unreadable(path, error))
        file.unread.add(package.partition(".")[0])
        return file
    file.package = _package(text, package)
    if root is None:
        return file
    if not isinstance(root, yaml.MappingNode):
        _report(file, file.package, root.start_mark.line + 1, "expected lines like `key: value`")
        return file
    loader = _Loader("")
    try:
        _read_mapping(file, loader, root, file.package, depth=0)
    finally:
        loader.dispose()
    return file


def _unreadable(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None) if isinstance(error, yaml.MarkedYAMLError) else None
    if isinstance(error, yaml.MarkedYAMLError):
        reason = error.problem or error.context or "not yaml"
    elif isinstance(error, UnicodeDecodeError):
        reason = "not saved as UTF-8 text"
    elif isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
    else:
        reason = str(error).splitlines()[0]
    where = f", line {mark.line + 1}" if mark is not None else ""
    return f"{shown(path)}{where}: cannot be read: {' '.join(reason.split())}"


def _package(text: str, default: str) -> str:
    """What `# @package NAME` in the leading comment lines says, or `default` where there is none."""
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return default
        found = re.match(r"\s*#\s*@package\s+(\S+)", line)
        if found:
            return {"_global_": "", "_group_": default}.get(found[1], found[1])
    return default


def _read_mapping(file: YamlFile, loader: _Loader, node: yaml.MappingNode, section: str, *, depth: int) -> None:
    """Check one level of a file; good values go to `file.values`."""
    seen: dict[str, int] = {}
    for key_node, value_node in _pairs(file, loader, node, section, depth):
        line = key_node.start_mark.line + 1
        word = str(key_node.value)
        if word in seen:
            _report(file, section, line, f"{word} is given twice (first in line {seen[word]})")
        seen[word] = line
        if not section and word == "hydra":
            continue  # Hydra's own settings; Hydra checks them
        if depth == 0 and word == "defaults":
            file.defaults = list(_read_defaults(file, loader, value_node, section))
            continue
        name = f"{section}.{word}" if section else word
        if name in SETTINGS:
            _read_value(file, loader, value_node, name, line)
        elif name in SECTIONS and isinstance(value_node, yaml.MappingNode):
            _read_mapping(file, loader, value_node, name, depth=depth + 1)
        elif name in SECTIONS:
            _report(file, name, line, f"{name} holds settings of its own; write them indented below it")
        elif "." in word:
            head, _, tail = word.partition(".")
            nested = f"write `{head}:` and below it `{tail}:`"
            _report(file, section, line, f"{word}: dots work on the command line only; {nested}")
        else:
            _report(file, section, line, f"{name}: no such setting{nearest_setting(name)}")


def _pairs(
    file: YamlFile, loader: _Loader, node: yaml.MappingNode, section: str, depth: int
) -> list[tuple[yaml.Node, yaml.Node]]:
    """The entries of a mapping, merge keys (`<<`) resolved."""
    if depth > 20:  # an alias that holds itself
        _report(file, section, node.start_mark.line + 1, "an alias (`*name`) contains itself")
        return []
    if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
        own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        try:
            loader.flatten_mapping(node)
        except yaml.YAMLError:
            _report(file, section, node.start_mark.line + 1, "`<<` needs a mapping behind it")
            return own
        names = {key.value for key, _ in own}
        return [pair for pair in node.value if pair in own or pair[0].value not in names]
    return list(node.value)


def _report(file: YamlFile, section: str, line: int, problem: str) -> None:
    file.problems.append(f"{shown(file.path)}, line {line}: {problem}")
    file.unread.add(section.partition(".")[0])


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    """The Python value of a node.

    Raises:
        ValueError: It is something that a configuration cannot hold.
    """
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{node.tag} is nothing that a setting can hold") from error


def _read_value(file: YamlFile, loader: _Loader, node: yaml.Node, name: str, line: int) -> None:
    section = name.rpartition(".")[0]
    try:
        value = _plain(loader, node)
        number = NUMBER_WORDS.get(name, {}).get(value) if isinstance(value, str) else None
        if number is not None:  # Hydra, which reads the file too, takes numbers alone there
            raise UserError(f"{name}={value} is for the command line; in a file write {number}, which says the same")
        if not is_interpolation(value):
            file.values[name] = convert(SETTINGS[name], value)
    except ValueError as error:
        _report(file, section, line, str(error))


def _read_defaults(file: YamlFile, loader: _Loader, node: yaml.Node, section: str) -> Iterator[Entry]:
    if not isinstance(node, yaml.SequenceNode):
        _report(file, section, node.start_mark.line + 1, "defaults: expected a list, such as `- data: folder`")
        return
    for item in node.value:
        line = item.start_mark.line + 1
        try:
            entry = _entry(_plain(loader, item), line)
        except ValueError as error:
            _report(file, section, line, f"defaults: {error}")
            continue
        yield entry


def _entry(value: Any, line: int) -> Entry:
    """One line of a defaults list from its plain value.

    Raises:
        ValueError: It has another shape.
    """
    if isinstance(value, str):
        if value in ("_self_", SCHEMA_NAME):
            return Entry(None, [value], line=line)
        group, _, option = value.rpartition("/")
        return Entry(group, [option.partition("@")[0]], line=line, exotic="@" in value)
    if not isinstance(value, dict) or len(value) != 1:
        raise UserError("expected `- group: choice`")
    words, chosen = next(iter(value.items()))
    *marks, group = str(words).split()
    if set(marks) - {"override", "optional"}:
        raise UserError(f"`{words}`: expected `group`, `override /group` or `optional group`")
    chosen = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
    names = [str(option) for option in chosen]
    exotic = "@" in group or any("${" in name for name in names)
    return Entry(group, names, "override" in marks, line, exotic, "optional" in marks)


def missing(searched: Sequence[Path], group: str, option: str) -> str:
    """Why `group=option` is no choice: what there is, which is nearest, how to add one."""
    for folder in searched:
        if (folder / group / f"{option}.yml").is_file():
            return f"{group}={option}: {shown(folder / group / option)}.yml has to end in .yaml"
    found = list(options(searched, group))
    words = f"expected one of {', '.join(found)}" if found else "there are none yet"
    own = f"your own goes into ./conf/{group}/{option}.yaml"
    return f"{group}={option}: no such choice, {words}{nearest(option, found)}; {own}"
