"""Laws of log.py and records.py: files never tear, names never steer a terminal, each line comes once, no bar syncs."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.words.commandline import quote_override
from finetune.runs.records import History, write_json
from finetune.system import files, log
from finetune.system.log import Bar, epoch_line, layer_of, say, start_log, stop_log, table
from finetune.system.terminal import command, printable

LOGGER = logging.getLogger("finetune")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def leave_no_handlers() -> Iterator[None]:
    before = list(LOGGER.handlers), LOGGER.propagate, LOGGER.level
    yield
    stop_log()
    assert (list(LOGGER.handlers), LOGGER.propagate, LOGGER.level) == before


# --- printable -------------------------------------------------------------------------------------------------------


@given(st.text(st.characters()))
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in shown)
    shown.encode("utf-8")  # a lone surrogate could not be written
    assert printable(shown) == shown


def test_printable_keeps_letters_and_shows_what_it_escapes() -> None:
    assert printable("naïve 日本 عربي 👩‍🔬 a b") == "naïve 日本 عربي 👩‍🔬 a b"
    assert printable("\x1b[31mred\r\n\x9b1m") == r"\x1b[31mred\x0d\x0a\x9b1m"
    assert printable("gpj\u202e.exe\udc80") == r"gpj\u202e.exe\udc80"
    assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc"


def test_a_console_without_the_letter_shows_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("mean ± std of 日")
    assert raw.getvalue() == b"mean \\xb1 std of \\u65e5\n"


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    script = (
        "from finetune.system.log import say\n"
        "import sys, time\n"
        "for i in range(20000): say('x' * 100)\n"
        "print('done', file=sys.stderr)\n"
    )
    command = f'"{sys.executable}" -c "$SCRIPT" | head -n 1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env={**os.environ, "SCRIPT": script}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x" * 100 + "\n", "done\n")


# --- console and run.log ---------------------------------------------------------------------------------------------


def test_console_is_plain_and_the_file_has_times_levels_and_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_log(tmp_path)
    LOGGER.debug("only in the file")
    LOGGER.info("data: %s", "cat\x1b[2J")
    logging.getLogger("finetune.data").warning("3 files left out")
    try:
        raise ValueError("broken")
    except ValueError as error:
        LOGGER.error("it failed", exc_info=error)
    stop_log()
    assert capsys.readouterr().out == "data: cat\\x1b[2J\nwarning: 3 files left out\nerror: it failed\n"
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["DEBUG", "INFO", "WARNING", "ERROR"]
    assert "Traceback (most recent call last):" in text and "ValueError: broken" in text
    assert "\x1b" not in text


def test_each_run_of_a_sweep_writes_to_its_own_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.StreamHandler(sys.stdout)  # as Hydra installs
    logging.getLogger().addHandler(root)
    try:
        for name in "ab":
            (tmp_path / name).mkdir()
            start_log(tmp_path / name)
            start_log(tmp_path / name)  # a second start takes over from the first
            LOGGER.info("run %s", name)
            stop_log()
            stop_log()
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().out == "run a\nrun b\n"
    for name in "ab":
        assert (tmp_path / name / "run.log").read_text().count("run ") == 1
        assert f"run {name}" in (tmp_path / name / "run.log").read_text()


def test_a_continued_run_continues_its_log_and_quiet_is_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("first", "second"):
        start_log(tmp_path, quiet=True)
        LOGGER.info(part)
        stop_log()
    assert capsys.readouterr().out == ""
    assert [line.split()[-1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        start_log(tmp_path / "missing")  # the fixture sees that the logger is as before


# --- files -----------------------------------------------------------------------------------------------------------

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


# --- bars ------------------------------------------------------------------------------------------------------------


def test_no_terminal_no_bar_and_never_a_reason_to_read_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("train 1/2", total=3, images=9)
    seen = []
    for batch in bar.wrap(iter("abc")):
        seen.append(batch)
        assert not bar.due()
        bar.set(loss=1.0)
    assert seen == list("abc")
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_loss_accuracy_rate_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    with Bar("train 3/15", total=4, images=400) as bar:
        assert not bar.due(), "a redraw at the first step would stall it for nothing"
        for number, _ in enumerate(bar.wrap(range(4))):
            clock[0] += 1.0
            assert bar.due()
            bar.set(loss=0.4123, top1=0.9314, lr=9.1e-5)
            assert not bar.due()
            if number == 2:
                text = terminal.getvalue().split("\r")[-1]
                assert text.startswith("train 3/15  50%|")
                assert text.endswith(" left, loss 0.412 top1 0.931 lr 9.1e-05 67 img/s"), "all of it in 80 columns"
    assert log._open_bars == []
    bar.set(loss=1.0)  # after the end: harmless
    assert not bar.due()


def test_messages_and_bars_do_not_mix_and_an_error_takes_the_bar_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_log(tmp_path)
    Bar("nothing to do", total=0, images=0)
    assert log._open_bars == []
    batches = Bar("train 1/1", total=9, images=9).wrap(range(9))
    next(batches)
    LOGGER.info("in between")
    assert len(log._open_bars) == 1
    LOGGER.error("the loss was not finite")
    assert log._open_bars == []
    assert terminal.getvalue().rpartition("\r")[0].endswith(" ")  # wiped
    stop_log()
    assert capsys.readouterr().out == "in between\nerror: the loss was not finite\n"


def test_a_resumed_pass_counts_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("train 1/1", total=10, images=100, start=6) as bar:
        assert list(bar.wrap(range(6, 10))) == [6, 7, 8, 9]
    assert " 60%|" in terminal.getvalue()


# --- lines and tables ------------------------------------------------------------------------------------------------

ROW = {
    "epoch": 7,
    "train/loss": 0.4121,
    "val/loss": 0.0004321,
    "val/top1": 0.9312,
    "lr": {"stem.decay": 1e-6, "readout.decay": 2e-5, "head.decay": 9.1e-5, "head.no_decay": 9.1e-5},
    "images_per_s": 4123.4,
}


def test_epoch_line() -> None:
    line = epoch_line(ROW, 20, best=0.934, best_epoch=6)
    assert line == "epoch  7/20  lr 9.1e-05  train/loss 0.412  val/top1 0.931 (best 0.934 @ 6)  4,123 img/s"
    line = epoch_line(
        {**ROW, "train/loss": math.nan, "val/top1": None}, 7, monitor="val/loss", best=0.0004, best_epoch=7
    )
    assert (
        line == "epoch 7/7  lr 9.1e-05  train/loss nan  val/top1 nan  val/loss 0.00043 (best 0.0004 @ 7)  4,123 img/s"
    )
    assert "best" not in epoch_line(ROW, 20)


def test_layer_of_a_group() -> None:
    names = ["stem.decay", "block.7.no_decay", "head.decay"]
    assert [layer_of(name) for name in names] == ["stem", "block.7", "head"]


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


@pytest.mark.parametrize(
    "typed",
    [
        "model=vit",
        "data.root=/a b (2)",
        "data.root=/it's",
        "model.templates=['a {}.','b {}']",
        "optim.no_weight_decay=[*.q]",
    ],
)
def test_a_command_to_paste_means_the_same_in_a_shell(typed: str) -> None:
    word = quote_override(typed, multirun=False)
    assert [quote_override(text, multirun=False) for text in shlex.split(command([word]))] == [word]
