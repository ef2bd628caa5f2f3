"""Laws of terminal.py: no name steers a terminal, and a printed command means the same when it is pasted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.words.quoting import quote_override
from finetune.system.terminal import command, counted, printable


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


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@given(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"])
        | st.sampled_from("\n\x1b\x9b\u202e\udcff'\\\\")
    )
)
@settings(max_examples=20, deadline=None)
def test_a_command_with_odd_characters_is_one_line_and_means_the_same_in_bash(text: str) -> None:
    shown = command([f"data.root={text}"])
    assert printable(shown) == shown
    given = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True).stdout
    assert os.fsdecode(given) == os.fsdecode(os.fsencode(f"data.root={text}"))


def test_one_thing_has_the_singular() -> None:
    assert counted(1, "image") == "1 image" and counted(0, "image") == "0 images"
    assert counted(1, "class", "classes") == "1 class" and counted(2_000, "class", "classes") == "2,000 classes"


def test_streams_that_the_caller_closed_lead_nowhere(tmp_path: Path) -> None:
    program = (
        "from finetune.system.terminal import open_closed_streams, complain; open_closed_streams();"
        "file = open('own', 'w'); assert file.fileno() > 2; file.write('whole'); file.flush();"
        "print('text'); complain('a problem')"
    )
    line = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "own").read_text() == "whole"
