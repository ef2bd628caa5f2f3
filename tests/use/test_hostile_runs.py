"""Attacks on `finetune predict`: a run from elsewhere, each text of its weights file changed, and endless input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finetune
from finetune.__main__ import main
from finetune.system.errors import UserError

BEST = Path("checkpoints/best.safetensors")


@pytest.fixture
def changed(striped_run: Path, folder: Path) -> Callable[..., str]:
    """Makes `run/`, a copy of a run whose weights file has other texts, and no checksum; returns its name."""

    def make(part: str = "", **values: object) -> str:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(striped_run, "run")
        Path("run/result.json").unlink()
        with safe_open(str(striped_run / BEST), framework="pt") as file:
            texts = dict(file.metadata())
        del texts["finetune_crc32"]
        if part:
            values = {part: {**json.loads(texts[part]), **values}}
        texts |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        save_file(load_file(striped_run / BEST), Path("run") / BEST, metadata=texts)
        return "run"

    return make


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("", {"classes": ["a", "a", "b"]}, "is damaged: two of its classes have the same name"),
        ("", {"classes": "[" * 100_000}, "nested more than 50 levels deep"),
        ("", {"classes": [str(number) for number in range(10**5)]}, "does not fit the model that it describes"),
        ("", {"is_multilabel": True, "threshold": "NaN"}, "no number from 0 to 1"),
        ("preprocess", {"size": 10**9}, "would have more than 16,384 pixels a side"),
        ("preprocess", {"crop_fraction": 1e-300, "resize": "crop"}, "expected 'float' >= 0.05"),
        ("preprocess", {"mean": [1e300, 0, 0]}, "expected 'float' <= 1000"),
        ("preprocess", {"std": [1e-300, 1, 1]}, "expected 'float' >= 0.0001"),
        ("model", {"name": "../../etc/passwd"}, "describes a model that cannot be built: "),
        ("model", {"name": "ViT-bigG-14"}, "describes a model that cannot be built: "),
        ("model", {"name": "ViT-bigG-14", "pretrained": "none"}, "does not fit the model that it describes"),
        ("model", {"name": "local-dir:/etc"}, "describes a model that cannot be built: "),
        ("model", {"library": "torchvision"}, "describes a model that cannot be built: "),
        ("model", {"_target_": "os.system"}, "model._target_ is unknown here"),
        ("model", {"image_size": 10**8}, "must be at most 16,384"),
    ],
)
def test_a_text_that_no_run_wrote_is_one_line_that_names_the_file(
    part: str,
    values: dict[str, object],
    message: str,
    changed: Callable[..., str],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = changed(part, **values)
    assert main(["predict", run, "in/0.png"]) == 1
    said = capsys.readouterr().err
    assert message in said and run in said and said.count("\n") == 1 and len(said) < 1000, said


def test_class_names_of_a_stranger_neither_steer_a_terminal_nor_calculate(
    changed: Callable[..., str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["=cmd|calc", "\x1b[31m\nred\u202e", "\ud800x"]
    run = changed(classes=names)
    for out in ("x.csv", "x.jsonl"):
        assert main(["predict", run, "in", "--top-k", "3", "--out", out, "--on-error", "skip"]) == 0
    assert main(["predict", run, "in/0.png", "--top-k", "3"]) == 0
    text = Path("x.csv").read_text()
    assert "'=cmd|calc" in text and ",=" not in text
    for said in (text, capsys.readouterr().out):
        assert "\x1b" not in said and "\u202e" not in said
    found = {line["label"] for line in map(json.loads, Path("x.jsonl").read_text().splitlines())}
    assert found <= {*names}


def test_an_image_that_gives_nan_is_named_and_gets_no_class(striped_run: Path, pictures: Path) -> None:
    predictor = finetune.load(striped_run)
    with torch.no_grad():
        next(iter(predictor.model.net.parameters())).mul_(torch.inf)
    for ask in (predictor.predict, predictor.embed):
        with pytest.raises(UserError, match=r"gives NaN or infinity for in/0\.png; its weights"):
            ask("in/0.png")


def test_an_endless_line_of_the_standard_input_is_refused(
    striped_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(endless))
        assert main(["predict", str(striped_run), "-"]) == 1
    assert "-: a line of the standard input: has more than 4,096 letters" in capsys.readouterr().err
