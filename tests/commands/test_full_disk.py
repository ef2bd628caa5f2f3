"""Laws of a disk without room: the error names the file, and promises no traceback that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.commands import train
from finetune.runs import folders
from finetune.system import files
from finetune.system.errors import naming

# A write beyond the first kilobyte fails, as on a full disk; such an error names no file of itself.
FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from pathlib import Path
from finetune.runs.history import History
from finetune.system.files import write_text
history = History(Path("history.jsonl"))
for write in (lambda: write_text(Path("full.txt"), "x" * 5000), lambda: history.append({"x": "y" * 5000})):
    try:
        write()
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith("'full.txt'") and second.endswith("'history.jsonl'")


def test_an_error_keeps_the_name_that_it_has() -> None:
    with pytest.raises(FileNotFoundError, match="'a'"), naming(Path("b")):
        open("a")  # noqa: SIM115  # it is missing
    with pytest.raises(OSError, match="'b'"), naming(Path("b")):
        raise OSError(28, "No space left on device")
    assert files.naming is naming


@pytest.mark.parametrize("is_written", [True, False])
def test_a_traceback_is_promised_only_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_written: bool
) -> None:
    def fail(*words: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("finetune.app.run.run", fail)
    if not is_written:
        monkeypatch.setattr(train, "record_failure", lambda *words: None)
    from finetune.config import Conf

    assert train._finish(Conf(), tmp_path, [])[0] == 1
    words = "the traceback is in" if is_written else "its traceback could not be written to"
    assert f"{words} {tmp_path / 'run.log'}" in capsys.readouterr().err
    assert (
        folders.where_traceback(tmp_path, ValueError("another"))
        == f"its traceback could not be written to {tmp_path}/run.log"
    )
