"""Paths and texts as people type them, quoted where Hydra's grammar needs it. Standard library only."""

from __future__ import annotations

import re

from finetune.config.words.settings import PATH_SETTINGS, SETTINGS, path_as_typed

# What Hydra reads as a sweep, and so is never taken for a path or a text.
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
# Letters that stand for themselves in Hydra's grammar.
_PLAIN = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|: ]*")


def quote(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar: backslashes are doubled only where they stand ahead of a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _split_values(text: str) -> list[str]:
    """`text` at its commas, but for those in a quoted value."""
    values, rest = [], text
    while True:
        quoted = _QUOTED.match(rest)
        if quoted and (quoted.end() == len(rest) or rest[quoted.end()] == ","):
            end = quoted.end()
        else:
            end = rest.find(",") if "," in rest else len(rest)
        values.append(rest[:end])
        if end == len(rest):
            return values
        rest = rest[end + 1 :]


def _quote_value(text: str, *, path: bool) -> str:
    """One value quoted where that is needed: a path always, another text where the grammar would refuse it."""
    if _QUOTED.fullmatch(text) or text == "null":
        return text
    if path:
        return quote(path_as_typed(text))
    return text if _PLAIN.fullmatch(text) else quote(text)


def quote_override(text: str, *, multirun: bool) -> str:
    """An override as Hydra's grammar wants it: paths and texts work as people type them.

    Values already in quotes, sweeps (`choice(...)`) and all keys that hold no single text stay as they are. In a
    multirun a comma separates values, so a path that holds one needs quotes there.
    """
    key, equals, value = text.partition("=")
    name = key.lstrip("+")
    path = name in PATH_SETTINGS
    if not equals or not (path or (name in SETTINGS and SETTINGS[name].kind is str)) or _SWEEP.fullmatch(value):
        return text
    values = _split_values(value) if multirun or not path else [value]
    return f"{key}=" + ",".join(_quote_value(part, path=path) for part in values)
