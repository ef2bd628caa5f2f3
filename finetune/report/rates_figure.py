"""`lr.png`: the rate of every layer over the run, as planned and as the optimizer had it in each epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from finetune.report import look
from finetune.report.columns import layer_of
from finetune.report.reading import number
from finetune.system.errors import UserError
from finetune.system.terminal import counted


@dataclass(frozen=True)
class RateLine:
    """Neighbouring layers with the same rate, drawn as one line."""

    label: str  # `block.3`, `readout + head`, `stem ... block.4`
    planned: list[float]  # a rate for each x of `rates.json`
    measured: list[tuple[float, float]]  # (finished epochs, the optimizer's rate) at the start of each epoch
    is_frozen: bool

    @property
    def peak(self) -> float:
        """Highest planned rate; 0 for frozen layers."""
        return max((rate for rate in self.planned if math.isfinite(rate)), default=0.0)


def rates_figure(plan: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Any:
    """Returns the rates as a matplotlib figure: at the left each layer's curve, at the right each layer's peak.

    `plan` is `rates.json`: `interval` (of the scheduler), `x` (epochs), `layers` (name to rates, from the stem up),
    `frozen` (names); `before` (`epochs`, `x`, `layers`) is the earlier plan of a run that was made longer. `rows` are
    those of `history.jsonl`. A UserError where lists of `plan` differ in length.
    """
    lines, x = rate_lines(plan, rows)
    learning = [line for line in lines if not line.is_frozen]
    figure = look.new_figure()
    place = {"left": 0.085, "right": 0.985, "top": 0.82, "bottom": 0.11, "wspace": 0.28}
    curves, ladder = figure.subplots(1, 2, width_ratios=(2.5, 1), gridspec_kw=place)
    is_stepwise = plan["interval"] == "epoch"  # then the rate stays the same for a whole epoch
    _draw_curves(curves, lines, x, is_stepwise=is_stepwise)
    if "before" in plan:
        _draw_before(curves, plan["before"], is_stepwise=is_stepwise)
    _draw_ladder(ladder, lines)
    look.headline(figure, "Learning rate of every layer", _rates_subtitle(learning, x))
    return figure


def rate_lines(plan: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[list[RateLine], list[float]]:
    """Returns lines from the stem up, for layers or merged neighbours, and the x of planned rates, in epochs."""
    x = [number(value) for value in plan["x"]]
    planned = {name: [number(rate) for rate in rates] for name, rates in plan["layers"].items()}
    frozen = set(plan["frozen"])
    for name, rates in planned.items():
        if len(rates) != len(x):
            raise UserError(f"rates.json is damaged: layer {name} has {len(rates)} rates for {len(x)} values of x")
    measured: dict[str, dict[float, float]] = {}
    for row in rows:
        for group, rate in row["lr"].items():
            measured.setdefault(layer_of(group), {})[number(row["epoch"]) - 1] = number(rate)

    # `layers` may lack frozen layers, since they have no rates.
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
    return names[0] if len(names) == 1 else f"{names[0]} {'+' if len(names) == 2 else '...'} {names[-1]}"


def _is_same(one: RateLine, other: RateLine) -> bool:
    """Whether two layers share a line: both frozen, or equal in their planned and measured rates."""
    if one.is_frozen or other.is_frozen:
        return one.is_frozen and other.is_frozen
    mine, others = ([*line.planned, *(value for point in line.measured for value in point)] for line in (one, other))
    return len(mine) == len(others) and all(
        math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b)) for a, b in zip(mine, others, strict=True)
    )


def _rates_subtitle(learning: Sequence[RateLine], x: Sequence[float]) -> str:
    """The highest peak in words, and the factor from layer to layer where all have the same."""
    peaks = [line.peak for line in learning]
    if not peaks or peaks[-1] == 0:
        return "nothing learns"
    text = f"peak {look.short(peaks[-1])} at {learning[-1].label}"
    ratios = [low / high for low, high in pairwise(peaks) if high > 0]
    if ratios and all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
        text += f"; each layer further from the output at {ratios[0]:.4g} of the one above"
        text += f"; {look.short(peaks[0])} at {learning[0].label}"
    return text


def turning_points(rates: Sequence[float]) -> tuple[int, list[int]]:
    """Returns the index at which a curve's warmup ends (0: it has none), and the indices at which its cycles end.

    A cycle ends at the lowest point before a rise, at a restart's jump, or where the curve reaches its floor for good.
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
            # A restart jumps straight to the top, so the next cycle begins at i + 1; a mirrored cycle turns at i.
            ends.append(i + 1 if rises and rates[i + 1] >= rates[top] > rates[i - 1] else i)
    return warmup_end, ends


def _draw_curves(axes: Any, lines: Sequence[RateLine], x: Sequence[float], *, is_stepwise: bool) -> None:
    """Draw planned rates as lines and measured ones as dots; shade the warmup and mark the ends of cycles."""
    from matplotlib.lines import Line2D

    look.clean_axes(axes)
    look.label_axes(axes, x="epoch", y="learning rate")
    learning = [line for line in lines if not line.is_frozen]
    top = max((rate for line in learning for rate in (line.peak, *(y for _, y in line.measured))), default=0) or 1.0
    end = (x[-1] + 1 if is_stepwise else x[-1]) if x else 1.0
    if learning and x:
        _mark_phases(axes, learning[-1].planned, x, top)
    for line in lines:
        if line.is_frozen:
            axes.plot([0, end], [0, 0], color=look.FAINT, linewidth=2.2, label=line.label, zorder=2)
    width = 2.2 if len(learning) <= 16 else 1.2
    for line, colour in zip(learning, look.ramp(len(learning)), strict=True):
        style = {"color": colour, "linewidth": width, "label": line.label, "zorder": 3}
        _plot_plan(axes, x, line.planned, is_stepwise=is_stepwise, **style)
        num_dots = len(learning) * len(line.measured)
        size = 36 if num_dots <= 250 else 20 if num_dots <= 700 else 8
        points = {"s": size, "color": [colour], "edgecolors": "white", "linewidths": 0.8 if size > 8 else 0.3}
        axes.scatter([x for x, _ in line.measured], [y for _, y in line.measured], zorder=4, clip_on=False, **points)
    axes.set_ylim(-0.015 * top, 1.06 * top)
    axes.set_xlim(0, end if end > 0 else 1)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.set_major_formatter(lambda value, _: look.short(round(value, 12)))
    marks = [Line2D([], [], color=look.INK, linewidth=2.2, label="planned")]
    if any(line.measured for line in learning):
        dot: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        marks.append(Line2D([], [], color=look.INK, label="the optimizer's rate at the start of each epoch", **dot))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=marks, ncols=2, frameon=False, fontsize=10.5, **place)


def _draw_before(axes: Any, before: dict[str, Any], *, is_stepwise: bool) -> None:
    """Draw the head's earlier plan, from before the run was made longer, as a dashed line."""
    rates = [number(rate) for rate in [[], *before["layers"].values()][-1]]
    x = [number(value) for value in before["x"]]
    if not rates or len(rates) != len(x):
        raise UserError("rates.json is damaged: `before` needs a rate for every x")
    style = {"color": look.INK, "linewidth": 1.4, "linestyle": (0, (4, 3)), "zorder": 2}
    _plot_plan(axes, x, rates, is_stepwise=is_stepwise, **style)
    place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right", "fontsize": 10, "color": look.INK}
    axes.annotate(f" as planned for {counted(before['epochs'], 'epoch')}", (x[-1] + is_stepwise, rates[-1]), **place)


def _plot_plan(axes: Any, x: Sequence[float], rates: Sequence[float], *, is_stepwise: bool, **style: Any) -> None:
    """Plot planned rates: as a staircase where the scheduler steps once an epoch, else as a curve."""
    if is_stepwise and x:
        x, rates, style["drawstyle"] = [*x, x[-1] + 1], [*rates, rates[-1]], "steps-post"
    axes.plot(x, rates, **style)


def _mark_phases(axes: Any, rates: Sequence[float], x: Sequence[float], top: float) -> None:
    warmup_end, ends = turning_points(rates)
    note = {"fontsize": 10.5, "color": "#555b66", "va": "top"}
    if warmup_end:
        axes.axvspan(x[0], x[warmup_end], color="#f1f3f6", zorder=0, linewidth=0)
        axes.text(x[0], 1.05 * top, " warmup", ha="left", **note)
    for index in ends[:12]:
        axes.axvline(x[index], color=look.FAINT, linewidth=1.2, linestyle=(0, (2, 3)), zorder=1)
        axes.text(x[index], 1.05 * top, " end of cycle", ha="left", **note)


def _draw_ladder(axes: Any, lines: Sequence[RateLine]) -> None:
    """Draw each layer's peak rate as a bar with the layer's name, head on top; the colours are those of the curves."""
    learning = [line for line in lines if not line.is_frozen]
    top = max((line.peak for line in learning), default=0) or 1.0
    colours = iter(look.ramp(len(learning)))
    row_points = 0.73 * look.SIZE_INCHES[1] * 72 / max(len(lines), 7)
    fontsize = max(6.5, min(11.0, 0.72 * row_points))
    every = math.ceil(1.15 * fontsize / row_points)  # many layers: only every second (third, ...) gets its name
    for row, line in enumerate(lines):
        axes.barh(row, line.peak, height=0.62, color=look.FAINT if line.is_frozen else next(colours), zorder=3)
        if (len(lines) - 1 - row) % every == 0 or line.is_frozen:
            text = "frozen: rate 0" if line.is_frozen else look.short(line.peak)
            style = {"fontsize": fontsize, "color": look.FAINT if line.is_frozen else look.INK, "va": "center"}
            axes.text(line.peak + 0.02 * top, row, text, **style)
            axes.text(-0.03 * top, row, line.label, ha="right", **style)
    axes.set_xlim(0, 1.28 * top)
    # With few layers the bars would be very thick, so there is room for at least seven.
    spare = max(7 - len(lines), 0) / 2
    axes.set_ylim(-0.6 - spare, len(lines) - 0.4 + spare)
    axes.set_axis_off()
    axes.set_title("peak rate by layer", fontsize=12, color=look.INK, loc="left", pad=9)
