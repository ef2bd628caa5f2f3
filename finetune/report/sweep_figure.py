"""The picture of a sweep: one number varied, a grid of two, or a ranking of anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.report.figure import BLUE, FAINT, GREEN, INK, SIZE_INCHES, clean_axes, headline, new_figure
from finetune.system.terminal import printable

# Rows that a ranking shows, the best ones; more would be too small to read.
MAX_ROWS = 30
# Share of a grid of two settings that must have a score to be shown as one.
MIN_FILLED = 0.5


@dataclass(frozen=True)
class Score:
    """What one finished job reached.

    Attributes:
        overrides: What the sweep varied, as typed; `seed` may be among it.
        val: The best epoch's validation score, in the metric that the sweep is ranked by.
        test: The same of the test, or NaN.
    """

    overrides: dict[str, str]
    val: float
    test: float

    def setting(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Its values of `keys`; a key that it left alone is `default`."""
        return tuple(self.overrides.get(key, "default") for key in keys)


def rank(score: float, metric: str) -> float:
    """A number that is greater for the better score; nothing is worse than NaN. Of a loss or ECE less is better."""
    if not math.isfinite(score):
        return -math.inf
    return -score if metric.endswith(("loss", "ece")) else score


def sweep_figure(scores: Sequence[Score], varied: Sequence[str], *, num_missing: int, metric: str = "top1") -> Any:
    """The picture that suits what was varied, as a matplotlib figure; seeds are points around their mean.

    Args:
        scores: Of finished jobs, at least one. A job that failed is absent, never 0.
        varied: Keys that differ between jobs.
        num_missing: How many jobs have no score.
        metric: What `scores` are of, and what settings are ranked by.
    """
    keys = [key for key in varied if key != "seed"]
    figure = new_figure()
    if len(keys) == 1 and len({score.setting(keys) for score in scores}) > 1:
        _draw_line(figure, scores, keys[0], metric)
    elif len(keys) == 2 and _is_grid(scores, keys):
        _draw_grid(figure, scores, keys, metric)
    else:
        _draw_ranking(figure, scores, keys or list(varied), metric)
    headline(
        figure,
        f"Sweep over {' and '.join(keys or varied) or 'one job'}"[:90],
        _subtitle(scores, keys, num_missing, metric),
    )
    return figure


def _subtitle(scores: Sequence[Score], keys: Sequence[str], num_missing: int, metric: str) -> str:
    """The winner by mean validation in words, and how much is missing."""
    groups = by_setting(scores, keys)
    best = _best(groups, metric)
    name = " ".join(f"{key}={value}" for key, value in zip(keys, best, strict=True))
    text = f"best by validation: {name}   " if name else ""
    text += f"val{'' if metric == 'top1' else f'/{metric}'} {mean_val(groups[best]):.4f}"
    tests = [score.test for score in groups[best] if math.isfinite(score.test)]
    text += f"   test {statistics.fmean(tests):.4f}" if tests else ""
    text += f"   (mean of {len(groups[best])} seeds)" if len(groups[best]) > 1 else ""
    return text + (f"   without a score: {num_missing} of {num_missing + len(scores)} jobs" if num_missing else "")


def by_setting(scores: Sequence[Score], keys: Sequence[str]) -> dict[tuple[str, ...], list[Score]]:
    """Scores put together where `keys` are the same, in order of appearance."""
    groups: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        groups.setdefault(score.setting(keys), []).append(score)
    return groups


def mean_val(scores: Sequence[Score]) -> float:
    """Mean validation score."""
    return statistics.fmean(score.val for score in scores)


def _best(groups: Mapping[tuple[str, ...], Sequence[Score]], metric: str) -> tuple[str, ...]:
    """The setting with the best mean; of equals the first."""
    return max(groups, key=lambda setting: rank(mean_val(groups[setting]), metric))


def _axis(metric: str) -> str:
    return "top1 accuracy" if metric == "top1" else metric


def levels(values: Sequence[str]) -> list[str]:
    """Distinct values, numbers by size, other words in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if all(map(_is_number, distinct)) else distinct


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def positions(values: Sequence[str]) -> tuple[list[float], str]:
    """Where levels stand on an axis, and its scale: `linear`, `log` where numbers span decades, or `even` steps.

    Args:
        values: As `levels` gives them.
    """
    if not all(map(_is_number, values)):
        return [float(i) for i in range(len(values))], "even"
    numbers = [float(value) for value in values]
    positive = [value for value in numbers if value > 0]
    if len(positive) < 2 or max(positive) / min(positive) < 20:
        return numbers, "linear"
    if len(positive) == len(numbers):
        return numbers, "log"
    return [float(i) for i in range(len(values))], "even"  # 0 and decades: neither scale shows both


# --- one key ---------------------------------------------------------------------------------------------------------


def _draw_line(figure: Any, scores: Sequence[Score], key: str, metric: str) -> None:
    """Validation and test against one key: a dot a seed, and a line through means where the key is a number."""
    axes = figure.subplots(gridspec_kw={"left": 0.085, "right": 0.885, "top": 0.85, "bottom": 0.13})
    clean_axes(axes, xlabel="", ylabel=_axis(metric))
    axes.set_xlabel(printable(key), fontsize=12, color=INK, labelpad=8, parse_math=False)
    names = levels([score.setting([key])[0] for score in scores])
    places, scale = positions(names)
    place = dict(zip(names, places, strict=True))
    is_number = all(map(_is_number, names))
    for label, colour, marker in (("val", BLUE, "o"), ("test", GREEN, "D")):
        points = [(place[s.setting([key])[0]], s.val if label == "val" else s.test) for s in scores]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), s=42, color=colour, marker=marker, alpha=0.45, linewidths=0, zorder=3)
        xs = sorted({x for x, _ in points})
        means = [statistics.fmean(y for x, y in points if x == at) for at in xs]
        style: dict[str, Any] = {"linewidth": 2.2} if is_number else {"linestyle": "", "markersize": 11}
        axes.plot(xs, means, color=colour, marker=marker, markeredgecolor="white", label=label, zorder=4, **style)
    groups = by_setting(scores, [key])
    best = _best(groups, metric)
    ring: dict[str, Any] = {"s": 230, "facecolors": "none", "edgecolors": INK, "linewidths": 1.6}
    axes.scatter([place[best[0]]], [mean_val(groups[best])], zorder=5, label="best val", **ring)
    _name_ticks(axes, names, places, scale)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11, borderaxespad=0, handletextpad=0.4
    )


def _name_ticks(axes: Any, names: Sequence[str], places: Sequence[float], scale: str) -> None:
    """A tick at each value that was tried, and at nothing between."""
    if scale == "log":
        axes.set_xscale("log")
        axes.minorticks_off()
    if scale != "even" and len(names) > 14:
        return
    turned = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 100 else {}
    axes.set_xticks(places, [_cut(name, 24) for name in names], parse_math=False, **turned)
    if scale == "even":
        axes.set_xlim(-0.5, len(names) - 0.5)


def _cut(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --- two keys --------------------------------------------------------------------------------------------------------


def _is_grid(scores: Sequence[Score], keys: Sequence[str]) -> bool:
    """Whether two keys were varied against each other, and most combinations have a score."""
    found = by_setting(scores, keys)
    columns, rows = ({setting[i] for setting in found} for i in (0, 1))
    return min(len(rows), len(columns)) > 1 and len(found) >= MIN_FILLED * len(rows) * len(columns)


def _draw_grid(figure: Any, scores: Sequence[Score], keys: Sequence[str], metric: str) -> None:
    """Two maps, validation and test, of means over seeds; the best cell by validation framed in both."""
    both = figure.subplots(1, 2, gridspec_kw={"left": 0.1, "right": 0.98, "top": 0.8, "bottom": 0.14, "wspace": 0.12})
    groups = by_setting(scores, keys)
    columns, rows = (levels([setting[i] for setting in groups]) for i in (0, 1))
    best = _best(groups, metric)
    for axes, split in zip(both, ("val", "test"), strict=True):
        cells = [[_cell(groups.get((column, row), []), split) for column in columns] for row in rows]
        place = columns.index(best[0]), rows.index(best[1])
        _draw_map(axes, cells, frame=place, bright_is_low=rank(1.0, metric) < 0)
        axes.set_title(f"{split}/{metric}", fontsize=12, color=INK, loc="left", pad=8)
        axes.set_xlabel(printable(keys[0]), fontsize=12, color=INK, labelpad=8, parse_math=False)
        turned = {"rotation": 30, "ha": "right"} if sum(map(len, columns)) > 45 else {}
        axes.set_xticks(range(len(columns)), [_cut(name, 16) for name in columns], parse_math=False, **turned)
        axes.set_yticks(range(len(rows)), [_cut(name, 16) for name in rows], parse_math=False)
    both[1].tick_params(labelleft=False)
    both[0].set_ylabel(printable(keys[1]), fontsize=12, color=INK, labelpad=8, parse_math=False)


def _cell(scores: Sequence[Score], split: str) -> float:
    values = [score.val if split == "val" else score.test for score in scores]
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _draw_map(axes: Any, cells: Sequence[Sequence[float]], *, frame: tuple[int, int], bright_is_low: bool) -> None:
    """A heat map with its numbers, the brighter the better; a cell without a score is hatched."""
    from matplotlib.patches import Rectangle

    found = [value for row in cells for value in row if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    colours = "cividis_r" if bright_is_low else "cividis"
    axes.imshow(cells, cmap=colours, vmin=low, vmax=max(high, low + 1e-6), aspect="auto", origin="lower")
    fontsize = max(6.0, min(12.0, 88.0 / max(len(cells), len(cells[0]))))
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if math.isfinite(value):
                is_dark = (value < (low + high) / 2) != bright_is_low
                colour = "white" if is_dark else INK
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=fontsize, color=colour)
            else:
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f4f5f7", edgecolor="#cfd3da", hatch="///")
                )
    x, y = frame
    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="#d55e00", linewidth=3))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=11, length=0, pad=6)


# --- anything else ---------------------------------------------------------------------------------------------------


def _draw_ranking(figure: Any, scores: Sequence[Score], keys: Sequence[str], metric: str) -> None:
    """Settings by mean validation, best on top: a small dot a seed, large ones the means."""
    groups = by_setting(scores, keys)
    ranked = sorted(groups, key=lambda setting: rank(mean_val(groups[setting]), metric), reverse=True)[:MAX_ROWS]
    # The last part of a key is enough to tell them apart, unless two end alike.
    ends = [key.rpartition(".")[2] for key in keys]
    shown = ends if len(set(ends)) == len(ends) else list(keys)
    labels = [
        _cut("  ".join(f"{k}={v}" for k, v in zip(shown, setting, strict=True)), 64) or "the job" for setting in ranked
    ]
    row_points = 0.72 * SIZE_INCHES[1] * 72 / max(len(ranked), 8)
    fontsize = max(7.0, min(11.0, 0.72 * row_points))
    left = min(0.55, 0.04 + max(map(len, labels)) * fontsize * 0.62 / (72 * SIZE_INCHES[0]))
    axes = figure.subplots(gridspec_kw={"left": left, "right": 0.885, "top": 0.85, "bottom": 0.11})
    clean_axes(axes, xlabel=_axis(metric), ylabel="")
    for label, colour, marker in (("val", BLUE, "o"), ("test", GREEN, "D")):
        for row, setting in enumerate(ranked):
            values = [score.val if label == "val" else score.test for score in groups[setting]]
            values = [value for value in values if math.isfinite(value)]
            if not values:
                continue
            small: dict[str, Any] = {"s": 30, "color": colour, "marker": marker, "alpha": 0.4, "linewidths": 0}
            if len(values) > 1:
                axes.scatter(values, [row] * len(values), zorder=3, **small)
            large: dict[str, Any] = {"s": 85, "color": colour, "marker": marker, "edgecolors": "white", "linewidths": 1}
            axes.scatter([statistics.fmean(values)], [row], zorder=4, label=label if row == 0 else None, **large)
    spare = max(8 - len(ranked), 0) / 2
    axes.set_ylim(len(ranked) - 0.4 + spare, -0.6 - spare)
    axes.set_yticks(range(len(ranked)), labels, parse_math=False, fontsize=fontsize)
    axes.spines["left"].set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11, borderaxespad=0, handletextpad=0.4
    )
    if len(groups) > len(ranked):
        note = f"the best {len(ranked)} of {len(groups)} settings"
        axes.text(1, 1.015, note, transform=axes.transAxes, ha="right", fontsize=10.5, color=FAINT)
