"""The columns of `history.jsonl` that a person sees: on the progress bar, in an epoch's line, in `curves.png`.

`app/training.py` writes the columns into each epoch's row. A new column is shown once it has an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def metric_text(value: float | None) -> str:
    """Three decimals, or two digits where three decimals would show only zeros; `nan` for None, as NaN is stored."""
    if value is None:
        return "nan"
    return f"{value:.3f}" if not 0 < abs(value) < 0.01 else f"{value:.2g}"


@dataclass(frozen=True)
class Column:
    """A column that is no metric."""

    bar_name: str
    line_words: str  # behind its value in an epoch's line; empty where `epoch_line` places the value
    text: Callable[[float], str]


# Key in `history.jsonl` -> how it is shown. All other keys are metrics, under their own names.
COLUMNS = {
    "lr": Column("lr", "", "{:.1e}".format),
    "data_wait": Column("wait", "waiting for data", "{:.0%}".format),
    "prefix_hits": Column("cached", "from cached activations", "{:.0%}".format),
    "mfu": Column("mfu", "MFU", "{:.0%}".format),
}
# Names that the bar goes without on a narrow terminal, the least important first.
DROPPED_FIRST = ("lr", "top1", "cached", "wait")
# Metrics that every run has a panel of in `curves.png`; the one that judges the epochs gets a panel too.
CURVES = ("loss", "top1")
LOSSES = {"ce": "cross-entropy", "bce": "binary cross-entropy", "asl": "asymmetric"}  # by the words of `train.loss`


def judge_of(result: Mapping[str, Any]) -> str:
    """The metric that picks the best epoch, without the name of a split: `top1` where `result.json` names none."""
    return str(result.get("monitor", "val/top1")).removeprefix("val/")


def headlines(monitor: str) -> list[str]:
    """The metrics that a run is reported in: the one that picks the best epoch, such as `val/map`, then top1."""
    return list(dict.fromkeys([monitor.removeprefix("val/"), "top1"]))


def axis_name(metric: str, loss: str = "") -> str:
    """The name of an axis that shows a metric; `loss` is the word of the training loss, such as `bce`, if known."""
    if metric == "loss" and loss in LOSSES:
        return f"loss ({LOSSES[loss]})"
    return "top1 accuracy" if metric == "top1" else metric


def bar_texts(values: Mapping[str, float]) -> dict[str, str]:
    """Returns name to text for the progress bar; `values` has the keys of `history.jsonl`, metrics without prefix."""
    columns = {key: COLUMNS.get(key, Column(key, "", metric_text)) for key in values}
    return {column.bar_name: column.text(values[key]) for key, column in columns.items()}


def epoch_line(
    row: Mapping[str, Any], epochs: int, *, best: float | None = None, best_epoch: int = 0, monitor: str = "val/top1"
) -> str:
    """A row of the history in one line: `epoch 7/20  lr 9.1e-05  train/loss 0.412  val/top1 0.931 (best 0.934 @ 6)`.

    The rate is that with which the highest layer that learns, mostly the head, began the epoch. `epochs` is the length
    of the run. `monitor` is the metric that picks the best epoch; `best` is its best value so far, None at the start,
    and `best_epoch` (from 1) its epoch.
    """
    top = layer_of(list(row["lr"])[-1])  # groups go from the stem up; the head has none where it is frozen
    top_rate = next(rate for name, rate in row["lr"].items() if layer_of(name) == top)
    of_average = monitor.replace("val/", "val_ema/", 1)  # the monitor of the averaged weights, with train.ema
    metrics = dict.fromkeys(["train/loss", "val/top1", monitor, *([of_average] if of_average in row else [])])
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"lr {COLUMNS['lr'].text(top_rate)}"]
    for name in [name for name in metrics if name in row]:  # a run without validation images has no val/...
        note = f" (best {metric_text(best)} @ {best_epoch})" if name == monitor and best is not None else ""
        parts.append(f"{name} {metric_text(row[name])}{note}")
    told = {key: column for key, column in COLUMNS.items() if column.line_words and row.get(key, 0) >= 0.005}
    shares = [f"{column.text(row[key])} {column.line_words}" for key, column in told.items()]
    speed = f"{row['images_per_s']:,.0f} img/s"
    return "  ".join([*parts, f"{speed} ({', '.join(shares)})" if shares else speed])


def layer_of(group_name: str) -> str:
    """The layer of a parameter group by the group's name: `block.7` for `block.7.no_decay`."""
    return group_name.removesuffix(".muon").removesuffix(".no_decay").removesuffix(".decay")


def state_in_words(row: dict[str, Any]) -> str:
    """The `state` of a row of `core.plan.layer_rows`, with the number of frozen parameters where a part is frozen."""
    frozen = row["parameters"] - row["learning"]
    return f"learns, {frozen:,} frozen" if row["state"] == "learns" and frozen else str(row["state"])
