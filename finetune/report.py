"""Pictures of a run from the files it left: the rate of every layer (`lr.png`) and the learning curves (`curves.png`).

No torch: a finished run can be looked at on any machine.

    python -m finetune.report outputs/2026-01-31/12-00-00.123456
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.figure import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SIZE_INCHES,
    clean_axes,
    headline,
    new_figure,
    number,
    ramp,
    read_json,
    save_figure,
    short,
    spread,
)
from finetune.log import History, layer_of, printable, say

# --- lr.png ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateLine:
    """Layers next to each other that share one rate, drawn as one line.

    Attributes:
        label: `block.3`, `readout + head`, `stem ... block.4`.
        planned: A rate for each x of `rates.json`.
        measured: (epochs done, rate) as each epoch really began.
        is_frozen: Whether these layers do not learn.
    """

    label: str
    planned: list[float]
    measured: list[tuple[float, float]]
    is_frozen: bool

    @property
    def peak(self) -> float:
        """Highest planned rate; 0 for frozen layers."""
        return max((rate for rate in self.planned if math.isfinite(rate)), default=0.0)


def plot_rates(run_dir: Path) -> None:
    """Draw `lr.png` from `rates.json` (the plan) and `history.jsonl` (what each epoch really began with).

    Raises:
        FileNotFoundError: No `rates.json`.
        ValueError: A damaged file.
        OSError: `lr.png` could not be written.
    """
    plan = read_json(run_dir / "rates.json")
    save_figure(rates_figure(plan, History(run_dir / "history.jsonl").rows()), run_dir / "lr.png")


def rates_figure(plan: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Any:
    """The rate of every layer over the run as a matplotlib figure: curves at the left, peak by layer at the right.

    Args:
        plan: `rates.json`: `interval` (of the scheduler), `x` (epochs), `layers` (name to rates, from the stem up),
            `frozen` (names).
        rows: Of `history.jsonl`.

    Raises:
        ValueError: `plan` lacks a key or its lists differ in length.
    """
    lines, x = rate_lines(plan, rows)
    learning = [line for line in lines if not line.is_frozen]
    figure = new_figure()
    curves, ladder = figure.subplots(
        1,
        2,
        width_ratios=(2.5, 1),
        gridspec_kw={"left": 0.085, "right": 0.985, "top": 0.84, "bottom": 0.11, "wspace": 0.28},
    )
    _draw_curves(curves, lines, x, is_stepwise=plan["interval"] == "epoch")
    _draw_ladder(ladder, lines)
    headline(figure, "Learning rate of every layer", _rates_subtitle(learning, x))
    return figure


def rate_lines(plan: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[list[RateLine], list[float]]:
    """Layers from the stem up, neighbours of one rate merged, and the x of their planned rates, in epochs.

    Raises:
        ValueError: See `rates_figure`.
    """
    for key in ("interval", "x", "layers", "frozen"):
        if key not in plan:
            raise ValueError(f"rates.json is damaged: it lacks '{key}'")
    x = [number(value) for value in plan["x"]]
    planned = {name: [number(rate) for rate in rates] for name, rates in plan["layers"].items()}
    frozen = set(plan["frozen"])
    for name, rates in planned.items():
        if len(rates) != len(x):
            raise ValueError(f"rates.json is damaged: layer {name} has {len(rates)} rates for {len(x)} values of x")
    measured: dict[str, dict[float, float]] = {}
    for row in rows:
        for group, rate in row["lr"].items():
            measured.setdefault(layer_of(group), {})[number(row["epoch"]) - 1] = number(rate)

    # A frozen layer may be named without rates: it has none.
    names = [*(name for name in plan["frozen"] if name not in planned), *planned]
    merged: list[tuple[list[str], RateLine]] = []
    for name in names:
        line = RateLine(name, planned.get(name, [0.0] * len(x)), sorted(measured.get(name, {}).items()), name in frozen)
        if merged and _is_same(merged[-1][1], line):
            merged[-1][0].append(name)
        else:
            merged.append(([name], line))
    return [replace(line, label=_label(group)) for group, line in merged], x


def _label(names: Sequence[str]) -> str:
    """One name for neighbours: `stem`, `readout + head`, `stem ... block.4`."""
    return names[0] if len(names) == 1 else f"{names[0]} {'+' if len(names) == 2 else '...'} {names[-1]}"


def _is_same(one: RateLine, other: RateLine) -> bool:
    """Whether two layers can share a line: same plan, same measurements."""
    if one.is_frozen or other.is_frozen:
        return one.is_frozen and other.is_frozen
    pairs = [*zip(one.planned, other.planned, strict=True)]
    pairs += [(a[1], b[1]) for a, b in zip(one.measured, other.measured, strict=False)]
    same_points = [a[0] for a in one.measured] == [b[0] for b in other.measured]
    return same_points and all(math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def _rates_subtitle(learning: Sequence[RateLine], x: Sequence[float]) -> str:
    """The rule behind the picture in words, where the peaks follow one."""
    peaks = [line.peak for line in learning]
    if not peaks or peaks[-1] == 0:
        return "nothing learns"
    text = f"peak {short(peaks[-1])} at {learning[-1].label}"
    ratios = [low / high for low, high in pairwise(peaks) if high > 0]
    if ratios and all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
        text += f"; each layer further from the output at {ratios[0]:.4g} of the one above"
        text += f"; {short(peaks[0])} at {learning[0].label}"
    return text


def turning_points(rates: Sequence[float]) -> tuple[int, list[int]]:
    """Where a curve turns: the index at which its warmup ends (0: none), and those at which its cycles end.

    A cycle ends at the lowest point ahead of a rise, at a restart's jump, or where the curve stays on its floor.
    """
    last = len(rates) - 1
    top = 0
    while top < last and rates[top + 1] > rates[top]:
        top += 1
    warmup_end = top if top < last else 0
    ends = []
    for i in range(max(top, 1), last):
        falls, rises = rates[i] < rates[i - 1], rates[i + 1] > rates[i]
        if falls and (rises or all(rate == rates[i] for rate in rates[i:])):
            # A restart jumps from wherever it stood straight to the top; a mirror turns at the bottom itself.
            ends.append(i + 1 if rises and rates[i + 1] >= rates[top] > rates[i - 1] else i)
    return warmup_end, ends


def _draw_curves(axes: Any, lines: Sequence[RateLine], x: Sequence[float], *, is_stepwise: bool) -> None:
    """Planned rates as lines, measured ones as dots, warmup shaded, ends of cycles marked.

    A schedule that steps once an epoch holds each rate for the whole of it, and is drawn as the stairs that it is.
    """
    clean_axes(axes, xlabel="epoch", ylabel="learning rate")
    learning = [line for line in lines if not line.is_frozen]
    top = (
        max([line.peak for line in learning] + [rate for line in learning for _, rate in line.measured], default=0)
        or 1.0
    )
    end = (x[-1] + 1 if is_stepwise else x[-1]) if x else 1.0
    if learning and x:
        _mark_phases(axes, learning[-1].planned, x, top)
    for line in lines:
        if line.is_frozen:
            axes.plot([0, end], [0, 0], color=FAINT, linewidth=2.2, label=line.label, zorder=2)
    for line, colour in zip(learning, ramp(len(learning)), strict=True):
        xs, ys = ([*x, end], [*line.planned, *line.planned[-1:]]) if is_stepwise else (list(x), line.planned)
        style: dict[str, Any] = {"color": colour, "linewidth": 2.2 if len(learning) <= 16 else 1.2, "label": line.label}
        axes.plot(xs, ys, drawstyle="steps-post" if is_stepwise else "default", zorder=3, **style)
        num_dots = len(learning) * len(line.measured)
        size = 36 if num_dots <= 250 else 20 if num_dots <= 700 else 8
        points = {"s": size, "color": [colour], "edgecolors": "white", "linewidths": 0.8 if size > 8 else 0.3}
        axes.scatter([p[0] for p in line.measured], [p[1] for p in line.measured], zorder=4, clip_on=False, **points)
    axes.set_ylim(-0.015 * top, 1.06 * top)
    axes.set_xlim(0, end if end > 0 else 1)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.set_major_formatter(lambda value, _: short(round(value, 12)))
    _explain_marks(axes, is_measured=any(line.measured for line in learning))


def _mark_phases(axes: Any, rates: Sequence[float], x: Sequence[float], top: float) -> None:
    """Shade the warmup and mark where cycles end."""
    warmup_end, ends = turning_points(rates)
    note = {"fontsize": 10.5, "color": "#555b66", "va": "top"}
    if warmup_end:
        axes.axvspan(x[0], x[warmup_end], color="#f1f3f6", zorder=0, linewidth=0)
        axes.text(x[0], 1.05 * top, " warmup", ha="left", **note)
    for index in ends[:12]:
        axes.axvline(x[index], color=FAINT, linewidth=1.2, linestyle=(0, (2, 3)), zorder=1)
        axes.text(x[index], 1.05 * top, " end of cycle", ha="left", **note)


def _explain_marks(axes: Any, *, is_measured: bool) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=INK, linewidth=2.2, label="planned")]
    if is_measured:
        dot: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        marks.append(Line2D([], [], color=INK, label="what the optimizer held as the epoch began", **dot))
    axes.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=10.5,
        borderaxespad=0.2,
    )


def _draw_ladder(axes: Any, lines: Sequence[RateLine]) -> None:
    """Every layer by name with its peak rate, head on top: the key to the colours and the rule at a glance."""
    learning = [line for line in lines if not line.is_frozen]
    top = max((line.peak for line in learning), default=0) or 1.0
    colours = iter(ramp(len(learning)))
    row_points = 0.73 * SIZE_INCHES[1] * 72 / max(len(lines), 7)
    fontsize = max(6.5, min(11.0, 0.72 * row_points))
    every = math.ceil(1.15 * fontsize / row_points)  # more layers than lines of text: name every second, third...
    for row, line in enumerate(lines):
        is_named = (len(lines) - 1 - row) % every == 0 or line.is_frozen
        colour = FAINT if line.is_frozen else next(colours)
        axes.barh(row, line.peak, height=0.62, color=colour, zorder=3)
        text = "frozen: rate 0" if line.is_frozen else short(line.peak)
        if is_named:
            style = {"fontsize": fontsize, "color": FAINT if line.is_frozen else INK, "va": "center"}
            axes.text(line.peak + 0.02 * top, row, text, **style)
            axes.text(-0.03 * top, row, line.label, ha="right", **style)
    axes.set_xlim(0, 1.28 * top)
    # A few layers stay bars, not walls: as many rows as the ladder of a small model has.
    spare = max(7 - len(lines), 0) / 2
    axes.set_ylim(-0.6 - spare, len(lines) - 0.4 + spare)
    axes.set_axis_off()
    axes.set_title("peak rate by layer", fontsize=12, color=INK, loc="left", pad=9)


# --- curves.png ------------------------------------------------------------------------------------------------------


def plot_curves(run_dir: Path) -> None:
    """Draw `curves.png` from `history.jsonl`, with zero-shot and test from `result.json` where it has them.

    Raises:
        ValueError: A damaged file.
        OSError: `curves.png` could not be written.
    """
    path = run_dir / "result.json"
    result = read_json(path) if path.exists() else {}
    save_figure(curves_figure(History(run_dir / "history.jsonl").rows(), result), run_dir / "curves.png")


def curves_figure(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> Any:
    """Loss and accuracy over the epochs as a matplotlib figure.

    Args:
        rows: Of `history.jsonl`; none, one, or with null for NaN.
        result: `result.json`, or empty.
    """
    figure = new_figure()
    loss, accuracy = figure.subplots(
        1, 2, gridspec_kw={"left": 0.07, "right": 0.885, "top": 0.84, "bottom": 0.11, "wspace": 0.45}
    )
    clean_axes(loss, xlabel="epoch", ylabel="loss (cross-entropy)")
    clean_axes(accuracy, xlabel="epoch", ylabel="top1 accuracy")
    epochs = [number(row["epoch"]) for row in rows]
    series = {
        key: [number(row.get(key)) for row in rows] for key in ("train/loss", "val/loss", "train/top1", "val/top1")
    }
    _draw_series(loss, epochs, [("train", series["train/loss"], ORANGE), ("val", series["val/loss"], BLUE)], {})
    extra = _reference_scores(accuracy, epochs, series["val/top1"], result)
    shown = [("train", series["train/top1"], ORANGE), ("val", series["val/top1"], BLUE)]
    _draw_series(accuracy, epochs, shown, extra)
    for axes, keys in ((loss, ("train/loss", "val/loss")), (accuracy, ("train/top1", "val/top1"))):
        _mark_not_finite(axes, epochs, [series[key] for key in keys])
        axes.set_xlim(*((min(epochs) - 0.5, max(epochs) + 0.5) if epochs else (0.5, 1.5)))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    headline(figure, "Learning curves", _curves_subtitle(epochs, series["val/top1"], result))
    return figure


def _draw_series(
    axes: Any,
    epochs: Sequence[float],
    shown: Sequence[tuple[str, Sequence[float], str]],
    extra: dict[str, tuple[float, str]],
) -> None:
    """Lines with points, named at their right ends instead of in a legend.

    Args:
        axes: Where.
        epochs: x.
        shown: (name, values, colour) of each line.
        extra: Further names at the right edge: (value, colour).
    """
    labels = {}
    for name, values, colour in shown:
        if not any(math.isfinite(value) for value in values):
            continue
        size = 5 if len(epochs) <= 40 else 0
        axes.plot(epochs, values, color=colour, linewidth=2.2, marker="o", markersize=size, label=name, zorder=3)
        labels[name] = (next(value for value in reversed(values) if math.isfinite(value)), colour)
    labels |= extra
    if not labels:
        axes.text(0.5, 0.5, "no epoch has finished", transform=axes.transAxes, ha="center", color=FAINT, fontsize=12)
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    # In shares of the axis, so that names are as far apart as their letters are high.
    heights = spread([(value - low) / (high - low) for value, _ in labels.values()], gap=0.042)
    for (name, (value, colour)), height in zip(labels.items(), heights, strict=True):
        text = f"{name} {value:.3f}" if abs(value) >= 0.01 else f"{name} {value:.1e}"
        axes.text(1.02, height, text, transform=axes.transAxes, color=colour, fontsize=11, va="center")


def _reference_scores(
    axes: Any, epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """Zero-shot as a dashed line, the best epoch as a ring, test as a diamond at the end; their names and values."""
    extra = {}
    zeroshot, test = number(result.get("zeroshot/top1")), number(result.get("test/top1"))
    if math.isfinite(zeroshot):
        axes.axhline(zeroshot, color=PURPLE, linewidth=1.8, linestyle=(0, (5, 3)), zorder=2)
        extra["zero-shot"] = (zeroshot, PURPLE)
    best = best_epoch(epochs, scores, result)
    if best is not None and math.isfinite(scores[best]):
        ring = {"s": 190, "facecolors": "none", "edgecolors": INK, "linewidths": 1.6}
        axes.scatter([epochs[best]], [scores[best]], zorder=5, clip_on=False, **ring)
        place: dict[str, Any] = {"bbox": {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}, "zorder": 4}
        place |= {"textcoords": "offset points", "xytext": (0, -16), "ha": "center", "va": "top"}
        axes.annotate(
            f"best, epoch {epochs[best]:.0f}", (epochs[best], scores[best]), fontsize=10.5, color=INK, **place
        )
    if math.isfinite(test) and epochs:
        diamond = {"s": 110, "marker": "D", "color": GREEN, "edgecolors": "white", "linewidths": 1.2}
        axes.scatter([max(epochs)], [test], zorder=6, clip_on=False, label="test", **diamond)
        extra["test"] = (test, GREEN)
    return extra


def best_epoch(epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]) -> int | None:
    """Index of the best epoch: as the run itself says, else the first with the highest validation top1."""
    named = number(result.get("best_epoch"))
    if named in epochs:
        return list(epochs).index(named)
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    return max(finite, key=lambda i: scores[i]) if finite else None


def _mark_not_finite(axes: Any, epochs: Sequence[float], series: Sequence[Sequence[float]]) -> None:
    """A cross at the top for each epoch with a value that was NaN or infinite: a gap alone would look like nothing."""
    bad = [epoch for i, epoch in enumerate(epochs) if not all(math.isfinite(values[i]) for values in series)]
    if bad:
        above = axes.get_xaxis_transform()
        axes.scatter(bad, [0.985] * len(bad), marker="x", s=50, color=INK, linewidths=2, transform=above, zorder=6)
        axes.text(bad[0], 0.955, "not finite", transform=above, ha="center", va="top", fontsize=10.5, color=INK)


def _curves_subtitle(epochs: Sequence[float], scores: Sequence[float], result: dict[str, Any]) -> str:
    """The outcome in one line."""
    parts = []
    status = result.get("status")
    if status in ("failed", "diverged", "interrupted"):
        parts.append(f"{status} after {len(epochs)} epochs")
    best = best_epoch(epochs, scores, result)
    for name, value in (
        ("zero-shot", number(result.get("zeroshot/top1"))),
        ("best validation", scores[best] if best is not None else math.nan),
        ("test", number(result.get("test/top1"))),
    ):
        if math.isfinite(value):
            parts.append(f"{name} {value:.3f}")
    return "   ".join(parts) or "nothing measured yet"


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraw the pictures of a run, or the summary of a sweep; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.report",
        description="Redraw lr.png and curves.png of a run, or the summary of a sweep.",
    )
    parser.add_argument("folder", type=Path, help="a run directory, or the folder of a sweep")
    folder: Path = parser.parse_args(arguments).folder
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"{printable(str(folder))} is no folder: give a run or a sweep under outputs/")
        if (folder / "rates.json").exists() or (folder / "history.jsonl").exists():
            _redraw(folder)
            return 0
        from finetune.sweep import job_folders, summarize

        if not job_folders(folder):
            raise FileNotFoundError(
                f"{printable(str(folder))} holds neither a run (history.jsonl) nor a sweep (0, 1, ...)"
            )
        summarize(folder)
    except (OSError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _redraw(run_dir: Path) -> None:
    """Both pictures, as far as their files go."""
    if (run_dir / "rates.json").exists():
        plot_rates(run_dir)
        say(str(run_dir / "lr.png"))
    if (run_dir / "history.jsonl").exists():
        plot_curves(run_dir)
        say(str(run_dir / "curves.png"))


if __name__ == "__main__":
    sys.exit(main())
