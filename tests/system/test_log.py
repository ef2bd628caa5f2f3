"""Laws of log.py: each line comes once, on the console and in `run.log`, and no bar stays under an error."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.system import progress
from finetune.system.log import say, start_log, stop_log
from finetune.system.progress import Bar

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


FULL = """
import logging, resource, signal
from pathlib import Path
from finetune.system.log import start_log, stop_log
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    start_log(Path("."))
    for _ in range(9):
        logging.getLogger("finetune").info("a line of some letters")
    raise ValueError("the first error")
finally:
    stop_log()
    print(logging.getLogger("finetune").handlers)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes")
def test_a_log_on_a_full_disk_hides_no_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [*["a line of some letters"] * 9, "[]"]
    assert done.stderr.splitlines()[-1] == "ValueError: the first error"
    assert (tmp_path / "run.log").stat().st_size == 100


def test_messages_and_bars_do_not_mix_and_an_error_takes_the_bar_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start_log(tmp_path)
    Bar("nothing to do", total=0, images=0)
    assert progress.open_bars == []
    batches = Bar("train 1/1", total=9, images=9).wrap(range(9))
    next(batches)
    LOGGER.info("in between")
    assert len(progress.open_bars) == 1
    LOGGER.error("the loss was not finite")
    assert progress.open_bars == []
    assert terminal.getvalue().rpartition("\r")[0].endswith(" ")  # wiped
    stop_log()
    assert capsys.readouterr().out == "in between\nerror: the loss was not finite\n"
