"""How pictures of runs and sweeps look and read their numbers; no torch, and matplotlib only when one is drawn."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.system.errors import UserError
from finetune.system.files import write_atomic

SIZE_INCHES = (12.0, 7.0)
DPI = 100

# Ink, and four colours that stay apart in every common kind of colour blindness (Okabe and Ito).
INK = "#222222"
FAINT = "#8a8f98"
GRID = "#e6e8ec"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#a05195"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is this the folder of a run?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return data


def number(value: object) -> float:
    """`value` as a float; NaN for what is no number, as NaN itself is stored as null."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def new_figure(height: float = SIZE_INCHES[1]) -> Any:
    """An empty white figure that draws without a display; 1200 pixels wide, `height` in inches of 100 pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(SIZE_INCHES[0], height), dpi=DPI, facecolor="white")


def clean_axes(axes: Any, *, xlabel: str, ylabel: str) -> None:
    """A quiet frame: two spines, a faint grid behind the data, named axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=11, length=0, pad=6)
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_formatter().set_useOffset(False)  # 0.9812, not 0.0012 with +0.98 in a corner
    axes.set_xlabel(xlabel, fontsize=12, color=INK, labelpad=8)
    axes.set_ylabel(ylabel, fontsize=12, color=INK, labelpad=8)


def headline(figure: Any, title: str, subtitle: str) -> None:
    """What the picture shows, and under it what it says, at the top left; both fit text from anywhere."""
    height = figure.get_figheight()
    top = {"ha": "left", "va": "top", "parse_math": False}  # a `$` in a name is no formula
    figure.text(0.035, 1 - 0.22 / height, title, fontsize=17, color=INK, weight="bold", **top)
    figure.text(0.035, 1 - 0.62 / height, subtitle, fontsize=11.5, color="#555b66", **top)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all.

    Raises:
        OSError: It could not be written; an earlier picture is untouched.
    """
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; no reason to write on the console of a training run.
        warnings.filterwarnings("ignore", message="Glyph")
        write_atomic(path, lambda beside: figure.savefig(beside, format="png"))


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions of labels, moved as little as it takes to be `gap` apart, in their own order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # Least squares by pooling: labels that would overlap move as one block around their common middle.
    blocks: list[list[float]] = []  # [sum of wishes for the block's bottom, count]
    for rank, index in enumerate(order):
        blocks.append([positions[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            wishes, count = blocks.pop()
            blocks[-1][0] += wishes
            blocks[-1][1] += count
    bottoms = [wishes / count for wishes, count in blocks for _ in range(int(count))]
    placed = [0.0] * len(positions)
    for rank, index in enumerate(order):
        placed[index] = bottoms[rank] + rank * gap
    return placed


def short(rate: float) -> str:
    """A rate in three digits as people write it: 1e-3, 5.62e-4, 0."""
    if rate == 0 or not math.isfinite(rate):
        return "0" if rate == 0 else "not finite"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def ramp(count: int) -> list[Any]:
    """From the stem up, dark to bright: lightness alone keeps the order, also in print."""
    from matplotlib import colormaps

    shades = colormaps["plasma"]
    return [shades(0.06 + 0.76 * (i / (count - 1) if count > 1 else 1)) for i in range(count)]
