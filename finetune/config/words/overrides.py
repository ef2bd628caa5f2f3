"""The words `KEY=VALUE` of a command line, read by Hydra's own grammar."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, OverrideType, QuotedString, RangeSweep
from hydra.errors import HydraException

from finetune.config.fields import show
from finetune.config.words.quoting import altered, quote, quote_override
from finetune.config.words.settings import SETTINGS, describe_kind

MAX_JOBS = 10_000  # of one sweep
MAX_LETTERS = 2**17  # of one word; Linux passes no longer ones
MAX_DEPTH, SHOWN = 50, 60
_SIGNS = {OverrideType.CHANGE: "", OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}
_SWEEPS = {ChoiceSweep: "choice", RangeSweep: "range", IntervalSweep: "interval", Glob: "glob"}


class _AlteredError(Exception):
    """A text that Hydra's grammar reads as a number or as true or false."""


@dataclass(frozen=True)
class Override:
    """One setting or choice from the command line."""

    text: str  # as typed
    safe: str  # the same in Hydra's grammar: paths in quotes
    key: str  # dotted key or group
    sign: str  # empty, `+`, `++` or `~`
    # The value; several for a sweep; the ends of an interval; none for a glob, or a range that does not end.
    values: tuple[Any, ...]
    sweep: str  # empty, or the kind of sweep: choice, range, interval or glob
    glob: Glob | None  # picks the options of a group that match, for `GROUP=glob(...)`

    @property
    def is_hydra(self) -> bool:
        """Whether it is one of Hydra's own settings or groups."""
        return self.key.partition(".")[0].partition("/")[0] == "hydra"

    @property
    def first(self) -> str:
        """The override with the first value of its sweep; empty where there is none, as for a glob."""
        if not self.sweep or not self.values:
            return "" if self.sweep else self.safe
        value = quote(self.values[0]) if isinstance(self.values[0], str) else show(self.values[0])
        return f"{self.safe.partition('=')[0]}={value}"


def parse_overrides(typed: Sequence[str], *, multirun: bool) -> tuple[list[Override], list[str]]:
    """Every override that Hydra's grammar can read, and one line for every other word."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in typed:
        if reason := _beyond_limits(text):
            problems.append(f"{text[:SHOWN]}...: {reason}")
            continue
        try:
            parsed.append(_parse(parser, text, quote_override(text, multirun=multirun)))
        except _AlteredError as error:
            problems.append(str(error))
        except (HydraException, ValueError, ArithmeticError) as error:
            problems.append(_unparsable(text, error))
    return parsed, problems


def _beyond_limits(text: str) -> str:
    """Why a word is too much for Hydra's grammar, which would take minutes and overflow the stack; empty: it is not."""
    if len(text) > MAX_LETTERS:
        return f"has {len(text):,} letters, at most {MAX_LETTERS:,} are read: write a yaml file"
    depth = 0
    for bracket in re.findall(r"[\[\](){}]", text):
        depth += 1 if bracket in "[({" else -1
        if depth > MAX_DEPTH:
            return f"has more than {MAX_DEPTH} brackets inside each other"
    return ""


def _parse(parser: OverridesParser, text: str, safe: str) -> Override:
    parsed = parser.parse_override(safe)
    if not parsed.key_or_group:
        raise ValueError
    assert parsed.type is not None
    key = parsed.key_or_group if parsed.package is None else f"{parsed.key_or_group}@{parsed.package}"
    value: Any = parsed.value()
    sweep = _SWEEPS.get(type(value), "")
    if isinstance(value, ChoiceSweep):
        values = tuple(_unquoted(item) for item in value.list)
    elif isinstance(value, RangeSweep):
        values = tuple(parsed.sweep_iterator()) if _ends(value) else ()
    elif isinstance(value, IntervalSweep):
        values = (value.start, value.end)
    else:
        values = () if sweep else (_unquoted(value),)
    if sweep in ("", "choice") and not key.startswith("hydra") and (read := altered(key, values, text)) is not None:
        raise _AlteredError(f"{text}: a text in it is read as {read}; put each text in quotes, such as ['1_1','no']")
    return Override(text, safe, key, _SIGNS[parsed.type], values, sweep, value if sweep == "glob" else None)


def _ends(sweep: RangeSweep) -> bool:
    """Whether a range has at most MAX_JOBS values."""
    assert sweep.start is not None and sweep.stop is not None
    start, stop, step = float(sweep.start), float(sweep.stop), float(sweep.step)
    return all(map(math.isfinite, (start, stop, step))) and step != 0 and (stop - start) / step <= MAX_JOBS


def _unquoted(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    if isinstance(value, dict):
        return {_unquoted(key): _unquoted(item) for key, item in value.items()}
    return value


def _unparsable(text: str, error: Exception) -> str:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        reason = "nothing in front of the =" if equals else "cannot be read"
        return f"'{text}': {reason}; write KEY=VALUE without spaces around the =, such as optim.lr=1e-3"
    if key not in SETTINGS:
        hint = f"text with special characters goes in two pairs of quotes: '{key}=\"{text.partition('=')[2]}\"'"
    elif isinstance(SETTINGS[key].default, list):
        hint = f"each text of a list goes in quotes of its own: \"{key}=['one','two']\""
    else:
        hint = f"expected {describe_kind(SETTINGS[key])}, such as {key}={show(SETTINGS[key].default)}"
    reason = str(error).partition(" expecting ")[0].partition("\n")[0] or "no key"
    return f"{text}: cannot be read ({reason}); {hint}"
