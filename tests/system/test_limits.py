"""Laws of limits: one line says what was claimed, the most that is read, and how to go on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.fields import nearest
from finetune.system import limits
from finetune.system.errors import UserError, fault_line
from finetune.system.limits import BoundedLines, Limit, LimitError, check_memory, in_bytes, read_text
from finetune.system.terminal import MAX_LINE, complain


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"), (1, "1 byte"), (1023, "1,023 bytes"), (1024, "1.00 KiB"), (8 * 1024, "8.00 KiB"),
        (10_230, "9.99 KiB"), (10_240, "10.0 KiB"), (2**20 - 1, "1.00 MiB"), (150 * 2**20, "150 MiB"),
        (2**30 - 1, "1.00 GiB"), (2**40, "1.00 TiB"), (2**70, "1,048,576 PiB"),
    ],
)  # fmt: skip
def test_sizes_show_something_in_their_unit(size: int, words: str) -> None:
    assert in_bytes(size) == words


def test_a_limit_names_the_subject_both_sizes_and_the_key() -> None:
    limit = Limit(2**20, "data.max_x raises the limit")
    limit.check("f.csv", 2**20)
    with pytest.raises(LimitError) as error:
        limit.check("f.csv", 2**21)
    assert str(error.value) == "f.csv: has 2.00 MiB, and at most 1.00 MiB can be used; data.max_x raises the limit"


def test_a_record_over_several_lines_has_the_limit_too() -> None:
    lines = BoundedLines(io.StringIO("ab\ncd\n" * 2), "f: ", Limit(6, "end"))
    assert [next(lines), next(lines)] == ["ab\n", "cd\n"]
    with pytest.raises(LimitError, match=r"f: row 3: has more than 6 bytes; end"):
        next(lines)
    lines = BoundedLines(io.StringIO("ab\ncd\n" * 2), "f: ", Limit(6, "end"))
    for _ in lines:
        lines.taken = 0
    assert (lines.number, lines.total) == (4, 12)


def test_texts_of_people_are_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n")
    assert read_text(path, "key=x.txt", Limit(10, "")) == "a\n"
    path.write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(UserError, match=r"^key=x\.txt: line 3 is no UTF-8 text; save the file as UTF-8$"):
        read_text(path, "key=x.txt", Limit(10, ""))
    with pytest.raises(LimitError, match=r"^key=x\.txt: has 6 bytes, and at most 5 bytes"):
        read_text(path, "key=x.txt", Limit(5, ""))
    with pytest.raises(OSError, match=r"^key=y\.txt: cannot be read: No such file"):
        read_text(tmp_path / "y.txt", "key=y.txt", Limit(5, ""))


def test_memory_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda: 2**20)
    check_memory("x", 2**20, "lower y")
    with pytest.raises(LimitError, match=r"^x needs 2\.00 MiB of memory, 1\.00 MiB are free; lower y$"):
        check_memory("x", 2**21, "lower y")
    monkeypatch.setattr(limits, "free_memory", lambda: None)
    check_memory("x", 2**60, "lower y")


@pytest.mark.skipif(os.name != "posix", reason="no such limit")
@pytest.mark.parametrize(("soft", "hard", "needed", "expected"), [
    (50, 100, 40, "50"), (50, 100, 60, "100"),
    (50, 100, 101, "opens up to 101 files, and this process may open 100; or less; a new shell"),
])  # fmt: skip
def test_a_process_raises_its_own_limit_of_open_files(soft: int, hard: int, needed: int, expected: str) -> None:
    code = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from finetune.system.limits import check_open_files\n"
        f"try: check_open_files({needed}, '; or less'); print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert expected in done.stdout and not done.stderr


def test_an_error_is_never_longer_than_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    complain("seed=" + "9" * 10**6 + ": expected a whole number")
    text = capsys.readouterr().err
    assert len(text) < MAX_LINE + 10 and text.startswith("error: seed=999") and text.endswith("a whole number\n")


def test_a_word_is_compared_within_bounds() -> None:
    names = ["n" * 5000, *(f"column {i}" for i in range(200_000))]
    assert nearest("colunm 7", names) == " (did you mean 'column 7'?)"
    assert nearest("x" * 10**6, names) == ""


def test_memory_that_runs_out_is_no_fault_of_the_program() -> None:
    text = fault_line(MemoryError(), "see the log")
    assert text.startswith("out of memory (no more is free): lower data.batch_size") and "fault" not in text
    for said in ("libtorch_cpu.so: failed to map segment from shared object", "libx.so: cannot allocate memory"):
        assert fault_line(ImportError(said), "see the log").startswith(f"out of memory ({said})")
    assert fault_line(ImportError("no module"), "see the log").startswith("finetune is at fault: ImportError")
