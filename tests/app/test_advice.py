"""Laws of the last lines of a run: a remark where its curves show what matters, as a command that works; a sweep."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.app.advice import log_next
from finetune.config.words.configuration import read_settings

GOOD: dict[str, Any] = {
    **{"overrides": [], "monitor": "val/top1", "data": {"val": 1000}, "best_epoch": 3, "steps": 5000, "val/top1": 0.97},
}


def rows_of(losses: Sequence[float], top1: float = 0.97) -> list[dict[str, Any]]:
    return [{"epoch": index, "train/loss": loss, "train/top1": top1} for index, loss in enumerate(losses, 1)]


STEADY = rows_of([0.9, 0.5, 0.4, 0.4, 0.4])
FALLING = rows_of([0.9, 0.7, 0.5, 0.4, 0.3])


def said(
    caplog: pytest.LogCaptureFixture, result: dict[str, Any], rows: list[dict[str, Any]], *words: str
) -> list[str]:
    caplog.set_level(logging.INFO, "finetune")
    caplog.clear()
    conf = read_settings(words).conf
    log_next(conf, {**GOOD, "overrides": list(words), **result}, rows)
    lines = [record.getMessage() for record in caplog.records]
    for line in lines:  # each command is one that the program takes
        proposed = shlex.split(line.split("python -m finetune ")[1])
        read_settings([word.split(",")[0] for word in proposed if word != "-m"])
    return lines


def test_a_run_without_a_remark_proposes_a_sweep_of_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    words = ["optim.lr=0.003", "model=vit", "hydra.run.dir=mine"]
    assert said(caplog, {}, STEADY, *words) == [
        "next, a sweep around it: python -m finetune -m model=vit optim.lr=0.001,0.003,0.009"
    ]


@pytest.mark.parametrize(
    ("steps", "words", "end"),
    [
        (80, [], "after only 80 optimizer steps; try: python -m finetune train.epochs=20 data.batch_size=32"),
        (80, ["data.batch_size=8"], "is the best; try: python -m finetune data.batch_size=8 train.epochs=20"),
        (5000, ["train.epochs=40"], "is the best; try: python -m finetune train.epochs=80"),
    ],
)
def test_a_run_that_still_got_better_is_to_be_longer(
    caplog: pytest.LogCaptureFixture, steps: int, words: list[str], end: str
) -> None:
    lines = said(caplog, {"best_epoch": 4, "steps": steps}, FALLING, *words)
    assert len(lines) == 2
    assert lines[0].startswith("it still got better when it ended: epoch 4 of 5 is the best")
    assert lines[0].endswith(end)


@pytest.mark.parametrize(
    ("result", "rows"),
    [
        ({"best_epoch": 3}, FALLING),  # the best epoch is long ago
        ({"best_epoch": 5}, STEADY),  # nothing more is learnt
        ({"best_epoch": 5, "val/top1": 1.0}, FALLING),  # nothing is left to gain
        ({"best_epoch": 2}, rows_of([0.9, 0.5])),  # two epochs say nothing
        ({"best_epoch": 0, "data": {"val": 0}}, FALLING),
        ({"best_epoch": 5}, rows_of([0.9, 0.5, float("nan")])),
    ],
)
def test_other_runs_are_not(
    caplog: pytest.LogCaptureFixture, result: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    assert len(said(caplog, result, rows)) == 1


def test_a_small_val_is_told_with_its_interval(caplog: pytest.LogCaptureFixture) -> None:
    small = {"data": {"val": 18}, "val/top1": 15 / 18}
    words = ["data=folder", "data.root=/pictures", "data.val_fraction=0.2"]
    line, _ = said(caplog, small, STEADY, *words)
    # Wilson's interval of 15 of 18, from tables.
    assert "val has 18 images, so its top1 0.83 may be 0.61 to 0.94 on others" in line
    folds = "data.folds=5 data.fold=0,1,2,3,4"  # beside which only the share of the defaults is not refused
    assert line.endswith(f"-m data=folder data.root=/pictures data.val_fraction=0.1 {folds}")
    assert said(caplog, small, STEADY, *words[:2])[0].endswith(f"-m data=folder data.root=/pictures {folds}")
    assert len(said(caplog, small, STEADY, "data.folds=3")) == 1
    assert len(said(caplog, {**small, "monitor": "val/map"}, STEADY)) == 1


def test_folds_are_proposed_beside_a_share_out_of_a_file(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    (folder / "conf" / "data").mkdir(parents=True)
    (folder / "conf" / "data" / "mine.yaml").write_text("source: folder\nroot: /pictures\nval_fraction: 0.2\n")
    line, _ = said(caplog, {"data": {"val": 18}, "val/top1": 15 / 18}, STEADY, "data=mine")
    assert "-m data=mine data.val_fraction=0.1 data.folds=5" in line


def test_images_that_are_learnt_by_heart(caplog: pytest.LogCaptureFixture) -> None:
    line, _ = said(caplog, {"val/top1": 0.7}, rows_of([0.3, 0.2, 0.2], top1=1.0), "augment=none")
    assert line.endswith("-m augment=light,three_augment,randaug")
    assert len(said(caplog, {"val/top1": 0.95}, rows_of([0.3, 0.2, 0.2], top1=1.0))) == 1
    assert len(said(caplog, {"val/top1": 0.7}, rows_of([0.3, 0.2, 0.2], top1=0.8))) == 1
