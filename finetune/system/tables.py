"""Tables as aligned plain text, and as CSV that a spreadsheet shows and never runs."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from finetune.system.terminal import printable

# Spreadsheets take a cell that begins with one of these for a formula, which may start a program: the signs, their
# wide and small forms, and the minus of mathematics.
_SIGNS = "=+@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b\u207c\u207a\u207b\u208c\u208a\u208b\u2212\ufb29-"
# Some look for it behind blanks, quotes and invisible characters, and where cells end with a semicolon, behind that.
_FORMULA = re.compile(rf"(^|;)(?=[\s\"'\u2018-\u201f\u00ad\u200b-\u200d\u2060\ufeff]*[{_SIGNS}])")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV, the heading first. Control characters are visible escapes, and no cell is a formula.

    A text that a spreadsheet would take for a formula gets an apostrophe in front; numbers, also as texts, stay.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([_csv_cell(value) if isinstance(value, str) else value for value in row])
    return text.getvalue()


def _csv_cell(text: str) -> str:
    return text if _NUMBER.fullmatch(text) else _FORMULA.sub(r"\1'", printable(text))


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Returns rows as aligned plain text under the heading `columns`; columns of numbers are aligned to the right.

    Whole numbers get thousands separators and floats four digits; True is `yes`, False is `no`, None is a dash.
    """
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    lines = [list(map(printable, columns)), *cells]
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
