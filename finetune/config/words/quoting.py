"""Paths and texts as people type them, quoted where Hydra's grammar needs it. Standard library only."""

import re

from finetune.config.words.settings import PATH_SETTINGS, SETTINGS, path_as_typed

# Values that Hydra reads as a sweep; no path or text may look like one without quotes.
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NESTED = re.compile(r"\$\{[^{}'\"]*\$\{[^'\"]*\}")
# Letters that stand for themselves in Hydra's grammar.
_PLAIN = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|: ]*")


def quote(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar, which doubles backslashes only ahead of a quote."""
    escaped = re.sub(r"(?<!\\)(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _split_values(text: str) -> list[str]:
    """Split `text` at its commas, but not at those in a quoted value."""
    return re.findall(rf"((?:{_QUOTED.pattern})(?=,)|[^,]*),", f"{text},", re.DOTALL)


def _quote_value(text: str, *, path: bool) -> str:
    """One value, quoted where it is a path, or a text that the grammar would refuse."""
    if _QUOTED.fullmatch(text) or text == "null":
        return text
    if path:
        return quote(path_as_typed(text))
    return text if _PLAIN.fullmatch(text) else quote(text)


def quote_override(text: str, *, multirun: bool) -> str:
    """An override in Hydra's grammar, with paths and texts quoted, so that they work as people type them.

    Values already in quotes, sweeps (`choice(...)`) and settings that are no text stay as they are. In a multirun a
    comma separates values, so a path with a comma needs quotes there.
    """
    key, equals, value = text.partition("=")
    name = key.lstrip("+")
    path = name in PATH_SETTINGS
    if not equals or _SWEEP.fullmatch(value):
        return text
    if not (path or (name in SETTINGS and SETTINGS[name].kind is str)):
        # The grammar reads no reference within another, such as `${oc.decode:${oc.env:N}}`, without quotes.
        return f"{key}={quote(value)}" if _NESTED.fullmatch(value) else text
    values = _split_values(value) if multirun or not path else [value]
    return f"{key}=" + ",".join(_quote_value(part, path=path) for part in values)
