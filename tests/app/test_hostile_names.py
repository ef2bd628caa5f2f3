"""Names of files and classes steer nothing: no terminal, no spreadsheet, no line of a log."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from finetune.__main__ import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names that other file systems refuse")
ROOT = b"d\nERROR forged"
NAMES = [
    *(b"=cmd|' ", b"+a", b"-1+1", b"@x", "\uff1d1".encode(), b"a;=1", b"'=1", b"-5"),
    *(b"\x1b[2Jx", b"line\nERROR forged", b"cr\rover", b"tab\tx", b"\x7f", "\x9b31mc1".encode(), "\u2028sep".encode()),
    *("\u202egpj".encode(), b"\xff\xfebytes"),
]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A folder for each name, each with five images; two of them have such names, and one of these is damaged."""
    for number, name in enumerate(NAMES):
        folder = os.path.join(os.fsencode(tmp_path), ROOT, name)
        os.makedirs(folder)
        for image in range(5):
            pixels = np.random.default_rng([number, image]).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            file = b"%d.png" % image if image else b"=\x1b[1m\n\xff.png"
            Image.fromarray(pixels).save(os.fsdecode(os.path.join(folder, file)))
    Path(os.fsdecode(os.path.join(folder, b"+\x1b]0;t\x07\nERROR forged.png"))).write_bytes(b"no image")
    twice = Path(os.fsdecode(os.path.join(folder, b"=\x1b[1m\n\xff.png")))
    (tmp_path / os.fsdecode(ROOT) / "+a" / twice.name).write_bytes(twice.read_bytes())
    return tmp_path / os.fsdecode(ROOT)


def test_no_name_steers_a_terminal_a_spreadsheet_or_a_log(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=folder", f"data.root={named}", "data.on_error=skip", "data.batch_size=16", "model.head=random"]
    assert main(["check", *words, f"hydra.run.dir={tmp_path}/check"]) == 0
    short = [*words, "train.epochs=1"]
    assert main([*short, f"hydra.run.dir={tmp_path}/run"]) == 0
    assert main([f"resume={tmp_path}/run", "train.epochs=2"]) == 0
    assert main(["describe", *short, "--json"]) == 0
    shown = capsys.readouterr()
    texts = {"stdout": shown.out, "stderr": shown.err}
    for path in [*(tmp_path / "run").iterdir(), *(tmp_path / "check").iterdir()]:
        if path.is_file() and path.suffix not in (".png", ".pt", ".safetensors"):
            texts[str(path)] = path.read_text(encoding="utf-8")
    assert len(texts) > 12
    for place, text in texts.items():
        steering = {char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char == "\u202e"}
        assert steering <= set("\n\t\r" if place == "stderr" else "\n\t"), place
        assert not [line for line in text.splitlines() if line.startswith("ERROR forged")], place
    with open(tmp_path / "run" / "confusion.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert {len(row) for row in rows} == {len(NAMES) + 1}
    for cell in [*rows[0], *(row[0] for row in rows)]:
        assert cell == "-5" or not any(
            part.lstrip(" \"'")[:1] in tuple("=+-@\uff1d") for part in cell.split(";") if part[:1] != "'"
        )
    # For programs, the names are as they were.
    with safe_open(tmp_path / "run" / "checkpoints" / "best.safetensors", "pt") as weights:
        classes = json.loads(weights.metadata()["classes"])
    assert {os.fsdecode(b"line\nERROR forged"), os.fsdecode(b"\xff\xfebytes"), "a;=1"} <= set(classes)
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["classes"]) == set(classes)


def test_a_name_in_the_command_line_that_is_no_text_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = os.fsdecode(b"\xff\x1b[1m\nERROR forged")
    assert main(["data=folder", f"data.root={tmp_path}/{root}", f"hydra.run.dir={tmp_path}/run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "\\udcff\\x1b[1m" in line and "\x1b" not in line
    for path in (tmp_path / "run").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "\x1b" not in text and not [line for line in text.splitlines() if line.startswith("ERROR forged")], path
