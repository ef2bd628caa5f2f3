"""Laws of columns.py: one place says which columns a person sees, under which names, in which format."""

from __future__ import annotations

import math

from finetune.report.columns import bar_texts, epoch_line, layer_of

ROW = {
    "epoch": 7,
    "train/loss": 0.4121,
    "val/loss": 0.0004321,
    "val/top1": 0.9312,
    "lr": {"stem.decay": 1e-6, "readout.decay": 2e-5, "head.decay": 9.1e-5, "head.no_decay": 9.1e-5},
    "images_per_s": 4123.4,
}


def test_epoch_line() -> None:
    line = epoch_line(ROW, 20, best=0.934, best_epoch=6)
    assert line == "epoch  7/20  lr 9.1e-05  train/loss 0.412  val/top1 0.931 (best 0.934 @ 6)  4,123 img/s"
    line = epoch_line(
        {**ROW, "train/loss": math.nan, "val/top1": None}, 7, monitor="val/loss", best=0.0004, best_epoch=7
    )
    assert (
        line == "epoch 7/7  lr 9.1e-05  train/loss nan  val/top1 nan  val/loss 0.00043 (best 0.0004 @ 7)  4,123 img/s"
    )
    assert "best" not in epoch_line(ROW, 20)


def test_layer_of_a_group() -> None:
    names = ["stem.decay", "block.7.no_decay", "head.decay"]
    assert [layer_of(name) for name in names] == ["stem", "block.7", "head"]


def test_a_share_is_shown_with_its_words_from_half_a_percent_on() -> None:
    line = epoch_line({**ROW, "data_wait": 0.02, "prefix_hits": 1.0, "mfu": 0.004}, 20)
    assert line.endswith("4,123 img/s (2% waiting for data, 100% from cached activations)")


def test_the_bar_has_short_names() -> None:
    shown = bar_texts(
        {"loss": 0.4121, "top1": 0.0004321, "lr": 9.1e-5, "data_wait": 0.02, "prefix_hits": 0, "mfu": 0.4}
    )
    assert shown == {"loss": "0.412", "top1": "0.00043", "lr": "9.1e-05", "wait": "2%", "cached": "0%", "mfu": "40%"}
