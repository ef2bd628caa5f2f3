"""Laws of a run's last lines: they tell the metric that judged, and only files that are there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from small_runs import go, small

from finetune.app.session import log_summary
from finetune.config import DataConf, Family, Loss, ModelConf, SourceKind

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
