"""History and JSON files are whole after a crash, and every line is strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.runs.history import History, as_lines
from finetune.system import files
from finetune.system.files import write_json
from finetune.system.reading import DamagedError

VALUES = st.one_of(st.none(), st.integers(-(2**53), 2**53), st.floats(-1e100, 1e100))
RATES = st.dictionaries(st.text(), VALUES)
ROWS = st.lists(st.dictionaries(st.text(), st.one_of(VALUES, RATES)), max_size=5)


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
    rows = [{**row, "epoch": number, "lr": {"head": 1e-3}} for number, row in enumerate(rows, start=1)]
    for row in rows:
        history.append(row)
    assert history.rows() == rows
    whole = path.read_bytes() if rows else b""
    next_row = json.dumps({"epoch": len(rows) + 1, "lr": {"head.decay": 1e-3, "stem.decay": 1e-5}}).encode()
    path.write_bytes(whole + next_row[:torn])  # a crash in the middle of a write
    assert history.rows()[: len(rows)] == rows
    is_whole = torn >= len(next_row)
    assert len(history.rows()) == len(rows) + is_whole
    last = {"epoch": len(rows) + is_whole + 1, "lr": {}}
    history.append(last)
    assert history.rows()[-1] == last and len(history.rows()) == len(rows) + is_whole + 1
    everything = [*rows, *[json.loads(next_row)] * is_whole, last]
    history.restore(as_lines(everything[:kept]), everything)
    assert history.rows() == everything[:kept]
    assert path.read_bytes().count(b"\n") == len(history.rows())


def test_not_finite_numbers_are_null_and_every_line_is_strict_json(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append({"loss": math.nan, "lr": {"a": math.inf, "b": [1.0, -math.inf]}, "name": "\udc80"})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads(history.path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {"loss": None, "lr": {"a": None, "b": [1.0, None]}, "name": "\udc80"}


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 1, "lr": {}}\n{"epo\n{"epoch": 3, "lr": {}}\n')
    with pytest.raises(DamagedError, match=r"history\.jsonl is damaged: line 2: it is no JSON"):
        History(path).rows()
    for rows in ('{"epoch": 2, "lr": {}}\n', '{"epoch": 1, "lr": {}, "val/top1": [1]}\n', '{"epoch": 1}\n', "[]\n\n"):
        path.write_text(rows)
        with pytest.raises(DamagedError, match=r"history\.jsonl is damaged"):
            History(path).rows()


def test_restoring_nothing_is_nothing(tmp_path: Path) -> None:
    History(tmp_path / "h.jsonl").restore("", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"status": "running"})
    history = History(tmp_path / "history.jsonl")
    history.append({"epoch": 1, "lr": {}})

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"status": "finished"})
    with pytest.raises(OSError, match="no space"):
        history.restore("", [])
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"status": "running"}
    assert history.rows() == [{"epoch": 1, "lr": {}}]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["history.jsonl", "result.json"]


def test_json_that_cannot_be_said_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"b": 1, "a": "Zoë"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "Zoë"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 1
