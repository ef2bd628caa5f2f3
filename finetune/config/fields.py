"""Parts of a section of the settings: words out of a list, fields with a meaning and a range, and common rules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from enum import Enum
from typing import Any, TypeVar

from finetune.system.errors import UserError


class Choice(str, Enum):
    """A word out of a closed list. Members equal their plain string, so `conf.mode == "linear"` holds."""

    def __str__(self) -> str:
        """The plain word."""
        return str(self.value)


def setting(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its range, which `find_problems` checks and `--help-all` shows.

    Args:
        default: The value where nothing sets it; a list is copied for each instance.
        help: One line with the unit and what the default means.
        gt: The value must be greater than this.
        ge: The value must be greater or equal.
        lt: The value must be less than this.
        le: The value must be less or equal.
    """
    metadata = {"help": help, "gt": gt, "ge": ge, "lt": lt, "le": le}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


C = TypeVar("C", bound=Choice)


def nearest(word: str, words: Iterable[str]) -> str:
    """The valid word most like the one that was typed, as ` (did you mean 'x'?)`, or nothing where none is close."""
    valid = list(words)
    same = [candidate for candidate in valid if candidate.lower() == word.lower()]
    found = same or difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def member_of(kind: type[C], word: str, key: str) -> C:
    """The member of `kind` that `word` names.

    Raises:
        UserError: The word is not in the list; the error names the list and the nearest word.
    """
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
    return {name: now[name] for name in names if _plain(now[name]) != _plain(fresh[name])}


def _plain(value: object) -> object:
    """A yaml file gives a pair as a list, the schema as a tuple."""
    return list(value) if isinstance(value, (list, tuple)) else value


def ignored(section: str, conf: Any, reasons: Mapping[str, str]) -> list[str]:
    """One line for each setting that was changed although nothing reads it.

    Args:
        section: Name of the section, such as `optim`.
        conf: The section.
        reasons: Name of a setting to why nothing reads it, given the other settings.
    """
    return [
        f"{section}.{name}={show(value)} would be ignored: {reasons[name]}"
        for name, value in changed(conf, *reasons).items()
    ]


def not_read_by(group: str, chosen: str, readers: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The settings that `group=chosen` does not read, each with the choices that do, as `ignored` takes them.

    Args:
        group: Name of the group, such as `optim`.
        chosen: The choice that was made.
        readers: Name of a setting to the choices that read it.
    """
    return {
        name: f"{group}={chosen} does not read it; {' or '.join(f'{group}={kind}' for kind in kinds)} does"
        for name, kinds in readers.items()
        if chosen not in kinds
    }
