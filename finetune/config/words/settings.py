"""Every setting by its dotted key, out of the dataclasses in `finetune/config`; the conversion of typed values."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from finetune.config.conf import AUTO, PLACES, RULED, Conf, leaves
from finetune.config.data import REMOTE
from finetune.config.fields import nearest, show
from finetune.system.errors import UserError

BOOLS = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(("false", "no", "off", "n", "0"), False)


@dataclass(frozen=True)
class Setting:
    """One setting of the schema."""

    name: str  # dotted, as typed: `optim.layer_decay`
    kind: Any  # its type without the `| None`: int, float, bool, str, an Enum class, `list[str]` or a tuple of floats
    optional: bool  # whether `null` is a value
    field: dataclasses.Field[Any]  # its metadata holds meaning and range
    default: Any

    @property
    def meaning(self) -> str:
        """One line for a person."""
        return str(self.field.metadata["help"])

    @property
    def shown(self) -> Any:
        """What it is where nobody sets it, as a person writes it."""
        return AUTO if self.name in RULED else as_word(self.name, self.default)

    @property
    def words(self) -> list[str]:
        """The valid words where the setting takes one out of a list; empty for any other."""
        is_enum = isinstance(self.kind, type) and issubclass(self.kind, Enum)
        return [str(member.value) for member in self.kind] if is_enum else []


def _setting(name: str, section: object, item: dataclasses.Field[Any]) -> Setting:
    kind, optional = typing.get_type_hints(type(section))[item.name], False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # the schema has no unions but `X | None`
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        optional = True
    return Setting(name, kind, optional, item, getattr(section, item.name))


SETTINGS: dict[str, Setting] = {name: _setting(name, section, item) for name, section, item in leaves(Conf())}
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(name.partition(".")[0] for name in SETTINGS if "." in name))

# Settings that are paths, whose values are never read as a number or a list.
PATH_SETTINGS = (
    *PLACES,
    *("resume", "model.pretrained_key", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"),
)
# Words that stand for a number, which nobody may write in their place.
NUMBER_WORDS: dict[str, dict[str, int]] = {"data.batch_size": {"fit": 0}}


def describe_kind(setting: Setting) -> str:
    """The values that may stand behind the `=`, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if setting.words:
        words = "one of " + ", ".join(setting.words)
    elif typing.get_origin(setting.kind) is tuple:
        shown = ",".join(f"{part:g}" for part in setting.default)
        words = f"a list of {len(setting.default)} numbers, such as [{shown}]"
    else:
        words = names.get(setting.kind, "a list of texts, such as ['a','b']")
    words = " or ".join([words, *_extra_words(setting.name)])
    return f"{words} or null" if setting.optional else words


def _extra_words(name: str) -> list[str]:
    """The words that may stand in the place of a number."""
    return [*NUMBER_WORDS.get(name, {}), *([AUTO] if name in RULED else [])]


def is_interpolation(value: Any) -> bool:
    """Whether this is a reference `${...}`, or a list with one, which OmegaConf fills in later."""
    return "${" in value if isinstance(value, str) else isinstance(value, list) and any(map(is_interpolation, value))


def convert(setting: Setting, value: Any) -> Any:
    """`value`, from a yaml file or the command line, in the setting's type; a UserError where it does not fit.

    The word `auto` stays a word, see `build`.
    """
    if value is None and setting.optional:
        return None
    if value == AUTO and setting.name in RULED:
        return AUTO
    if isinstance(value, str) and value in NUMBER_WORDS.get(setting.name, {}):
        return NUMBER_WORDS[setting.name][value]
    if value == "???":
        raise UserError(f"{setting.name}=???: a value has to be given ({setting.meaning})")
    try:
        return _checked(setting, _read(setting.kind, value))
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError):
        pass  # the error below says what was expected
    close = nearest(str(value), [*setting.words, *_extra_words(setting.name)])
    if value is False and "off" in setting.words:
        close = " (yaml reads a bare off as false: write 'off')"
    elif setting.kind in (str, list[str]) and any(isinstance(part, bool) for part in _as_list(value)):
        close = " (yaml reads yes, no, on, off, true and false as no text: put such a word in quotes, 'no')"
    meaning = "" if close or setting.words else f" ({setting.meaning})"
    raise UserError(f"{setting.name}={show(value)}: expected {describe_kind(setting)}{close}{meaning}")


def _checked(setting: Setting, value: Any) -> Any:
    """`value`, as `_read` gives it; a UserError for a number that only its word may stand for, or one below it."""
    for word, number in NUMBER_WORDS.get(setting.name, {}).items():
        if value <= number:
            wanted = f"write {setting.name}={word}" if value == number else f"must be {word}, or at least {number + 1}"
            raise UserError(f"{setting.name}={value}: {wanted} ({setting.meaning})")
    return value


def with_words(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings nested by section, with a word where they have the number that stands for it, such as `auto` for 0."""
    for name in NUMBER_WORDS:
        section, _, last = name.partition(".")
        values = tree.get(section)
        if isinstance(values, dict) and last in values:
            values[last] = as_word(name, values[last])
    return tree


def as_word(name: str, value: Any) -> Any:
    """`value`, or the word that stands for it where the setting `name` has one, such as `auto` for 0."""
    words = {number: word for word, number in NUMBER_WORDS.get(name, {}).items()}
    return words.get(value, value) if type(value) is int else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(kind: Any, value: Any) -> Any:
    """`value` as a `kind`; any of ValueError, TypeError, OverflowError where it is none."""
    if kind is bool and isinstance(value, (bool, int, str)) and str(value).lower() in BOOLS:  # True, 1 and "yes"
        return BOOLS[str(value).lower()]
    if value is None or kind is bool or isinstance(value, bool):
        raise TypeError
    if (kind is int and isinstance(value, float)) or (kind is str and not isinstance(value, (str, int, float))):
        raise TypeError
    if isinstance(kind, type) and not typing.get_args(kind):  # int, float, str or an Enum
        return kind(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(part, item) for part, item in zip(parts, value, strict=True))
    return [_read(parts[0], item) for item in value]


@dataclass
class Reading:
    """The settings in a tree of values, read as far as possible."""

    values: dict[str, Any] = field(default_factory=dict)  # dotted key to converted value
    problems: dict[str, str] = field(default_factory=dict)  # dotted key to the mistake in its value, in one line
    references: dict[str, Any] = field(default_factory=dict)  # dotted key to a `${...}` that is not filled in yet

    @property
    def unread(self) -> set[str]:
        """Sections of which some value is not known."""
        return {name.partition(".")[0] for name in (*self.problems, *self.references)}

    def add(self, other: Reading) -> None:
        """Add the settings of another tree."""
        self.values |= other.values
        self.problems |= other.problems
        self.references |= other.references


def read_tree(tree: Any, name: str = "") -> Reading:
    """Convert every setting in nested dictionaries, as a yaml file or `optim={lr: 1e-3}` gives them.

    `name` is the dotted key of `tree`, which may be a single value; empty for a whole configuration.
    """
    reading = Reading()
    if name in SETTINGS:
        try:
            if is_interpolation(tree):
                reading.references[name] = tree
            else:
                reading.values[name] = convert(SETTINGS[name], tree)
        except UserError as error:
            reading.problems[name] = str(error)
    elif isinstance(tree, dict) and (not name or name in SECTIONS):
        for word, value in tree.items():
            inner = read_tree(value, f"{name}.{word}" if name else str(word))
            if "." in str(word):
                nested = f"write `{str(word).partition('.')[0]}:` and the rest indented below it"
                inner = Reading(problems={f"{name}.{word}": f"{word}: dots work on the command line only; {nested}"})
            reading.add(inner)
    elif name in SECTIONS:
        example = next(setting for setting in SETTINGS.values() if setting.name.startswith(f"{name}."))
        shown = f"such as {example.name}={show(example.default)}"
        reading.problems[name] = f"{name} holds settings of its own, {shown}; in a file they stand indented below it"
    else:
        reading.problems[name] = f"no such setting {name}{nearest_setting(name)}"
    return reading


def build(values: dict[str, Any]) -> Conf:
    """The defaults with `values` (dotted key to converted value) in their places.

    Where the value is `auto`, a run will choose it.
    """
    auto = [name for name in RULED if values.get(name) == AUTO]
    conf = Conf().with_values({name: value for name, value in values.items() if name not in auto})
    return dataclasses.replace(conf, auto=auto)


def nearest_setting(name: str, groups: Iterable[str] = ()) -> str:
    """The setting or group most like a mistyped name, as ` (did you mean 'x'?)`, or nothing."""
    last = name.rpartition(".")[2]
    # `layer_decay` finds `optim.layer_decay`: a name without its section is the commonest mistake.
    if same := [key for key in SETTINGS if key.rpartition(".")[2] == last]:
        return f" (did you mean {' or '.join(repr(key) for key in same)}?)"
    section = name.partition(".")[0]
    if section in SECTIONS and section != name:
        inside = [key.partition(".")[2] for key in SETTINGS if key.startswith(f"{section}.")]
        found = difflib.get_close_matches(name.partition(".")[2], inside, n=1, cutoff=0.6)
        return f" (did you mean '{section}.{found[0]}'?)" if found else f"; {section} has {', '.join(inside)}"
    tails: dict[str, str] = {key.rpartition(".")[2]: key for key in SETTINGS}
    found = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)
    return nearest(name, [*SETTINGS, *groups]) or (f" (did you mean '{tails[found[0]]}'?)" if found else "")


def path_as_typed(text: str) -> str:
    """`~` and `~name` at the start become the home folder; everything else, and an unknown name, stays."""
    return os.path.expanduser(text)  # pathlib raises where the name is unknown


def absolute_place(name: str, text: str, start: str) -> str:
    """The value of one of the PLACES as an absolute path, from the folder `start`; an address or a tag stays."""
    if name == "data.root":  # may hold several
        return "::".join(part if REMOTE.match(part) else _absolute(part, start) for part in text.split("::"))
    if name == "model.pretrained" and not os.path.isfile(os.path.join(start, text)):
        return text  # a tag
    return _absolute(text, start)


def _absolute(text: str, start: str) -> str:
    path = os.path.join(start, text)
    short = os.path.normpath(path)
    # Behind a link, `..` is the folder above the link's target, so it must not be cut out.
    return short if ".." not in path.split(os.sep) or os.path.realpath(short) == os.path.realpath(path) else path
