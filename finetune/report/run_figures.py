"""The pictures of a run, drawn from the files in its folder: `lr.png` (rates) and `curves.png` (learning curves)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.report import look
from finetune.report.columns import CURVES, axis_name, judge_of, metric_text
from finetune.report.jobs import rank
from finetune.report.rates_figure import rates_figure
from finetune.report.reading import number
from finetune.runs.history import History
from finetune.runs.records import read_rates, read_result
from finetune.system.terminal import counted

NEAR_AXIS = 0.12  # of the height of the axes: a note below a lower point would cover the numbers of the epochs

Series = tuple[str, Sequence[float], str]  # name, a value for each epoch, colour
Labels = dict[str, tuple[float, str]]  # name -> (value, colour)
# Curves of a panel, by the first part of their columns' names: training, validation, validation of averaged weights.
SERIES = (("train", look.ORANGE), ("val", look.BLUE), ("val_ema", look.SKY))


def plot_rates(run_dir: Path) -> None:
    """Draw `lr.png` from `rates.json` (planned rates) and `history.jsonl` (the rates at the start of each epoch)."""
    plan = read_rates(run_dir / "rates.json")
    look.save_figure(rates_figure(plan, History(run_dir / "history.jsonl").rows()), run_dir / "lr.png")


def plot_curves(run_dir: Path) -> None:
    """Draw `curves.png` from `history.jsonl`, with the scores and the metric that judges in `result.json`."""
    path = run_dir / "result.json"
    result = read_result(path) if path.exists() else {}
    look.save_figure(curves_figure(History(run_dir / "history.jsonl").rows(), result), run_dir / "curves.png")


def curves_figure(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> Any:
    """Returns the curves over the epochs as a matplotlib figure, from `history.jsonl` and `result.json`.

    Each metric has a panel: loss, top1, and the metric that judges the epochs where it is another one.
    """
    figure = look.new_figure()
    judge = judge_of(result)
    metrics = list(dict.fromkeys([*CURVES, judge]))
    place = {"left": 0.07, "right": 0.885, "top": 0.84, "bottom": 0.11, "wspace": 0.6 if len(metrics) == 2 else 0.95}
    epochs = [number(row["epoch"]) for row in rows]
    best = best_point(rows, result)
    for axes, metric in zip(figure.subplots(1, len(metrics), gridspec_kw=place), metrics, strict=True):
        series = [(name, _values(rows, f"{name}/{metric}"), colour) for name, colour in SERIES]
        look.clean_axes(axes)
        look.label_axes(axes, x="epoch", y=axis_name(metric, str(result.get("loss", ""))))
        extra: Labels = {}
        if metric in ("top1", judge):
            extra = _reference_scores(axes, epochs, metric, result)
        _draw_series(axes, epochs, series, extra)
        if metric == judge and best is not None:
            _mark_best(axes, epochs[best.row], best.score)
        _mark_not_finite(axes, epochs, [values for name, values, _ in series if _has(rows, f"{name}/{metric}")])
        axes.set_xlim(*((min(epochs) - 0.5, max(epochs) + 0.5) if epochs else (0.5, 1.5)))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    look.headline(figure, "Learning curves", _curves_subtitle(len(epochs), best, result))
    return figure


def _values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """A column of the history; NaN where a row lacks it or holds null."""
    return [number(row.get(key)) for row in rows]


def _has(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(key in row for row in rows)


def _draw_series(axes: Any, epochs: Sequence[float], shown: Sequence[Series], extra: Labels) -> None:
    """Draw lines with points, and write their names and those of `extra` at the right edge instead of in a legend."""
    labels = {}
    for name, values, colour in shown:
        if not any(math.isfinite(value) for value in values):
            continue
        size = 5 if len(epochs) <= 40 else 0
        axes.plot(epochs, values, color=colour, linewidth=2.2, marker="o", markersize=size, label=name, zorder=3)
        labels[name] = (next(value for value in reversed(values) if math.isfinite(value)), colour)
    labels |= extra
    if not labels:
        middle = {"transform": axes.transAxes, "ha": "center", "fontsize": 12, "color": look.FAINT}
        axes.text(0.5, 0.5, "not measured" if epochs else "no epoch has finished", **middle)
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    # Heights are shares of the axis; 0.042 of it is one line of text.
    heights = look.spread([(value - low) / (high - low) for value, _ in labels.values()], gap=0.042)
    for (name, (value, colour)), height in zip(labels.items(), heights, strict=True):
        text = f"{name} {value:.3f}" if abs(value) >= 0.01 or not value else f"{name} {value:.1e}"
        axes.text(1.02, height, text, transform=axes.transAxes, color=colour, fontsize=11, va="center")


def _reference_scores(axes: Any, epochs: Sequence[float], metric: str, result: dict[str, Any]) -> Labels:
    """Draw the zero-shot score as a dashed line and the test score as a diamond; returns their labels."""
    extra: Labels = {}
    zeroshot, test = number(result.get(f"zeroshot/{metric}")), number(result.get(f"test/{metric}"))
    if math.isfinite(zeroshot):
        axes.axhline(zeroshot, color=look.PURPLE, linewidth=1.8, linestyle=(0, (5, 3)), zorder=2)
        extra["zero-shot"] = (zeroshot, look.PURPLE)
    if math.isfinite(test) and epochs:
        diamond = {"s": 110, "marker": "D", "color": look.GREEN, "edgecolors": "white", "linewidths": 1.2}
        axes.scatter([max(epochs)], [test], zorder=6, clip_on=False, label="test", **diamond)
        extra["test"] = (test, look.GREEN)
    return extra


def _mark_best(axes: Any, epoch: float, score: float) -> None:
    """Draw a ring around the score of the best epoch, and name it below, or above where the axis is too near.

    Call it after `_draw_series`, which settles the height of the axes.
    """
    from matplotlib.patheffects import withStroke

    ring = {"s": 190, "facecolors": "none", "edgecolors": look.INK, "linewidths": 1.6}
    axes.scatter([epoch], [score], zorder=5, clip_on=False, **ring)
    low, high = axes.get_ylim()
    offset, side = (16, "bottom") if (score - low) / (high - low) < NEAR_AXIS else (-16, "top")
    place = {"textcoords": "offset points", "xytext": (0, offset), "ha": "center", "va": side, "zorder": 4}
    style = {"fontsize": 10.5, "color": look.INK, "path_effects": [withStroke(linewidth=3, foreground="white")]}
    axes.annotate(f"best, epoch {epoch:.0f}", (epoch, score), **place, **style)


class Best(NamedTuple):
    """The best epoch: its place in the history, from 0, and its score by the metric that judges, always finite."""

    row: int
    score: float


def best_point(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> Best | None:
    """The epoch that `result.json` calls the best, else the first with the best score; None where none has a score.

    The score is that of the weights or of their averages (`train.ema`): those that the run has kept, else the better.
    """
    judge, kept = judge_of(result), {"ema": ["val_ema"], "raw": ["val"]}
    scores = [
        _values(rows, f"{split}/{judge}") for split in kept.get(result.get("best_weights", ""), ["val", "val_ema"])
    ]
    best_of_epoch = [max(of_epoch, key=lambda score: rank(score, judge)) for of_epoch in zip(*scores, strict=True)]
    named = [index for index, row in enumerate(rows) if row["epoch"] == result.get("best_epoch")]
    found = [Best(index, best_of_epoch[index]) for index in named or range(len(rows))]
    found = [best for best in found if math.isfinite(best.score)]
    return max(found, key=lambda best: rank(best.score, judge), default=None)


def _mark_not_finite(axes: Any, epochs: Sequence[float], series: Sequence[Sequence[float]]) -> None:
    """Draw a cross at the top for each epoch with a NaN or infinite value, since a gap in a line is hard to see."""
    bad = [epoch for i, epoch in enumerate(epochs) if not all(math.isfinite(values[i]) for values in series)]
    if bad:
        above = axes.get_xaxis_transform()
        axes.scatter(bad, [0.985] * len(bad), marker="x", s=50, color=look.INK, linewidths=2, transform=above, zorder=6)
        axes.text(bad[0], 0.955, "not finite", transform=above, ha="center", va="top", fontsize=10.5, color=look.INK)


def _curves_subtitle(num_epochs: int, best: Best | None, result: dict[str, Any]) -> str:
    """The run's scores in one line; for a run that did not finish, also its status and its number of epochs."""
    status, judge = result.get("status"), judge_of(result)
    parts = (
        [f"{status} after {counted(num_epochs, 'epoch')}"] if status in ("failed", "diverged", "interrupted") else []
    )
    values = {
        "zero-shot": number(result.get(f"zeroshot/{judge}")),
        "best validation": math.nan if best is None else best.score,
        "test": number(result.get(f"test/{judge}")),
    }
    by = "" if judge == "top1" else f"{judge} "
    parts += [f"{name} {by}{metric_text(value)}" for name, value in values.items() if math.isfinite(value)]
    if best is not None and result.get("best_weights") == "ema":
        parts.append("(averaged weights)")
    return "   ".join(parts) or "nothing measured yet"
