"""Runs without validation images, without test images, or without both: what they keep, score and say."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.app import run as runs
from finetune.config import DataConf, SourceKind
from finetune.report.sweep import summarize
from finetune.system.errors import UserError
from tests.small_runs import go, history, small


def pictures(root: Path, **counts: int) -> Path:
    """Pictures of two classes for each split; no two are equal. A split without a name is `root` itself."""
    number = 0
    for split, count in counts.items():
        for name in "ab":
            folder = root / ("" if split == "all" else split) / name
            folder.mkdir(parents=True)
            for i in range(count):
                number += 1
                shade = 40 if name == "a" else 200
                Image.new("RGB", (12, 12), (shade, number % 256, number // 256)).save(folder / f"{i}.png")
    return root


def closing_lines(folder: Path) -> str:
    """What `run.log` says after the last epoch."""
    return (folder / "run.log").read_text().rpartition("epoch 2/2")[2]


def test_with_val_and_no_test_train_is_whole_and_the_close_says_what_the_score_is_worth(tmp_path: Path) -> None:
    root, folder = pictures(tmp_path / "data", train=20, val=5), tmp_path / "run"
    result = go(small(root), folder)
    assert result["data"] == {"images": 50, "classes": 2, "train": 40, "val": 10, "test": 0}
    assert "50 images in 2 classes; 40 train, 10 val, 0 test" in (folder / "run.log").read_text()
    assert "val/top1" in result and not any(name.startswith("test/") for name in result)
    close = closing_lines(folder)
    assert "a little high" in close and "To have a test" in close and "test/top1" not in close
    assert "confusion_val.csv" in close and "nan" not in close
    assert (folder / "confusion_val.csv").exists() and not (folder / "confusion.png").exists()
    assert set(json.loads((folder / "metrics.json").read_text())) == {"val"}
    assert (folder / "curves.png").exists()


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("words", [{}, {"optim__fix_layer": 3}], ids=["all", "frozen"])
def test_without_val_the_last_epoch_is_kept(tmp_path: Path, words: dict[str, object], ema: float) -> None:
    root, folder = pictures(tmp_path / "data", all=20), tmp_path / "run"
    result = go(small(root, data__val_fraction=0.0, train__ema=ema, **words), folder)
    assert result["data"] == {"images": 40, "classes": 2, "train": 36, "val": 0, "test": 4}
    assert result["best_epoch"] == result["epochs"] == 2 and not any(name.startswith("val/") for name in result)
    assert 0 <= result["test/top1"] <= 1
    assert all(not any(name.startswith("val") for name in row) for row in history(folder))
    best, last = (load_file(folder / "checkpoints" / f"{name}.safetensors") for name in ("best", "last"))
    equal = all(torch.equal(best[name], last[name]) for name in last)
    assert equal == (not ema) and result.get("best_weights", "raw") == ("ema" if ema else "raw")
    with safe_open(folder / "checkpoints" / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2" and "val/top1" not in file.metadata()
    close = closing_lines(folder)
    assert "no validation images" in close and "the weights of the last one are kept" in close
    assert "val/top1" not in close and "test/top1" in close and "nan" not in close
    assert (folder / "confusion.png").exists() and (folder / "curves.png").exists()


def test_without_val_an_interrupted_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", all=20)
    conf = small(root, data__val_fraction=0.0, train__epochs=3)
    go(conf, tmp_path / "straight")
    go(small(root, data__val_fraction=0.0, train__epochs=1), tmp_path / "again")
    longer = small(root, data__val_fraction=0.0, train__epochs=3, resume=str(tmp_path / "again"))
    result = go(longer, tmp_path / "again")
    assert result["resumed_at"] and result["best_epoch"] == 3


def test_without_val_and_test_nothing_is_scored(tmp_path: Path) -> None:
    root, folder = pictures(tmp_path / "data", all=6), tmp_path / "run"
    result = go(small(root, data__val_fraction=0.0, data__test_fraction=0.0), folder)
    assert result["data"] == {"images": 12, "classes": 2, "train": 12, "val": 0, "test": 0}
    assert not any(name.startswith(("val/", "test/")) for name in result) and result["status"] == "finished"
    assert "nothing is scored" in closing_lines(folder) and "confusion" not in closing_lines(folder)
    assert not (folder / "metrics.json").exists() and (folder / "curves.png").exists()


@pytest.mark.parametrize("head", ["zeroshot", "linear_probe"])
def test_zero_shot_and_probe_without_val(tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture) -> None:
    root, folder = pictures(tmp_path / "data", all=20), tmp_path / "run"
    result = go(small(root, data__val_fraction=0.0, model__head=head), folder)
    assert result["status"] == "finished" and "zeroshot/top1" not in result
    if head == "zeroshot":
        assert 0 <= result["test/zeroshot/top1"] <= 1 and "zero-shot   test/top1" in closing_lines(folder)
    else:
        assert "training images that a fit left out" in (folder / "run.log").read_text() and "probe/top1" in result


@pytest.mark.parametrize("words", [{"train__patience": 3}, {"train__monitor": "val/loss"}, {"train__keep": 2}])
def test_what_only_validation_gives_a_meaning_is_refused_without_it(tmp_path: Path, words: dict[str, object]) -> None:
    root = pictures(tmp_path / "data", all=20)
    with pytest.raises(UserError, match=r"train\.(patience|monitor|keep)=.* would be ignored: .*data\.val_fraction"):
        go(small(root, data__val_fraction=0.0, **words), tmp_path / "run")


def test_several_labels_without_val_are_scored_at_one_half(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", all=20)
    rows = [f"{path.relative_to(root)},{path.parent.name}|x" for path in sorted(root.glob("*/*.png"))]
    (root / "t.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    conf = small(root, data__val_fraction=0.0)
    conf.data = DataConf(
        source=SourceKind.table, table=str(root / "t.csv"), label_separator="|", val_fraction=0.0, batch_size=8
    )
    result = go(conf, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["threshold"] == 0.5
    assert math.isfinite(result["test/f1_micro"])
    with safe_open(tmp_path / "run" / "checkpoints" / "best.safetensors", "pt") as file:
        assert "threshold" not in file.metadata()


def test_a_sweep_of_jobs_without_val_says_that_nothing_ranks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        result = {"status": "finished", "overrides": [f"seed={number}"], "test/top1": 0.5, "monitor": "val/top1"}
        (tmp_path / str(number) / "result.json").write_text(json.dumps(result))
    logging.disable(logging.NOTSET)
    assert summarize(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "ranking needs validation images" in shown and "no job finished" not in shown and "best:" not in shown


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_image_that_breaks_outside_of_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    root = pictures(tmp_path / "data", train=8, val=4, test=4)
    monkeypatch.chdir(tmp_path)
    words = ["data=folder", "data.root=data", "data.batch_size=8", "data.workers=0", "train.epochs=1"]
    words += ["model.head=zeroshot"]  # which looks at the validation images before training
    step = "prepare_head" if when == "before" else "train_to_the_end"
    whole = getattr(runs, step)

    def breaking(*arguments: Any) -> Any:
        if when == "before":
            (root / "val" / "a" / "1.png").write_bytes(b"gone")
        found = whole(*arguments)
        (root / "test" / "b" / "2.png").write_bytes(b"gone")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runs, step, breaking)
        assert main([*words, "hydra.run.dir=run"]) == 1
    error = json.loads(Path("run/result.json").read_text())["error"]
    what = "no step is lost" if when == "before" else "training is finished and saved"
    assert f"{what}: continue with resume=run, without the image by data.on_error=skip" in error
    assert error.startswith(str(root / ("val/a/1.png" if when == "before" else "test/b/2.png")))
    before = None if when == "before" else Path("run/checkpoints/best.safetensors").read_bytes()
    assert main(["resume=run", "data.on_error=skip"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert result["status"] == "finished" and "test/top1" in result
    assert before is None or Path("run/checkpoints/best.safetensors").read_bytes() == before
