"""Paths and texts as people type them, quoted where Hydra's grammar needs it. Standard library only."""

import re

from finetune.config.words.settings import PATH_SETTINGS, SETTINGS, path_as_typed

# Values that Hydra reads as a sweep; no path or text may look like one without quotes.
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_NESTED = re.compile(r"\$\{[^{}'\"]*\$\{[^'\"]*\}")
# Words that the grammar takes for the same text; it would read 1_1 as 11, 1e3 as 1000.0 and yes as true.
_PLAIN = re.compile(r"(?!(true|false|yes|no|on|off|null|nan|inf)$)[A-Za-z_/][A-Za-z0-9_/\-+.$%*@?|: ]*", re.IGNORECASE)
_LIST = re.compile(r"\[[^\[\]]*\]")
# Parts of a list of texts: in quotes, with references in them, or plain up to the next comma.
_PARTS = re.compile(rf"\s*((?:{_QUOTED.pattern})(?=\s*,)|(?:\$\{{[^{{}}]*\}}|[^,])*),", re.DOTALL)


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


def _quote_list(text: str) -> str:
    """A list of texts, such as `[1_1,no]`, with each of them in quotes; other values stay."""
    if not _LIST.fullmatch(text) or not text[1:-1].strip():
        return text
    parts = [part.strip() for part in _PARTS.findall(f"{text[1:-1]},")]
    if any("'" in part and not _QUOTED.fullmatch(part) for part in parts):
        return text  # the grammar says what is wrong with it
    return f"[{','.join(part if _QUOTED.fullmatch(part) or not part else quote(part) for part in parts)}]"


def altered(key: str, value: object, typed: str) -> str | None:
    """A text or a part of it that the grammar has read as a number or as true or false, where it was typed otherwise.

    `value` is what was read of `typed`, for the setting or group `key`; None where every text is as it was typed.
    """
    if isinstance(value, dict):
        found = (altered(f"{key}.{name}" if key else str(name), part, typed) for name, part in value.items())
        return next((text for text in found if text is not None), None)
    is_text = key not in SETTINGS or SETTINGS[key].kind in (str, list[str])
    if not is_text or (key not in SETTINGS and isinstance(value, bool)):
        return None
    if isinstance(value, (list, tuple)):
        return next((text for part in value if (text := altered(key, part, typed)) is not None), None)
    is_changed = isinstance(value, (bool, int, float)) and str(value) not in re.split(r"[\[\](){},:=\s]", typed)
    return str(value) if is_changed else None


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
    kind = SETTINGS[name].kind if name in SETTINGS else None
    if kind == list[str] and _LIST.fullmatch(value):
        return f"{key}={_quote_list(value)}"
    if not (path or kind is str):
        # The grammar reads no reference within another, such as `${oc.decode:${oc.env:N}}`, without quotes.
        return f"{key}={quote(value)}" if _NESTED.fullmatch(value) else text
    values = _split_values(value) if multirun or not path else [value]
    return f"{key}=" + ",".join(_quote_value(part, path=path) for part in values)
