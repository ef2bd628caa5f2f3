"""Every mistake of a command line and its yaml files, one line each, in every job of a sweep, before any work.

`sort_overrides` looks at the command line before Hydra composes the yaml files, `check_cells` at the composed settings.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.conf import find_problems
from finetune.config.words.choices import default_choices, find_option, missing_option, options
from finetune.config.words.composition import Composition
from finetune.config.words.overrides import MAX_JOBS, Override
from finetune.config.words.references import Reference
from finetune.config.words.settings import SECTIONS, SETTINGS, Reading, build, nearest_setting, read_tree
from finetune.system.errors import ConfigError

# Up to so many combinations, each is checked; beyond, every value alone. Composing one takes a quarter of a second.
MAX_CELLS, MAX_COMPOSED = 2_000, 50


@dataclass
class Request:
    """The overrides of a command line, sorted."""

    # Group, with the sign as typed, to its alternatives, each a list of options; that of `experiment=[a,b]` has two.
    choices: dict[str, list[list[str]]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)  # dotted key to every value
    settings: list[Override] = field(default_factory=list)  # also Hydra's own, without the wrong ones
    problems: list[str] = field(default_factory=list)  # one line each, without repetition
    unread: set[str] = field(default_factory=set)  # sections of which a choice or value could not be read

    @property
    def jobs(self) -> int:
        """The number of runs."""
        return math.prod(map(len, (*self.choices.values(), *self.values.values())))

    def add(self, *problems: str) -> None:
        """Add those problems that are not there yet."""
        self.problems += [line for line in dict.fromkeys(problems) if line not in self.problems]


def sort_overrides(overrides: Sequence[Override], searched: Sequence[Path], *, multirun: bool) -> Request:
    """Look up the choices and read the values of a command line, with several values only in a `multirun`."""
    request, groups = Request(), list(default_choices(searched))
    free_sweeper = any(override.key == "hydra/sweeper" for override in overrides)
    for override in overrides:
        name = override.key
        is_own = override.sign == "+" and "." not in name and name not in groups and bool(options(searched, name))
        is_choice = (name in groups or is_own) and not any(isinstance(value, dict) for value in override.values)
        if override.sweep and not multirun:
            found = [_needs_multirun(override)]
        elif override.is_hydra:
            found = _hydra_problems(override, multirun=multirun)
        elif misplaced := _misplaced(override, groups, is_own=is_own, free_sweeper=free_sweeper):
            found = [misplaced]
        elif is_choice:
            found = _take_choice(request, override, searched)
        else:
            found = _take_values(request, override)
        request.add(*found)
        if found:
            request.unread.add(name.partition(".")[0])
        elif not is_choice:
            request.settings.append(override)
    if request.jobs > MAX_JOBS:
        request.add(f"this sweep has {request.jobs:,} jobs; at most {MAX_JOBS:,} are run at once")
    return request


def _needs_multirun(override: Override) -> str:
    several = f"{override.text}: this gives several values; add -m to run each of them"
    setting, value = SETTINGS.get(override.key), override.text.partition("=")[2]
    if setting is not None and isinstance(setting.default, (list, tuple)):
        return f"{several}, or write one list: {override.key}=[{value}]"
    if setting is not None and setting.kind is str:
        return f"{several}, or put the value in quotes: '{override.key}=\"{value}\"'"
    return several


WRITES_ITSELF = "leave it out: finetune writes config.yaml and run.log itself, and Hydra writes nothing"


def _hydra_problems(override: Override, *, multirun: bool) -> list[str]:
    """Why a setting of Hydra's own would be ignored; all its other mistakes Hydra finds itself."""
    ignored = {
        "hydra.run.dir": "would be ignored, a sweep goes to hydra.sweep.dir=PATH" if multirun else "",
        "hydra.sweep.dir": "" if multirun else "would be ignored, a single run goes to hydra.run.dir=PATH",
        "hydra.searchpath": "use --config-dir DIR",
        # Hydra would write into the folder of a run, whatever is there.
        **dict.fromkeys(("hydra.output_subdir", "hydra/job_logging", "hydra/hydra_logging"), WRITES_ITSELF),
    }
    is_nothing = override.text.endswith(("=null", "=none"))  # our own choice for the last three
    varied = "a sweep cannot vary Hydra's own settings" if override.sweep else ""
    found = ("" if is_nothing else ignored.get(override.key)) or varied
    return [f"{override.text}: {found}"] if found else []


def _misplaced(override: Override, groups: Sequence[str], *, is_own: bool, free_sweeper: bool) -> str:
    """Why this key, sign or sweep is wrong, whatever the value; empty where it is right."""
    name, text, sign = override.key, override.text, override.sign
    is_group = name in groups or is_own
    if not (is_group or name in SETTINGS or name in SECTIONS):
        close = nearest_setting(name, groups)
        closed = f"; {sign} adds nothing: the settings are a closed list" if sign else ""
        lists = "" if close else "; finetune --help and finetune --help-all list them"
        return f"{text}: no such setting or group{close}{closed}{lists}"
    if sign == "~":
        return f"{text}: nothing can be removed with ~; leave {name} out for its default"
    if (sign == "+" and not is_own) or (sign == "++" and is_group):
        return f"{text}: {name} is there already; write it without the {sign}: {text.lstrip('+')}"
    if override.sweep == "interval" and not free_sweeper:
        listed = f"list the values, {name}=A,B,C or {name}=range(A,B,STEP)"
        return f"{text}: interval(...) is for sweepers that draw values (hydra/sweeper=...); else {listed}"
    if override.sweep == "range" and not override.values:
        return f"{text}: range(START,STOP,STEP) has to end, after 1 to {MAX_JOBS:,} values"
    if override.sweep == "glob" and not is_group:
        return f"{text}: glob(...) picks files of a group; {name} is a setting"
    return ""


def _take_choice(request: Request, override: Override, searched: Sequence[Path]) -> list[str]:
    """Look up `model=clip`, `model=clip,vit`, `model=glob(*)` or `experiment=[a,b]`; returns the problems."""
    group, names, good, problems = override.key, list(options(searched, override.key)), [], []
    values = override.values if override.glob is None else override.glob.filter(names)
    if not values:
        problems.append(f"{override.text}: matches none of {', '.join(names)}")
    for value in values:
        chosen = [str(option) for option in value] if isinstance(value, list) else [str(value)]
        lost = [option for option in chosen if find_option(searched, group, option) is None]
        if value is None:
            problems.append(f"{group}=null: a group is chosen or left out; one of {', '.join(names)}")
        elif isinstance(value, list) and group != "experiment":
            problems.append(f"{override.text}: takes one choice; to run each, add -m and write {group}=A,B")
        elif lost:
            problems += [missing_option(searched, group, option) for option in lost]
        else:
            good.append(chosen)
    if good:
        request.choices[override.sign + group] = good
    return problems


def _take_values(request: Request, override: Override) -> list[str]:
    """Read `optim.lr=1e-3`, `optim.lr=1e-3,1e-4` or `optim={lr: 1e-3}`; returns the problems."""
    found: dict[str, list[Any]] = {}
    problems: list[str] = []
    for value in override.values:
        reading = read_tree(value, override.key)
        for name, good in reading.values.items():
            found.setdefault(name, []).append(good)
        for name, problem in reading.problems.items():
            problems.append(problem if problem.startswith(f"{name}=") else f"{override.text}: {problem}")
        for name, text in reading.references.items():
            found.setdefault(name, []).append(Reference(text))
    if override.sweep != "interval":
        request.values |= found
    return problems


def check_cells(request: Request, compose: Callable[[dict[str, list[str]]], Composition]) -> Composition | None:
    """Check the settings of every combination of choices and values, and add the mistakes to `request.problems`.

    Beyond MAX_COMPOSED combinations of choices, or MAX_CELLS in all, every choice or value is checked alone, beside the
    first of the others. `compose` composes one combination (group to options); it may raise a ConfigError.

    Returns:
        The first job's composition; None where it failed.
    """
    found: list[Composition | None] = []
    combinations = list(_combinations(request.choices, MAX_COMPOSED))
    for chosen in combinations:
        composed, reading, unread = None, Reading(), set(SECTIONS)
        try:
            composed = compose(chosen)
            reading, unread = composed.reading, request.unread | composed.reading.unread
        except ConfigError as error:
            request.add(*error.problems)
        found.append(composed)
        lines = dict.fromkeys(reading.problems.items())
        values = request.values if composed is None else _filled(request, composed)
        for cell in _combinations(values, MAX_CELLS // len(combinations)):
            for line in find_problems(build({**reading.values, **cell}), unread):
                name = line.partition("=")[0]
                lines[name if name in SETTINGS and name not in cell else "", line] = None
        for name, line in lines:
            request.add(f"{composed.place(name) if composed is not None and name else ''}{line}")
    return found[0]


def _filled(request: Request, composed: Composition) -> dict[str, list[Any]]:
    """The values of the command line with references filled in; adds the mistakes in them to `request`."""
    axes: dict[str, list[Any]] = {}
    for name, axis in request.values.items():
        for value in axis:
            if isinstance(value, Reference):
                reading = composed.filled(name, value)
                request.add(*reading.problems.values())
                axes.setdefault(name, []).extend(reading.values.values())
            else:
                axes.setdefault(name, []).append(value)
    return axes


def _combinations(axes: dict[str, list[Any]], most: int) -> Iterator[dict[str, Any]]:
    """One value for every name, in every combination; beyond `most` of them, every value beside the others' first."""
    names = list(axes)
    if math.prod(len(axis) for axis in axes.values()) <= most:
        yield from (dict(zip(names, cell, strict=True)) for cell in itertools.product(*axes.values()))
        return
    first = {name: axis[0] for name, axis in axes.items()}
    yield from ({**first, name: value} for name, axis in axes.items() for value in axis)
