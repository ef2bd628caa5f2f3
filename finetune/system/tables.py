"""Tables as aligned plain text."""

import unicodedata
from collections.abc import Mapping, Sequence

from finetune.system.terminal import printable


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Returns rows as aligned plain text under the heading `columns`; columns of numbers are aligned to the right.

    Whole numbers get thousands separators and floats four digits; True is `yes`, False is `no`, None is a dash.
    """
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(columns))]
    is_right = [bool(cells) and all(_is_number(line[i]) for line in cells) for i in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        spaces = [" " * (width - _width(text)) for text, width in zip(line, widths, strict=True)]
        padded = zip(line, spaces, is_right, strict=True)
        return "  ".join(space + text if right else text + space for text, space, right in padded).rstrip()

    rule = "  ".join(("-" if column else " ") * width for column, width in zip(columns, widths, strict=True))
    return "\n".join([aligned(lines[0]), rule, *map(aligned, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _is_number(text: str) -> bool:
    """Whether a cell belongs in a column of numbers; a dash fits into any column."""
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True


def _width(text: str) -> int:
    """Columns of a terminal: East Asian letters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
