"""Laws of progress.py: no terminal, no bar; the device is read only for numbers that are shown."""

from __future__ import annotations

import io
import sys

import pytest

from finetune.system import progress
from finetune.system.progress import Bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_no_terminal_no_bar_and_never_a_reason_to_read_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("train 1/2", total=3, images=9)
    seen = []
    for batch in bar.wrap(iter("abc")):
        seen.append(batch)
        assert not bar.due()
        bar.show({"loss": "1.0"})
    assert seen == list("abc")
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_loss_accuracy_rate_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = Bar("train 3/15", total=4, images=400)
    assert not bar.due(), "a redraw at the first step would stall it for nothing"
    for number, _ in enumerate(bar.wrap(range(4))):
        clock[0] += 1.0
        assert bar.due()
        bar.show({"loss": "0.412", "top1": "0.931", "lr": "9.1e-05"})
        assert not bar.due()
        if number == 2:
            text = terminal.getvalue().split("\r")[-1]
            assert text.startswith("train 3/15  50%|")
            assert text.endswith(" left, loss 0.412 top1 0.931 lr 9.1e-05 67 img/s"), "all of it in 80 columns"
    assert progress.open_bars == []
    bar.show({"loss": "1.0"})  # after the end: harmless
    assert not bar.due()


def test_a_resumed_pass_counts_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Bar("train 1/1", total=10, images=100, start=6)
    assert list(bar.wrap(range(6, 10))) == [6, 7, 8, 9]
    assert " 60%|" in terminal.getvalue()
