"""The picture of a sweep: a line for one varied key, a grid for two, a ranking for anything else."""

import math
from collections.abc import Sequence
from typing import Any

from finetune.report import look
from finetune.report.columns import axis_name
from finetune.report.jobs import JobGroup, Sweep, group_jobs, rank
from finetune.system.terminal import counted, printable

MAX_ROWS = 30  # of a ranking; more would be too small to read
# Split, colour and marker of each series of points.
SERIES = (("val", look.BLUE, "o"), ("test", look.GREEN, "D"))


def sweep_figure(sweep: Sweep) -> Any:
    """Returns the picture that suits the varied keys, as a matplotlib figure; seeds are points around their mean.

    At least one job must have a validation score. A failed job is absent, never 0.
    """
    keys = [key for key in sweep.varied if key != "seed"]
    groups, metric = sweep.groups, sweep.metric
    figure = look.new_figure()
    if len(keys) == 1 and len(groups) > 1:
        _draw_line(figure, groups, keys[0], metric)
    elif len(keys) == 2 and _is_grid(groups, keys):
        _draw_grid(figure, groups, keys, metric)
    else:
        shown = keys or sweep.varied
        _draw_ranking(figure, group_jobs(sweep.scored, shown), shown, metric)
    look.headline(figure, f"Sweep over {' and '.join(keys or sweep.varied) or 'one job'}"[:90], _subtitle(sweep, keys))
    return figure


def _subtitle(sweep: Sweep, keys: Sequence[str]) -> str:
    """The group with the best mean validation score in words, and how many jobs have no score."""
    metric, best = sweep.metric, _best(sweep.groups, sweep.metric)
    name = " ".join(f"{key}={best.value(key)}" for key in keys)
    text = f"best by validation: {name}   " if name else ""
    text += f"val{'' if metric == 'top1' else f'/{metric}'} {best.mean(f'val/{metric}'):.4f}"
    test, num_missing = best.mean(f"test/{metric}"), len(sweep.jobs) - len(sweep.scored)
    text += f"   test {test:.4f}" if math.isfinite(test) else ""
    text += f"   (mean of {len(best.jobs)} seeds)" if len(best.jobs) > 1 else ""
    return text + (f"   without a score: {num_missing} of {counted(len(sweep.jobs), 'job')}" if num_missing else "")


def _best(groups: Sequence[JobGroup], metric: str) -> JobGroup:
    return max(groups, key=lambda group: rank(group.mean(f"val/{metric}"), metric))


def levels(values: Sequence[str]) -> list[str]:
    """Distinct values: numbers by size, other words in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if all(map(is_number, distinct)) else distinct


def is_number(text: str) -> bool:
    """Whether `text` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def positions(values: Sequence[str]) -> tuple[list[float], str]:
    """Positions of `levels` on an axis, and its scale: `linear`, `log` where numbers span decades, or `even` steps."""
    numbers = [float(value) for value in values] if all(map(is_number, values)) else []
    positive = [value for value in numbers if value > 0]
    if numbers and (len(positive) < 2 or max(positive) / min(positive) < 20):
        return numbers, "linear"
    if numbers and len(positive) == len(numbers):
        return numbers, "log"
    return [float(i) for i in range(len(values))], "even"  # words; or 0 and decades, which neither scale shows


def _draw_line(figure: Any, groups: Sequence[JobGroup], key: str, metric: str) -> None:
    """Validation and test against one key: a dot for each seed, and a line through the means where it is a number."""
    axes = figure.subplots(gridspec_kw={"left": 0.085, "right": 0.885, "top": 0.85, "bottom": 0.13})
    look.clean_axes(axes)
    look.label_axes(axes, x=printable(key), y=axis_name(metric))
    names = levels([group.value(key) for group in groups])
    xs, scale = positions(names)
    x_of = dict(zip(names, xs, strict=True))
    groups = sorted(groups, key=lambda group: x_of[group.value(key)])
    style = {"linewidth": 2.2} if all(map(is_number, names)) else {"linestyle": "", "markersize": 11}
    for split, colour, marker in SERIES:
        found = [(x_of[group.value(key)], group.scores(f"{split}/{metric}")) for group in groups]
        points = [(x, score) for x, scores in found for score in scores]
        if not points:
            continue
        axes.scatter(*zip(*points, strict=True), s=42, color=colour, marker=marker, alpha=0.45, linewidths=0, zorder=3)
        means = [(x, sum(scores) / len(scores)) for x, scores in found if scores]
        mean_style = {"color": colour, "marker": marker, "markeredgecolor": "white", "label": split, "zorder": 4}
        axes.plot(*zip(*means, strict=True), **mean_style, **style)
    best = _best(groups, metric)
    ring = {"s": 230, "facecolors": "none", "edgecolors": look.INK, "linewidths": 1.6}
    axes.scatter([x_of[best.value(key)]], [best.mean(f"val/{metric}")], zorder=5, label="best val", **ring)
    if scale == "log":
        axes.set_xscale("log")
        axes.minorticks_off()
    if scale == "even" or len(names) <= 14:  # a tick at each value that a job has, and none between
        _label_ticks(axes, xs, names, length=24, max_letters=100)
    if scale == "even":
        axes.set_xlim(-0.5, len(names) - 0.5)
    look.side_legend(axes)


def _label_ticks(axes: Any, xs: Sequence[float], names: Sequence[str], *, length: int, max_letters: int) -> None:
    """Names below the x axis, shortened to `length`, and turned where they have more than `max_letters` together."""
    turned = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > max_letters else {}
    axes.set_xticks(xs, [look.shortened(name, length) for name in names], parse_math=False, **turned)


def _is_grid(groups: Sequence[JobGroup], keys: Sequence[str]) -> bool:
    """Whether both keys have several values, and at least half of the combinations of values have a score."""
    columns, rows = ({group.value(key) for group in groups} for key in keys)
    return min(len(rows), len(columns)) > 1 and len(groups) >= 0.5 * len(rows) * len(columns)


def _draw_grid(figure: Any, groups: Sequence[JobGroup], keys: Sequence[str], metric: str) -> None:
    """Two heat maps of means over seeds, validation and test; both frame the best cell by validation."""
    both = figure.subplots(1, 2, gridspec_kw={"left": 0.1, "right": 0.98, "top": 0.8, "bottom": 0.14, "wspace": 0.12})
    columns, rows = (levels([group.value(key) for group in groups]) for key in keys)
    at = {(group.value(keys[0]), group.value(keys[1])): group for group in groups}
    best = _best(groups, metric)
    frame = columns.index(best.value(keys[0])), rows.index(best.value(keys[1]))
    for axes, split in zip(both, ("val", "test"), strict=True):
        name = f"{split}/{metric}"
        cells = [[at[x, y].mean(name) if (x, y) in at else math.nan for x in columns] for y in rows]
        _draw_map(axes, cells, frame=frame, bright_is_low=rank(1.0, metric) < 0)
        axes.set_title(name, fontsize=12, color=look.INK, loc="left", pad=8)
        look.label_axes(axes, x=printable(keys[0]))
        _label_ticks(axes, range(len(columns)), columns, length=16, max_letters=45)
        axes.set_yticks(range(len(rows)), [look.shortened(row, 16) for row in rows], parse_math=False)
    both[1].tick_params(labelleft=False)
    look.label_axes(both[0], y=printable(keys[1]))


def _draw_map(axes: Any, cells: Sequence[Sequence[float]], *, frame: tuple[int, int], bright_is_low: bool) -> None:
    """A heat map with its numbers, the brighter the better; a cell without a score is hatched."""
    from matplotlib.patches import Rectangle

    found = [value for row in cells for value in row if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    colours = "cividis_r" if bright_is_low else "cividis"
    axes.imshow(cells, cmap=colours, vmin=low, vmax=max(high, low + 1e-6), aspect="auto", origin="lower")
    texts = [[f"{value:.3f}" if math.isfinite(value) else "" for value in row] for row in cells]
    is_dark = [[(value < (low + high) / 2) != bright_is_low for value in row] for row in cells]
    look.write_cells(axes, texts, is_dark, fontsize=max(6.0, min(12.0, 88.0 / max(len(cells), len(cells[0])))))
    for x, y in [(x, y) for y, row in enumerate(cells) for x, value in enumerate(row) if not math.isfinite(value)]:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f4f5f7", edgecolor="#cfd3da", hatch="///"))
    x, y = frame
    axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor=look.ORANGE, linewidth=3))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=look.INK, labelsize=11, length=0, pad=6)


def _draw_ranking(figure: Any, groups: Sequence[JobGroup], keys: Sequence[str], metric: str) -> None:
    """Groups by mean validation score, best on top: a small dot for each seed, a large one for the mean."""
    ranked = sorted(groups, key=lambda group: rank(group.mean(f"val/{metric}"), metric), reverse=True)[:MAX_ROWS]
    # The last part of a key is enough to tell keys apart, unless two end alike.
    ends = [key.rpartition(".")[2] for key in keys]
    shown = dict(zip(keys, ends if len(set(ends)) == len(ends) else keys, strict=True))
    named = ["  ".join(f"{name}={group.value(key)}" for key, name in shown.items()) for group in ranked]
    labels = [look.shortened(text, 64) or "the job" for text in named]
    row_points = 0.72 * look.SIZE_INCHES[1] * 72 / max(len(ranked), 8)
    fontsize = max(7.0, min(11.0, 0.72 * row_points))
    left = min(0.55, 0.04 + max(map(len, labels)) * fontsize * 0.62 / (72 * look.SIZE_INCHES[0]))
    axes = figure.subplots(gridspec_kw={"left": left, "right": 0.885, "top": 0.85, "bottom": 0.11})
    look.clean_axes(axes)
    look.label_axes(axes, x=axis_name(metric))
    for split, colour, marker in SERIES:
        scores = [group.scores(f"{split}/{metric}") for group in ranked]
        points = [(score, row) for row, values in enumerate(scores) for score in values if len(values) > 1]
        means = [(sum(values) / len(values), row) for row, values in enumerate(scores) if values]
        small = {"s": 30, "alpha": 0.4, "linewidths": 0, "zorder": 3}
        large = {"s": 85, "edgecolors": "white", "linewidths": 1, "zorder": 4, "label": split}
        for dots, style in ((points, small), (means, large)):
            if dots:
                axes.scatter(*zip(*dots, strict=True), color=colour, marker=marker, **style)
    spare = max(8 - len(ranked), 0) / 2
    axes.set_ylim(len(ranked) - 0.4 + spare, -0.6 - spare)
    axes.set_yticks(range(len(ranked)), labels, parse_math=False, fontsize=fontsize)
    axes.spines["left"].set_visible(False)
    look.side_legend(axes)
    if len(groups) > len(ranked):
        note = f"the best {len(ranked)} of {len(groups)} settings"
        axes.text(1, 1.015, note, transform=axes.transAxes, ha="right", fontsize=10.5, color=look.FAINT)
