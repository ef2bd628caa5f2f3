"""Laws of tables.py: columns are aligned whatever the cells hold, and no cell of a CSV is a formula."""

from __future__ import annotations

import csv
import io
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.system.tables import csv_text, table
from finetune.system.terminal import printable


def test_a_table_is_aligned_with_numbers_to_the_right() -> None:
    rows: list[dict[str, object]] = [
        {"layer": "stem", "rate": 1.3348388671875e-4, "parameters": 1234567, "learns": True, "note": None},
        {"layer": "日本", "rate": 0.0, "parameters": 10, "learns": False, "note": "x\ny"},
    ]
    assert table(rows, ["layer", "rate", "parameters", "learns", "note"]).splitlines() == [
        "layer       rate  parameters  learns  note",
        "-----  ---------  ----------  ------  ------",
        "stem   0.0001335   1,234,567  yes     -",
        "日本           0          10  no      x\\x0ay",
    ]
    assert table([], ["a", "b"]).splitlines() == ["a  b", "-  -"]


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.integers(), "c": st.floats()}), min_size=1, max_size=6))
def test_columns_of_any_table_start_and_end_together(rows: list[dict[str, object]]) -> None:
    lines = table(rows, ["b", "c", "a"]).splitlines()
    assert len(lines) == len(rows) + 2
    ends = [i for i in range(1, len(lines[1])) if lines[1][i - 1 : i + 1] == "- "]
    for line in lines[2:]:
        for end in ends:
            assert line[end - 1] != " " and line[end : end + 2].strip() == ""


# CSV.

SIGNS = "\u2212" + "".join(
    char for char in map(chr, range(0x11000)) if unicodedata.normalize("NFKC", char) in tuple("=+-@")
)
BLANKS = " \t\r\n\u3000\"'\u200b\ufeff\u201c"


def cells_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text), strict=True))


def runs(cell: str) -> bool:
    """Whether a spreadsheet could take this, or what follows a semicolon in it, for a formula."""
    parts = cell.split(";")
    return any(part.lstrip(BLANKS.replace("'", ""))[:1] in tuple(SIGNS) for part in parts) and not is_number(cell)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("before", ["", " ", "\t", "\r", '"', "'", "\u3000 ", "\ufeff", "a;", 'a ; "'])
def test_a_cell_that_begins_like_a_formula_gets_an_apostrophe(sign: str, before: str) -> None:
    name = f"{before}{sign}cmd|' /C calc'!A0"
    ((cell, other),) = cells_of(csv_text([[name, "b"]]))
    assert other == "b" and not runs(cell) and cell.count("'") == name.count("'") + (before not in "\t\r" or not before)


@pytest.mark.parametrize("text", ["-5", "+1.5e3", "-.5", "1e-3", "0", "-1e5"])
def test_numbers_stay_numbers(text: str) -> None:
    assert csv_text([[text, -5, 0.25, None, True]]) == f"{text},-5,0.25,,True\n"


@pytest.mark.parametrize("text", ["-1+1", "=1", "-inf", "+nan", "-1_0", "-\u0661", "--1", "-0x1", "+"])
def test_what_only_looks_like_a_number_is_guarded(text: str) -> None:
    assert csv_text([[text]]) == f"'{text}\n"


@given(st.lists(st.text(st.characters()), min_size=1, max_size=4))
@example(["a\x1b[2J", "b\u202e", "c\ud800", "d\0", "e\u2028f\x85g\n"])
@example(["'=1", "''=1", "a;'=1", '"=1', "x,=1", "x\n=1"])
def test_every_name_comes_back_and_steers_nothing(names: list[str]) -> None:
    """The same number of rows and cells; without apostrophes and escapes the names that went in."""
    text = csv_text([names, names])
    text.encode("utf-8")
    rows = cells_of(text)
    assert [len(row) for row in rows] == [len(names)] * 2
    assert not any(runs(cell) for cell in rows[0])
    assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for cell in rows[0] for char in cell)
    guarded = re.compile(rf"(^|;)'(?=[\s\"'\u2018-\u201f\u00ad\u200b-\u200d\u2060\ufeff]*[{re.escape(SIGNS)}])")
    assert [guarded.sub(r"\1", cell) for cell in rows[0]] == [printable(name) for name in names]
