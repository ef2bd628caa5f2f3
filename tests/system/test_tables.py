"""Laws of tables.py: columns are aligned, whatever the cells hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune.system.tables import table


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
