"""The pictures of a run, drawn from the files in its folder: `lr.png` (rates) and `curves.png` (learning curves)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.report import look
from finetune.report.columns import CURVES
from finetune.report.rates_figure import rates_figure
from finetune.report.reading import number
from finetune.runs.history import History
from finetune.runs.records import read_rates, read_result

Series = tuple[str, Sequence[float], str]  # name, a value for each epoch, colour
Labels = dict[str, tuple[float, str]]  # name -> (value, colour)


def plot_rates(run_dir: Path) -> None:
    """Draw `lr.png` from `rates.json` (planned rates) and `history.jsonl` (the rates at the start of each epoch)."""
    plan = read_rates(run_dir / "rates.json")
    look.save_figure(rates_figure(plan, History(run_dir / "history.jsonl").rows()), run_dir / "lr.png")


def plot_curves(run_dir: Path) -> None:
    """Draw `curves.png` from `history.jsonl`, with the scores of zero-shot and test in `result.json`."""
    path = run_dir / "result.json"
    result = read_result(path) if path.exists() else {}
    look.save_figure(curves_figure(History(run_dir / "history.jsonl").rows(), result), run_dir / "curves.png")


def curves_figure(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> Any:
    """Returns loss and accuracy over the epochs as a matplotlib figure, from `history.jsonl` and `result.json`."""
    figure = look.new_figure()
    place = {"left": 0.07, "right": 0.885, "top": 0.84, "bottom": 0.11, "wspace": 0.45}
    panels = figure.subplots(1, len(CURVES), gridspec_kw=place)
    epochs = [number(row["epoch"]) for row in rows]
    for axes, (y_name, *keys) in zip(panels, CURVES, strict=True):
        train, val = ([number(row.get(key)) for row in rows] for key in keys)
        measured = [values for key, values in zip(keys, (train, val), strict=True) if any(key in row for row in rows)]
        look.clean_axes(axes)
        look.label_axes(axes, x="epoch", y=y_name)
        extra = _reference_scores(axes, epochs, val, result) if keys[1] == "val/top1" else {}
        _draw_series(axes, epochs, [("train", train, look.ORANGE), ("val", val, look.BLUE)], extra)
        _mark_not_finite(axes, epochs, measured)
        axes.set_xlim(*((min(epochs) - 0.5, max(epochs) + 0.5) if epochs else (0.5, 1.5)))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    top1 = [number(row.get("val/top1")) for row in rows]
    look.headline(figure, "Learning curves", _curves_subtitle(epochs, top1, result))
    return figure


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
        text = f"{name} {value:.3f}" if abs(value) >= 0.01 else f"{name} {value:.1e}"
        axes.text(1.02, height, text, transform=axes.transAxes, color=colour, fontsize=11, va="center")


def _reference_scores(axes: Any, epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]) -> Labels:
    """Draw zero-shot as a dashed line, the best epoch as a ring, test as a diamond; returns their labels."""
    from matplotlib.patheffects import withStroke

    extra: Labels = {}
    zeroshot, test = number(result.get("zeroshot/top1")), number(result.get("test/top1"))
    if math.isfinite(zeroshot):
        axes.axhline(zeroshot, color=look.PURPLE, linewidth=1.8, linestyle=(0, (5, 3)), zorder=2)
        extra["zero-shot"] = (zeroshot, look.PURPLE)
    best = best_epoch(epochs, scores, result)
    if best is not None and math.isfinite(scores[best]):
        ring = {"s": 190, "facecolors": "none", "edgecolors": look.INK, "linewidths": 1.6}
        axes.scatter([epochs[best]], [scores[best]], zorder=5, clip_on=False, **ring)
        place = {"textcoords": "offset points", "xytext": (0, -16), "ha": "center", "va": "top", "zorder": 4}
        style = {"fontsize": 10.5, "color": look.INK, "path_effects": [withStroke(linewidth=3, foreground="white")]}
        axes.annotate(f"best, epoch {epochs[best]:.0f}", (epochs[best], scores[best]), **place, **style)
    if math.isfinite(test) and epochs:
        diamond = {"s": 110, "marker": "D", "color": look.GREEN, "edgecolors": "white", "linewidths": 1.2}
        axes.scatter([max(epochs)], [test], zorder=6, clip_on=False, label="test", **diamond)
        extra["test"] = (test, look.GREEN)
    return extra


def best_epoch(epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]) -> int | None:
    """Index of the best epoch: `best_epoch` of `result.json`, else the first with the highest validation top1."""
    named = number(result.get("best_epoch"))
    if named in epochs:
        return list(epochs).index(named)
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    return max(finite, key=lambda i: scores[i]) if finite else None


def _mark_not_finite(axes: Any, epochs: Sequence[float], series: Sequence[Sequence[float]]) -> None:
    """Draw a cross at the top for each epoch with a NaN or infinite value, since a gap in a line is hard to see."""
    bad = [epoch for i, epoch in enumerate(epochs) if not all(math.isfinite(values[i]) for values in series)]
    if bad:
        above = axes.get_xaxis_transform()
        axes.scatter(bad, [0.985] * len(bad), marker="x", s=50, color=look.INK, linewidths=2, transform=above, zorder=6)
        axes.text(bad[0], 0.955, "not finite", transform=above, ha="center", va="top", fontsize=10.5, color=look.INK)


def _curves_subtitle(epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]) -> str:
    """The run's scores in one line; for a run that did not finish, also its status and its number of epochs."""
    status = result.get("status")
    parts = [f"{status} after {len(epochs)} epochs"] if status in ("failed", "diverged", "interrupted") else []
    best = best_epoch(epochs, scores, result)
    values = {
        "zero-shot": number(result.get("zeroshot/top1")),
        "best validation": math.nan if best is None else scores[best],
        "test": number(result.get("test/top1")),
    }
    parts += [f"{name} {value:.3f}" for name, value in values.items() if math.isfinite(value)]
    return "   ".join(parts) or "nothing measured yet"
