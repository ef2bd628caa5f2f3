"""Parts of a section of the settings: words out of a list, fields with a meaning and a range, and common rules."""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, field
from enum import Enum
from typing import Any, TypeVar

from finetune.system.errors import UserError


class Choice(str, Enum):
    """A word out of a closed list. Members equal their plain string, so `conf.mode == "linear"` holds."""

    def __str__(self) -> str:
        """The plain word."""
        return str(self.value)


# The bounds that a setting can have: the words for each, and the comparison that must hold.
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": ("greater than", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("less than", operator.lt),
    "le": ("at most", operator.le),
}


def setting(default: Any, help: str, *, place: bool = False, **bounds: float) -> Any:
    """A dataclass field with its range, which `find_problems` checks, and its meaning, which `--help-all` shows.

    `help` is one line, with the unit. `bounds` are any of `BOUNDS`, such as `ge=0`. A `place` is a path that a run
    may find elsewhere when it continues; `config.yaml` has it absolute.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {"help": help, "place": place, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MOST_NAMES, MOST_LETTERS = 10_000, 200  # that `nearest` compares
C = TypeVar("C", bound=Choice)


def nearest(word: str, words: Iterable[str]) -> str:
    """The valid word most like the one that was typed, as ` (did you mean 'x'?)`, or nothing where none is close."""
    valid = list(words)
    lowered = word.lower()
    same = [candidate for candidate in valid if candidate.lower() == lowered]
    # Within bounds, since the names may be a table's: comparing takes time by the product of both lengths.
    short = [name for name in valid[:MOST_NAMES] if len(name) <= MOST_LETTERS]
    found = same or difflib.get_close_matches(word[:MOST_LETTERS], short, n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def member_of(kind: type[C], word: str, key: str) -> C:
    """The member of `kind` that `word` names; a UserError with the list and the nearest word where there is none."""
    words = [member.value for member in kind]
    if word not in words:
        raise UserError(f"{key}={word}: expected one of {', '.join(words)}{nearest(str(word), words)}")
    return kind(word)


def show(value: Any) -> str:
    """A value as one would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(f"'{part}'" if isinstance(part, str) else show(part) for part in value) + "]"
    return str(value)


def changed(conf: Any, *names: str) -> dict[str, Any]:
    """Those of the settings `names` of a section that are not at their defaults, with their values, in this order."""
    now, fresh = asdict(conf), asdict(type(conf)())
    return {name: now[name] for name in names if now[name] != fresh[name]}


def ignored(section: str, conf: Any, reasons: Mapping[str, str]) -> list[str]:
    """One line for each setting of the section `conf` that was changed although nothing reads it.

    `reasons` has, for each name of a setting that nothing reads, the reason.
    """
    found = changed(conf, *reasons)
    return [f"{section}.{name}={show(value)} would be ignored: {reasons[name]}" for name, value in found.items()]


def not_read_by(group: str, chosen: str, readers: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The settings that `group=chosen` does not read, each with the reason, as `ignored` takes them.

    `readers` has, for each name of a setting, the choices that read it.
    """
    return {
        name: f"{group}={chosen} does not read it; {' or '.join(f'{group}={kind}' for kind in kinds)} does"
        for name, kinds in readers.items()
        if chosen not in kinds
    }
