"""History and JSON files are whole after a crash, and every line is strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.runs.history import History
from finetune.system import files
from finetune.system.files import write_json

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
ROWS = st.lists(st.dictionaries(st.text(), st.one_of(VALUES, st.dictionaries(st.text(), VALUES))), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history")


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, torn=st.integers(0, 60), kept=st.integers(0, 6))
def test_history_reads_back_what_was_appended_also_after_a_torn_line(
    folder: Path, rows: list[dict[str, Any]], torn: int, kept: int
) -> None:
    path = folder / "history.jsonl"
    path.unlink(missing_ok=True)
    history = History(path)
    assert history.rows() == []
    for row in rows:
        history.append(row)
    assert history.rows() == rows
    whole = path.read_bytes() if rows else b""
    next_row = json.dumps({"epoch": 7, "lr": {"head.decay": 1e-3, "stem.decay": 1e-5}}).encode()
    path.write_bytes(whole + next_row[:torn])  # a crash in the middle of a write
    assert history.rows()[: len(rows)] == rows
    is_whole = torn >= len(next_row)
    assert len(history.rows()) == len(rows) + is_whole
    history.append({"epoch": 8})
    assert history.rows()[-1] == {"epoch": 8} and len(history.rows()) == len(rows) + is_whole + 1
    history.cut(kept)
    assert history.rows() == [*rows, *[json.loads(next_row)] * is_whole, {"epoch": 8}][:kept]
    assert path.read_bytes().count(b"\n") == len(history.rows())


def test_not_finite_numbers_are_null_and_every_line_is_strict_json(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append({"loss": math.nan, "lr": {"a": math.inf, "b": [1.0, -math.inf]}, "name": "\udc80"})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads(history.path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {"loss": None, "lr": {"a": None, "b": [1.0, None]}, "name": "\\udc80"}


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2: expected one JSON object, found '\{\"epo'"):
        History(path).rows()


def test_cut_of_nothing_is_nothing(tmp_path: Path) -> None:
    History(tmp_path / "h.jsonl").cut(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"status": "running"})
    history = History(tmp_path / "history.jsonl")
    history.append({"epoch": 1})

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"status": "finished"})
    with pytest.raises(OSError, match="no space"):
        history.cut(0)
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"status": "running"}
    assert history.rows() == [{"epoch": 1}]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["history.jsonl", "result.json"]


def test_json_that_cannot_be_said_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"b": 1, "a": "Zoë"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "Zoë"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 1
