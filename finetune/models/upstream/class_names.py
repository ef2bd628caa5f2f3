"""Names of the classes that the rows of a classifier stand for, as programs keep them in files of weights and beside.

Without them the rows would be taken for the user's classes in the same order, which may be another one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune.models.upstream.layouts import shown, walk

# Names of classes by the place that says them, for messages; a place may list them in any number.
Named = Mapping[str, Sequence[str]]
Labels = list[str] | dict[str, str] | None  # in the order of the rows, or by the number of the row
MAX_GAPS = 10  # rows without a name, for each name
# The keys under which programs keep them: `classes`, `class_to_idx`, `CLASSES`, `id2label`, `label_names`, `names`.
KEYS = re.compile(r"class|label|categor|^(names|vocab)$", re.IGNORECASE)
MAX_DIGITS = 7  # of the number of a row


def names_of(labels: Labels, described: Mapping[str, str] | None = None) -> list[str] | None:
    """The names of classes in the order of the classifier's rows; None where nothing says them.

    A row without a name has an empty one. Names whose keys are no numbers of rows give an empty list, and not None:
    then nobody may take the names for those of the data. `described` has further words for names that are ids.
    """
    if not labels:
        return None
    names = labels
    if isinstance(labels, dict):
        rows = {
            int(key): name for key, name in labels.items() if key.isascii() and key.isdigit() and len(key) <= MAX_DIGITS
        }
        last = max(rows, default=-1)
        is_dense = len(rows) == len(labels) and last < MAX_GAPS * len(labels)
        names = [rows.get(row, "") for row in range(last + 1)] if is_dense else []
    # transformers writes LABEL_0, LABEL_1 where nobody named the classes.
    if names and all(name.startswith("LABEL_") for name in names):
        return None
    words = described or {}
    return [f"{name}, {words[name]}" if name in words and "," not in name else name for name in names]


def names_by_row(rows: object) -> list[str] | None:
    """The same from the row of each name, as transformers' `label2id` and torchvision's `class_to_idx` have it."""
    if not isinstance(rows, Mapping) or not _are(str, rows):
        return None
    # `str` takes no number with more than 4,300 digits.
    numbers = [
        str(row) for row in rows.values() if type(row) is str or (type(row) is int and 0 <= row < 10**MAX_DIGITS)
    ]
    if len(numbers) < len(rows) or not all(number.isdecimal() for number in numbers):
        return None
    return names_of(dict(zip(numbers, rows, strict=True))) if len({*numbers}) == len(rows) else []


def names_in(content: Mapping[Any, Any], place: str) -> dict[str, list[str]]:
    """The names of classes in the content of a checkpoint, each with `place` and the keys in front of them."""
    found: dict[str, list[str]] = {}

    def take(name: str, key: str, value: Any) -> bool:
        names = _names_in_value(value) if KEYS.search(key) else None
        if names:
            found[f"{place}: {shown([name])}"] = names
        return bool(names)

    walk(content, take)
    return found


def _names_in_value(value: object) -> list[str] | None:
    if isinstance(value, (list, tuple)):
        value = [_name_of(each) for each in value]
        if value and _are(tuple, value):  # pairs of name and row
            return names_by_row(dict(value)) if _are(str, dict(value)) else None
        return names_of(value) if _are(str, value) else None
    if isinstance(value, Mapping) and all(type(key) in (int, str) for key in value):
        texts = {str(key): _name_of(each) for key, each in value.items()}
        return (names_of(texts) if _are(str, texts.values()) else None) or names_by_row(value)
    return None


def _name_of(value: Any) -> Any:
    """The name in a dictionary about a class, as COCO's `categories` have it; a pair; else the value itself."""
    if isinstance(value, Mapping):
        return value.get("name")
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 2 and type(value[0]) is str else value


def _are(kind: type, values: Iterable[object]) -> bool:
    return all(type(value) is kind for value in values)
