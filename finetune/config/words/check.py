"""One look at everything a person chose, before any work: every problem, in one line each.

Hydra stops at the first mistake and reads yaml files that no schema has seen. This pass goes ahead of it: over the
choices, each yaml that takes part, each override, and the ranges, in every cell of a sweep. What cannot be read does
not hide the rest. It merges the files as Hydra does (a test holds that); the run itself uses Hydra's own composition.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config import find_problems
from finetune.config.words.settings import SECTIONS, SETTINGS, build, convert, is_interpolation, nearest_setting, show
from finetune.config.words.yamlfiles import (
    Entry,
    YamlFile,
    find_option,
    missing,
    options,
    primary_file,
    read_yaml,
    shown,
)

MAX_JOBS = 10_000  # of one sweep
MAX_CELLS = 2_000  # up to which every combination is looked at; beyond it, every value


@dataclass(frozen=True)
class Override:
    """One setting or choice from the command line, parsed by Hydra's own grammar.

    Attributes:
        text: As typed.
        key: Dotted key or group.
        sign: Empty, `+`, `++` or `~`.
        values: The value; several for a sweep; the patterns of a glob; the ends of an interval.
        sweep: Empty, or which kind of sweep: choice, range, interval or glob.
        excluded: The patterns that a glob leaves out.
        safe: As Hydra's grammar wants it: paths in quotes.
    """

    text: str
    key: str
    sign: str = ""
    values: tuple[Any, ...] = ()
    sweep: str = ""
    excluded: tuple[str, ...] = ()
    safe: str = ""

    @property
    def is_hydra(self) -> bool:
        """Whether it is one of Hydra's own settings or groups."""
        return self.key.partition(".")[0].partition("/")[0] == "hydra"


@dataclass
class Findings:
    """What the pass found.

    Attributes:
        problems: One line each, without repetition.
        jobs: How many runs the command line asks for.
        values: Dotted key to value, of the first of them.
    """

    problems: list[str] = field(default_factory=list)
    jobs: int = 1
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, *problems: str) -> None:
        """Keep those that are not there yet."""
        for problem in problems:
            if problem not in self.problems:
                self.problems.append(problem)


@dataclass
class Tree:
    """The yaml files of one set of choices, merged.

    Attributes:
        values: Dotted key to converted value.
        problems: What is wrong with the files.
        unread: Sections of which something could not be read; empty name: the top.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)


class Reader:
    """Reads and merges the yaml files of `searched`; each file once.

    Attributes:
        searched: The folders.
        own: Settings of a run that is continued, dotted key to value: they take the place of all files but those
            chosen on the command line. Empty for a new run.
    """

    def __init__(self, searched: Sequence[Path]) -> None:
        """Find the primary configuration.

        Raises:
            FileNotFoundError: There is none.
        """
        self.searched = list(searched)
        self.own: dict[str, Any] = {}
        self._files: dict[tuple[Path, str], YamlFile] = {}
        self.primary = self._read(primary_file(searched), "")
        entries = [e for e in self.primary.defaults if e.group and not e.override]
        self.defaults = {str(entry.group).lstrip("/"): entry.options for entry in entries}

    @property
    def groups(self) -> list[str]:
        """The groups that a command line chooses from, in their order."""
        return list(self.defaults)

    def _read(self, path: Path, package: str) -> YamlFile:
        if (path, package) not in self._files:
            self._files[path, package] = read_yaml(path, package)
        return self._files[path, package]

    def tree(self, chosen: dict[str, list[str]]) -> Tree:
        """The files that take part where the command line chose `chosen` (group to options)."""
        if self.own:
            return Tree({**self.own, **self._set_by(chosen)})
        choices = dict(chosen)
        # What an experiment overrides is known only once it is read; the command line wins over it.
        for entry, file in self._walk(self.primary, "", chosen, ()):
            if entry.override and entry.group and file is None:
                choices.setdefault(entry.group.lstrip("/"), entry.options)
        tree = Tree()
        self._merge(self.primary, "", choices, (), tree)
        for group in chosen.keys() - self.defaults.keys():  # +group=choice: a group of the user's own
            self._merge_options(Entry(group, chosen[group]), "", self.primary, chosen, (), tree)
        return tree

    def _set_by(self, chosen: dict[str, list[str]]) -> dict[str, Any]:
        """What the files of these choices set, with the choices that they make in turn."""
        tree = Tree()
        for group, names in chosen.items():
            for path in (find_option(self.searched, group, name) for name in names):
                if path is not None:
                    file = self._read(path, group.replace("/", "."))
                    for entry in file.defaults:
                        if entry.override and entry.group:
                            tree.values |= self._set_by({entry.group.lstrip("/"): entry.options})
                    self._merge(file, group, {}, (path,), tree)
        return tree.values

    def _children(
        self, entry: Entry, group: str, parent: YamlFile, choices: dict[str, list[str]]
    ) -> Iterator[tuple[str, str, YamlFile | None]]:
        """(group, option, file or None where it is missing) of what one defaults entry brings in."""
        assert entry.group is not None
        if entry.group.startswith("/"):
            child = entry.group.lstrip("/")
        else:
            child = "/".join(part for part in (group, entry.group) if part)
        package = parent.package if not entry.group else child.replace("/", ".")
        if entry.exotic or (entry.group and parent.package and not child.startswith(group)):
            return  # placed somewhere by Hydra's package rules, which are not told again here
        for option in choices.get(child, entry.options) if entry.group else entry.options:
            path = find_option(self.searched, child, option)
            yield child, option, None if path is None else self._read(path, package)

    def _walk(
        self, parent: YamlFile, group: str, choices: dict[str, list[str]], above: tuple[Path, ...]
    ) -> Iterator[tuple[Entry, YamlFile | None]]:
        """Every defaults entry reachable from `parent`, with its file; no file for `override` entries."""
        for entry in parent.defaults:
            if entry.group is None or entry.override:
                yield entry, None
                continue
            for child, _, file in self._children(entry, group, parent, choices):
                if file is not None and file.path not in above:
                    yield entry, file
                    yield from self._walk(file, child, choices, (*above, file.path))

    def _merge(
        self, file: YamlFile, group: str, choices: dict[str, list[str]], above: tuple[Path, ...], tree: Tree
    ) -> None:
        """Lay `file` and what its defaults bring in over `tree`, in Hydra's order."""
        tree.problems += file.problems
        tree.unread |= file.unread
        own_last = not any(entry.options == ["_self_"] for entry in file.defaults)
        for entry in file.defaults:
            if entry.options == ["_self_"]:
                tree.values.update(file.values)
            elif entry.override:
                self._check_override(entry, file, choices, tree)
            elif entry.group is not None:
                self._merge_options(entry, group, file, choices, above, tree)
        if own_last:
            tree.values.update(file.values)

    def _merge_options(
        self,
        entry: Entry,
        group: str,
        parent: YamlFile,
        choices: dict[str, list[str]],
        above: tuple[Path, ...],
        tree: Tree,
    ) -> None:
        for child, option, file in self._children(entry, group, parent, choices):
            if file is None:
                if not entry.optional and option not in choices.get(child, []):
                    tree.problems.append(
                        f"{shown(parent.path)}, line {entry.line}: {missing(self.searched, child, option)}"
                    )
                tree.unread.add(child)
            elif file.path in above:
                tree.problems.append(f"{shown(parent.path)}, line {entry.line}: {shown(file.path)} brings in itself")
            else:
                self._merge(file, child, choices, (*above, file.path), tree)

    def _check_override(self, entry: Entry, file: YamlFile, choices: dict[str, list[str]], tree: Tree) -> None:
        group = str(entry.group).lstrip("/")
        if group.startswith("hydra/") or entry.exotic:
            return
        where = f"{shown(file.path)}, line {entry.line}: "
        if group not in self.defaults:
            tree.problems.append(f"{where}override /{group}: no such group, expected one of {', '.join(self.groups)}")
            return
        for option in entry.options:
            if find_option(self.searched, group, option) is None:
                tree.problems.append(where + missing(self.searched, group, option))
                tree.unread.add(group)


@dataclass
class _Plan:
    """What the overrides ask for: every alternative of every group and setting."""

    groups: dict[str, list[list[str]]] = field(default_factory=dict)
    settings: dict[str, list[Any]] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    findings: Findings = field(default_factory=Findings)

    def refuse(self, key: str, problem: str) -> None:
        self.findings.add(problem)
        self.unread.add(key.partition(".")[0])


def check(overrides: Sequence[Override], reader: Reader, *, multirun: bool) -> Findings:
    """Every problem with the choices, the files, the overrides and the ranges; of every cell of a sweep.

    Args:
        overrides: The command line.
        reader: The folders that are searched.
        multirun: Whether several values are allowed.
    """
    plan = _Plan()
    free_sweeper = any(override.key == "hydra/sweeper" for override in overrides)
    for override in overrides:
        if override.sweep and not multirun:
            plan.refuse(override.key, _needs_multirun(override))
            if override.key in SETTINGS and isinstance(SETTINGS[override.key].default, (list, tuple)):
                continue  # one list was meant: its parts are no values
        if not override.is_hydra:
            _plan_override(plan, override, reader, free_sweeper)
        else:
            _check_hydra_setting(plan, override, multirun)
    axes: list[list[Any]] = [*plan.groups.values(), *plan.settings.values()]
    plan.findings.jobs = math.prod(len(axis) for axis in axes)
    if plan.findings.jobs > MAX_JOBS:
        plan.findings.add(f"this sweep has {plan.findings.jobs:,} jobs; at most {MAX_JOBS:,} are run at once")
    _check_cells(plan, reader)
    return plan.findings


def _check_hydra_setting(plan: _Plan, override: Override, multirun: bool) -> None:
    """Hydra checks its own settings when it composes; here is what it would accept and then ignore."""
    if override.sweep and multirun:
        plan.refuse("hydra", f"{override.text}: a sweep cannot vary Hydra's own settings")
    if override.key == "hydra.run.dir" and multirun:
        plan.refuse("hydra", f"{override.text}: would be ignored, a sweep goes to hydra.sweep.dir=PATH")
    if override.key == "hydra.sweep.dir" and not multirun:
        plan.refuse("hydra", f"{override.text}: would be ignored, a single run goes to hydra.run.dir=PATH")
    if override.key == "hydra.searchpath":
        plan.refuse("hydra", f"{override.text}: use --config-dir DIR")


def _needs_multirun(override: Override) -> str:
    several = f"{override.text}: this gives several values; add -m to run each of them"
    key = SETTINGS.get(override.key)
    if key is not None and isinstance(key.default, (list, tuple)):
        return f"{several}, or write one list: {override.key}=[{override.text.partition('=')[2]}]"
    if key is not None and key.kind is str:
        return f"{several}, or put the value in quotes: '{override.key}=\"{override.text.partition('=')[2]}\"'"
    return several


def _plan_override(plan: _Plan, override: Override, reader: Reader, free_sweeper: bool) -> None:
    """Sort one override into the plan, or say what is wrong with it."""
    name, group = override.key, override.key in reader.groups
    own_group = override.sign == "+" and not group and "." not in name and bool(options(reader.searched, name))
    if not (group or own_group or name in SETTINGS or name in SECTIONS):
        sign = f"; {override.sign} adds nothing: the settings are a closed list" if override.sign else ""
        close = nearest_setting(name, reader.groups)
        plan.refuse(name, f"{override.text}: no such setting or group{close}{sign}{_how_to_list(close)}")
    elif override.sign == "~":
        plan.refuse(name, f"{override.text}: nothing can be removed with ~; leave {name} out for its default")
    elif (override.sign == "+" and not own_group) or (override.sign == "++" and group):
        plain = override.text.lstrip("+")
        plan.refuse(name, f"{override.text}: {name} is there already; write it without the {override.sign}: {plain}")
    elif override.sweep == "interval" and not free_sweeper:
        plan.refuse(
            name,
            f"{override.text}: interval(...) is for sweepers that draw values (hydra/sweeper=...); the basic one needs"
            f" them listed, {name}=A,B,C or {name}=range(A,B,STEP)",
        )
    elif (group or own_group) and not any(isinstance(value, dict) for value in override.values):
        _plan_choice(plan, override, reader)
    elif override.sweep == "glob":
        plan.refuse(name, f"{override.text}: glob(...) picks files of a group; {name} is a setting")
    else:
        _plan_setting(plan, override)


def _how_to_list(close: str) -> str:
    return "" if close else "; finetune --help and finetune --cfg job list them"


def _plan_choice(plan: _Plan, override: Override, reader: Reader) -> None:
    """`model=clip`, `model=clip,vit`, `model=glob(*)`, `experiment=[a,b]`."""
    group, good = override.key, []
    names = list(options(reader.searched, group))
    if override.sweep == "glob":
        wanted = [name for name in names if any(fnmatch.fnmatch(name, str(p)) for p in override.values)]
        values: list[Any] = [n for n in wanted if not any(fnmatch.fnmatch(n, p) for p in override.excluded)]
        if not values:
            plan.refuse(group, f"{override.text}: matches none of {', '.join(names)}")
    else:
        values = list(override.values)
    for value in values:
        if is_interpolation(value):
            continue
        if value is None:
            plan.refuse(group, f"{group}=null: a group is chosen or left out; one of {', '.join(names)}")
            continue
        if isinstance(value, list) and group != "experiment":
            plan.refuse(group, f"{override.text}: takes one choice; to run each, add -m and write {group}=A,B")
            continue
        chosen = [str(option) for option in value] if isinstance(value, list) else [str(value)]
        lost = [option for option in chosen if find_option(reader.searched, group, option) is None]
        for option in lost:
            plan.refuse(group, missing(reader.searched, group, option))
        if not lost:
            good.append(chosen)
    if good:
        plan.groups[group] = good


def _plan_setting(plan: _Plan, override: Override) -> None:
    """`optim.lr=1e-3`, `optim.lr=1e-3,1e-4`, `optim={lr: 1e-3}`."""
    found: dict[str, list[Any]] = {}
    for value in override.values:
        for name, leaf in _leaves(override.key, value):
            if name not in SETTINGS:
                plan.refuse(name, f"{override.text}: {_not_a_setting(name)}")
                continue
            try:
                if not is_interpolation(leaf):
                    good = convert(SETTINGS[name], leaf)
                    found.setdefault(name, []).append(good)
            except ValueError as error:
                plan.refuse(name, str(error))
    if override.sweep != "interval":
        plan.settings.update(found)


def _not_a_setting(name: str) -> str:
    if name in SECTIONS:
        inside = [key for key in SETTINGS if key.startswith(f"{name}.")]
        return f"{name} holds settings of its own, such as {inside[0]}={show(SETTINGS[inside[0]].default)}"
    return f"no such setting {name}{nearest_setting(name)}"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings in a `{...}` value."""
    if isinstance(value, dict) and name not in SETTINGS:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value


def _check_cells(plan: _Plan, reader: Reader) -> None:
    """Files and ranges of every combination; beyond MAX_CELLS of every value, the others held at their first."""
    names = [*plan.groups, *plan.settings]
    axes: list[list[Any]] = [*plan.groups.values(), *plan.settings.values()]
    trees: dict[tuple[tuple[str, ...], ...], Tree] = {}
    for cell in _cells(axes):
        by_name = dict(zip(names, cell, strict=True))
        chosen = {group: by_name[group] for group in plan.groups}
        key = tuple(tuple(choice) for choice in chosen.values())
        if key not in trees:
            trees[key] = reader.tree(chosen)
            plan.findings.add(*trees[key].problems)
        tree = trees[key]
        values = {**tree.values, **{name: by_name[name] for name in plan.settings}}
        plan.findings.values = plan.findings.values or values
        conf = build(values)
        alone = find_problems(conf, SECTIONS)  # each setting by itself
        unread = tree.unread | plan.unread | {line.partition("=")[0].partition(".")[0] for line in alone}
        plan.findings.add(*alone, *find_problems(conf, SECTIONS if "" in unread else unread))


def _cells(axes: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    if math.prod(len(axis) for axis in axes) <= MAX_CELLS:
        yield from itertools.product(*axes)
        return
    first = [axis[0] for axis in axes]
    for position, axis in enumerate(axes):
        for value in axis:
            yield (*first[:position], value, *first[position + 1 :])
