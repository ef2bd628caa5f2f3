"""Laws of a run's last lines: they tell the metric that judged, and only files that are there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import go, small

from finetune.__main__ import main
from finetune.app.session import log_summary
from finetune.config import DataConf, Family, Loss, ModelConf, SourceKind
from finetune.report import look
from finetune.system.ours import FolderKind, claim

RESULT: dict[str, Any] = {
    **{"overrides": [], "monitor": "val/map", "data": {"val": 5, "test": 5}, "epochs": 3, "best_epoch": 2},
    **{"seconds": 1.0, "val/map": 0.61, "val/top1": 0.7, "test/map": 0.55, "test/top1": 0.65},
}


def last_lines(folder: Path, result: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.INFO, "finetune")
    caplog.clear()
    log_summary(folder, result)
    return [record.getMessage() for record in caplog.records]


def test_the_metric_that_judged_comes_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zeroshot = {"zeroshot/map": 0.4, "zeroshot/top1": 0.3, "test/zeroshot/map": 0.35, "test/zeroshot/top1": 0.25}
    lines = last_lines(tmp_path, RESULT | zeroshot, caplog)
    assert "zero-shot   val/map 0.4000  val/top1 0.3000   test/map 0.3500  test/top1 0.2500" in lines
    scores = "val/map 0.6100  val/top1 0.7000   test/map 0.5500  test/top1 0.6500"
    assert f"fine-tuned  {scores}   (best of 3 epochs: 2; 1.0 s)" in lines
    lines = last_lines(tmp_path, RESULT | {"monitor": "val/top1"}, caplog)
    assert "fine-tuned  val/top1 0.7000   test/top1 0.6500   (best of 3 epochs: 2; 1.0 s)" in lines
    assert not any(line.startswith("zero-shot") for line in lines)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_scores_of_averaged_weights_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, weights: str) -> None:
    said = ", averaged weights" if weights == "ema" else ""
    lines = last_lines(tmp_path, RESULT | {"best_weights": weights}, caplog)
    assert any(line.endswith(f"(best of 3 epochs: 2{said}; 1.0 s)") for line in lines)
    lines = last_lines(tmp_path, RESULT | {"best_weights": weights, "data": {"val": 0, "test": 5}}, caplog)
    assert any(line.endswith(f"(the last of 3 epochs{said}; 1.0 s)") for line in lines)


def test_a_score_that_is_not_finite_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = last_lines(tmp_path, RESULT | {"test/map": None}, caplog)
    assert any("test/map nan  test/top1 0.6500" in line for line in lines)


def test_only_files_that_are_there_are_advertised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("lr.png", "curves.png", "metrics.json", "confusion.png", "confusion_val.csv", "best.safetensors")
    assert not any(name in line for line in last_lines(tmp_path, RESULT, caplog) for name in names)
    (tmp_path / "curves.png").touch()
    (tmp_path / "metrics.json").touch()
    lines = " ".join(last_lines(tmp_path, RESULT, caplog))
    assert [name for name in names if name in lines] == ["curves.png", "metrics.json"]


@pytest.mark.parametrize(("loss", "name"), [(Loss.auto, "bce"), (Loss.asl, "asl")])
def test_a_run_with_several_labels_says_what_it_minimizes_and_what_judges(
    stripes: Path, tmp_path: Path, loss: Loss, name: str
) -> None:
    lines = [f"{kind}/{i}.png,{kind}{'|odd' if i % 2 else ''}" for kind in ("across", "down") for i in range(20)]
    table = tmp_path / "several.csv"
    table.write_text("\n".join(["path,label", *lines]))
    data = DataConf(source=SourceKind.table, table=str(table), root=str(stripes), label_separator="|", batch_size=8)
    model = ModelConf(family=Family.vit, name="glyph_vit")
    go(small(stripes, model=model, data=data, train__epochs=1, train__loss=loss), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["loss"], result["monitor"]) == (name, "val/map")
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"fine-tuned  val/map {result['val/map']:.4f}  val/top1" in log
    assert "confusion" not in log and not list((tmp_path / "run").glob("confusion*"))


PICTURES = ("lr.png", "curves.png", "confusion.png")


@pytest.fixture(scope="module")
def finished(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which no picture could be drawn, each for another reason."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    errors = iter([RuntimeError("Can not load face"), OSError(28, "No space left on device"), ValueError("no backend")])

    def fail(*_: object) -> None:
        raise next(errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "save_figure", fail)
        go(small(stripes, train__epochs=1), folder)
    return folder


def test_a_picture_that_cannot_be_drawn_fails_no_run(finished: Path) -> None:
    assert json.loads((finished / "result.json").read_text())["status"] == "finished"
    assert not list(finished.glob("*.png"))
    log = (finished / "run.log").read_text()
    for name, reason in zip(
        ("confusion.png", "lr.png", "curves.png"), ("load face", "No space", "no backend"), strict=True
    ):
        (line,) = [line for line in log.splitlines() if "WARNING" in line and f"the picture {name} is missing" in line]
        assert reason in line and f"finetune report {finished}" in line
    assert "  lr.png" not in log and "  metrics.json" in log


def test_report_draws_every_picture_of_a_run_again(finished: Path, tmp_path: Path, stripes: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    assert main(["report", str(folder)]) == 0
    go(small(stripes, train__epochs=1), tmp_path / "whole")
    for name in PICTURES:
        assert (folder / name).stat().st_size > 5000
    assert (folder / "confusion.png").read_bytes() == (tmp_path / "whole" / "confusion.png").read_bytes()


@pytest.mark.parametrize("text", ["", "a,b\n", "x,across,down,flat\nacross,1,2\n", "x,a,b,c\na,1,2,c\n"])
def test_a_matrix_that_is_none_is_one_line(
    finished: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "result.json").unlink()  # which has the checksum of the matrix
    (folder / "confusion.csv").write_text(text)
    assert main(["report", str(folder)]) == 1
    assert "confusion.csv is damaged" in capsys.readouterr().err


def test_a_sweep_without_its_picture_has_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.report.sweep import summarize

    claim(tmp_path, FolderKind.sweep)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text('{"status": "finished", "overrides": ["seed=1"], "val/top1": 0.9}')

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "sweep.png")

    monkeypatch.setattr(look, "save_figure", fail)
    assert summarize(tmp_path) == 0
    out = capsys.readouterr().out
    assert "warning: the picture sweep.png is missing" in out and f"finetune report {tmp_path}" in out
    assert f"table: {tmp_path / 'summary.csv'}\n" in out
    assert main(["report", str(tmp_path)]) == 1  # which was asked for the picture
    assert "Permission denied" in capsys.readouterr().err
