"""The look that all pictures of runs and sweeps share: size, colours, axes, headlines, and how a file is written."""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.system.files import write_atomic
from finetune.system.terminal import command, printable

logger = logging.getLogger("finetune")

SIZE_INCHES = (12.0, 7.0)
# What drawing raises without a fault of ours: the disk, matplotlib's own files, fonts and words in the environment, and
# the numbers in a file that somebody has changed meanwhile (a UserError).
UNDRAWN = (OSError, ImportError, RuntimeError, ValueError, MemoryError)

# Colours of text and frames; then five that people with any common colour blindness can tell apart (Okabe and Ito).
INK = "#222222"
FAINT = "#8a8f98"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#a05195", "#56b4e9"


def new_figure(height: float = SIZE_INCHES[1]) -> Any:
    """An empty white figure, 12 inches wide and `height` inches high, of 100 pixels an inch; it needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(SIZE_INCHES[0], height), dpi=100, facecolor="white")


def clean_axes(axes: Any) -> None:
    """Leave two spines of axes, and draw a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=11, length=0, pad=6)
    axes.grid(color="#e6e8ec", linewidth=1)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_formatter().set_useOffset(False)  # 0.9812, not 0.0012 with +0.98 in a corner


def label_axes(axes: Any, *, x: str = "", y: str = "") -> None:
    """Name the axes; an empty name leaves an axis as it is."""
    for text, name in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        if text:
            name(text, fontsize=12, color=INK, labelpad=8, parse_math=False)


def side_legend(axes: Any) -> None:
    """A legend without a frame at the right of the axes."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=11, handletextpad=0.4, **place)


def write_cells(axes: Any, texts: Sequence[Sequence[str]], dark: Sequence[Sequence[bool]], *, fontsize: float) -> None:
    """Write a text into each cell of a heat map, white where the cell is dark; an empty text draws nothing."""
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if text:
                colour = "white" if dark[y][x] else INK
                axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, color=colour)


def headline(figure: Any, title: str, subtitle: str) -> None:
    """Write a title and a line under it at the top left; both may hold any text, also a class or file name."""
    height = figure.get_figheight()
    top = {"ha": "left", "va": "top", "parse_math": False}  # a `$` in a name is no formula
    figure.text(0.035, 1 - 0.22 / height, title, fontsize=17, color=INK, weight="bold", **top)
    figure.text(0.035, 1 - 0.62 / height, subtitle, fontsize=11.5, color="#555b66", **top)


@contextlib.contextmanager
def dispensable(path: Path, tell: Callable[[str], object] = logger.warning) -> Iterator[None]:
    """Within it the picture `path` is drawn: where that fails, one line tells so, and its run or sweep goes on.

    The numbers that it shows lie in other files, so `finetune report` can draw it later.
    """
    try:
        yield
    except UNDRAWN as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        how = f"finetune report {command([str(path.parent)])} draws it again"
        tell(f"the picture {path.name} is missing: {reason}. No result is lost; {how}")
        logger.debug("%s could not be drawn", path, exc_info=error)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG whole or not at all; after an OSError, an earlier picture is untouched."""
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box, which is no reason to warn on the console of a training run.
        warnings.filterwarnings("ignore", message="Glyph")
        write_atomic(path, lambda beside: figure.savefig(beside, format="png"))


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions of labels, moved as little as possible so that they are `gap` apart; their order stays."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # Least squares by pooling: labels that would overlap move as one block around their common middle. A block is the
    # sum of the positions that its labels want for its bottom, and their number.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([positions[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            wanted, count = blocks.pop()
            blocks[-1][0] += wanted
            blocks[-1][1] += count
    bottoms = [wanted / count for wanted, count in blocks for _ in range(int(count))]
    placed = [0.0] * len(positions)
    for rank, index in enumerate(order):
        placed[index] = bottoms[rank] + rank * gap
    return placed


def shortened(text: str, length: int) -> str:
    """`text` on one line, cut to `length` letters."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def short(rate: float) -> str:
    """A rate in three digits: 1e-3, 5.62e-4, 0."""
    if rate == 0 or not math.isfinite(rate):
        return "0" if rate == 0 else "not finite"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def ramp(count: int) -> list[Any]:
    """Colours for layers from the stem up, dark to bright, so that lightness alone shows the order."""
    from matplotlib import colormaps

    return [colormaps["plasma"](0.06 + 0.76 * (i / (count - 1) if count > 1 else 1)) for i in range(count)]
