"""Every key that a command line or a yaml may set: its type, how a value is read, and the nearest valid name.

Derived from the schema in `config.py`; standard library only. The conversions agree with OmegaConf's (a test holds
that), but their messages say what was expected, and they can go on after the first mistake.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finetune.config import Conf, nearest
from finetune.system.errors import UserError

TRUE_WORDS = ("true", "yes", "on", "y", "1")
FALSE_WORDS = ("false", "no", "off", "n", "0")


@dataclass(frozen=True)
class Setting:
    """One setting of the schema.

    Attributes:
        name: Dotted, as typed: `optim.layer_decay`.
        kind: Its type without the `| None`: int, float, bool, str, an Enum class, `list[str]` or a tuple of floats.
        optional: Whether `null` is a value.
        field: The dataclass field, whose metadata holds meaning and range.
        default: What it is where nothing sets it.
    """

    name: str
    kind: Any
    optional: bool
    field: dataclasses.Field[Any]
    default: Any

    @property
    def meaning(self) -> str:
        """One line for a person, from the schema."""
        return str(self.field.metadata["help"])


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other type as (itself, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        assert len(kinds) == 1, f"the schema has no union types but `X | None`: {hint}"
        return kinds[0], True
    return hint, False


def _walk(conf: object, prefix: str = "") -> Iterator[Setting]:
    hints = typing.get_type_hints(type(conf))
    for item in dataclasses.fields(conf):  # type: ignore[arg-type]
        value = getattr(conf, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            kind, optional = _unwrap(hints[item.name])
            yield Setting(f"{prefix}{item.name}", kind, optional, item, value)


SETTINGS: dict[str, Setting] = {key.name: key for key in _walk(Conf())}
SECTIONS: frozenset[str] = frozenset(name.rpartition(".")[0] for name in SETTINGS if "." in name)

# Values that are paths as people type them. They are never read as a number, a list or a sweep (but see the comma).
PATH_SETTINGS = (
    "data.root",
    "data.table",
    "data.cache_dir",
    "resume",
    "model.pretrained",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
)


# Words that stand for a number.
NUMBER_WORDS: dict[str, dict[str, int]] = {"data.batch_size": {"auto": 0}}


def describe_kind(setting: Setting) -> str:
    """What may stand behind the `=`, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if setting.kind in names:
        words = names[setting.kind]
    elif isinstance(setting.kind, type) and issubclass(setting.kind, Enum):
        words = "one of " + ", ".join(str(member.value) for member in setting.kind)
    elif typing.get_origin(setting.kind) is tuple:
        shown = ",".join(f"{part:g}" for part in setting.default)
        words = f"a list of {len(typing.get_args(setting.kind))} numbers, such as [{shown}]"
    else:
        words = "a list of texts, such as ['a','b']"
    return f"{words} or null" if setting.optional else words


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(f"'{part}'" if isinstance(part, str) else show(part) for part in value) + "]"
    return str(value)


def is_interpolation(value: Any) -> bool:
    """Whether OmegaConf fills this in later (`${...}`), so that nothing can be said about it yet."""
    return isinstance(value, str) and "${" in value


def convert(setting: Setting, value: Any) -> Any:
    """What the run will see for `value`, as a yaml or the command line gave it.

    Raises:
        ValueError: It is not of the key's type; one line that says what was expected.
    """
    if value is None and setting.optional:
        return None
    if setting.name in NUMBER_WORDS and isinstance(value, str) and value in NUMBER_WORDS[setting.name]:
        return NUMBER_WORDS[setting.name][value]
    if value == "???":
        raise UserError(f"{setting.name}=???: a value has to be given ({setting.meaning})")
    try:
        return _read(setting.kind, value)
    except (ValueError, TypeError, OverflowError):
        pass  # answered below, with what was expected
    close = ""
    if isinstance(setting.kind, type) and issubclass(setting.kind, Enum):
        words = [str(member.value) for member in setting.kind]
        close = nearest(str(value), words)
        if value is False and "off" in words:
            close = " (yaml reads a bare off as false: write 'off')"
    meaning = "" if close else f" ({setting.meaning})"
    raise UserError(f"{setting.name}={show(value)}: expected {describe_kind(setting)}{close}{meaning}")


def _read(kind: Any, value: Any) -> Any:
    """`value` as a `kind`; any of ValueError, TypeError, OverflowError where it is none."""
    if kind is bool:
        return _read_bool(value)
    if value is None or (isinstance(value, bool) and kind is not str):
        raise TypeError
    if kind is int:
        if isinstance(value, float):
            raise TypeError
        return int(value)
    if kind is float:
        return float(value)
    if kind is str:
        if not isinstance(value, (str, int, float)):
            raise TypeError
        return str(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if len(value) != len(parts):
            raise ValueError
        return tuple(_read(part, item) for part, item in zip(parts, value, strict=True))
    return [_read(parts[0], item) for item in value]


def _read_bool(value: Any) -> bool:
    if isinstance(value, (bool, int)):
        return bool(value)
    word = str(value).lower()
    if isinstance(value, str) and word in TRUE_WORDS + FALSE_WORDS:
        return word in TRUE_WORDS
    raise TypeError


def build(values: dict[str, Any]) -> Conf:
    """The defaults with `values` (dotted key to converted value) in their places."""
    conf = Conf()
    for name, value in values.items():
        *sections, last = name.split(".")
        owner: Any = conf
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, last, value)
    return conf


def nearest_setting(name: str, groups: Iterable[str] = ()) -> str:
    """The setting or group that was most likely meant, as ` (did you mean 'x'?)`, or nothing.

    `layer_decay` finds `optim.layer_decay`: a name without its section is the commonest mistake.
    """
    last = name.rpartition(".")[2]
    same = [key for key in SETTINGS if key.rpartition(".")[2] == last]
    if same:
        return f" (did you mean {' or '.join(repr(key) for key in same)}?)"
    section = name.partition(".")[0]
    if section in SECTIONS and section != name:
        inside = [key.partition(".")[2] for key in SETTINGS if key.startswith(f"{section}.")]
        found = difflib.get_close_matches(name.partition(".")[2], inside, n=1, cutoff=0.6)
        return f" (did you mean '{section}.{found[0]}'?)" if found else f"; {section} has {', '.join(inside)}"
    whole = nearest(name, [*SETTINGS, *groups])
    if whole:
        return whole
    tails: dict[str, str] = {key.rpartition(".")[2]: key for key in SETTINGS}
    found = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)
    return f" (did you mean '{tails[found[0]]}'?)" if found else ""


def path_as_typed(text: str) -> str:
    """`~` and `~name` at the start become the home folder; everything else, and an unknown name, stays."""
    return os.path.expanduser(text)  # pathlib raises where the name is unknown
