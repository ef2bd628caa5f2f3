"""The scores of each class: writes `metrics.json`, `confusion.csv`, `confusion_val.csv` and `confusion.png`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.report import look
from finetune.system.files import write_json, write_text
from finetune.system.reading import MAX_BYTES, DamagedError, UnfitError, read_file, read_json
from finetune.system.tables import csv_text

# With more classes the cells of a matrix are too small to read: the pairs most often confused are drawn instead.
MATRIX_CLASSES, PAIRS = 40, 25
NAME_CHARS = 22  # of a class in a picture


def write_scores(
    run_dir: Path, split: str, scores: Mapping[str, float], *, details: Mapping[str, Any], classes: Sequence[str]
) -> None:
    """Write a split's scores into `metrics.json` and its confusion matrix into a CSV file; draw the matrix of the test.

    `split` is `val` (the best epoch) or `test`, whose scores come after those of `val`. `details` come from
    `finetune.core.metrics.Meter.details`.
    """
    path = run_dir / "metrics.json"
    known = _read_metrics(path) if split == "test" and path.exists() else {}
    extra = {name: value for name, value in details.items() if name not in ("classes", "confusion")}
    of_class = dict(zip(classes, details["classes"], strict=True))
    val = {name: value for name, value in known.items() if name == "val"}
    write_json(path, {**val, split: {**scores, **extra, "classes": of_class}})
    matrix = details.get("confusion")
    if matrix is None:
        return
    rows = [["true \\ predicted", *classes], *([name, *row] for name, row in zip(classes, matrix, strict=True))]
    write_text(run_dir / ("confusion.csv" if split == "test" else f"confusion_{split}.csv"), csv_text(rows))
    if split == "test":
        with look.dispensable(run_dir / "confusion.png"):
            draw_confusion(run_dir / "confusion.png", matrix, classes)


def plot_confusion(run_dir: Path) -> None:
    """Draw `confusion.png` again, from the numbers in `confusion.csv` and the names of classes in `metrics.json`.

    Raises:
        DamagedError: A file is not what a run wrote.
    """
    path, mend = run_dir / "confusion.csv", "put it back from a copy"
    try:
        # Not `splitlines`: it would also cut the names of classes, at U+2028 and other letters.
        rows = list(csv.reader(io.StringIO(read_file(path, limit=MAX_BYTES).decode(), newline="")))
        matrix = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    except (UnfitError, ValueError, csv.Error) as error:
        raise DamagedError.because(path, str(error), mend) from None
    classes = list(_read_metrics(run_dir / "metrics.json").get("test", {}).get("classes", {}))
    if {len(matrix), *map(len, matrix)} != {len(classes)}:
        raise DamagedError.because(path, f"expected {len(classes)} rows and columns, as metrics.json has classes", mend)
    draw_confusion(run_dir / "confusion.png", matrix, classes)


def _read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    return read_json(path, dict[str, dict[str, Any]], mend="put it back from a copy, or start a new run")


def draw_confusion(path: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Draw the confusion matrix of the test images, or with many classes the pairs that are most often confused."""
    right = sum(row[label] for label, row in enumerate(matrix))
    if len(classes) <= MATRIX_CLASSES:
        figure, shown = _draw_matrix(matrix, classes), "rows are true classes, columns are predicted ones"
    else:
        figure, shown = _draw_pairs(matrix, classes), "the pairs of classes most often confused"
    look.headline(figure, "Confusion", f"{right:,} of {sum(map(sum, matrix)):,} test images right; {shown}")
    look.save_figure(figure, path)


def _draw_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    count = len(classes)
    names = [look.shortened(name, NAME_CHARS) for name in classes]
    upright = max(map(len, names)) <= 3
    side = min(8.8, 2.5 + 0.4 * count)  # inches; the figure is 12 wide and the names need up to 2.2
    height = 1.2 + side + (0.9 if upright else 2.4)
    figure = look.new_figure(height=height)
    left = max(2.4, 6 - side / 2)
    axes = figure.add_axes((left / 12, (height - 1.2 - side) / height, side / 12, side / height))
    shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
    # The square root makes rare confusions visible; without it, one in a hundred would be white.
    axes.imshow([[share**0.5 for share in row] for row in shares], cmap="Blues", vmin=0, vmax=1, aspect="equal")
    size = 9 if count > 25 else 11
    axes.set_xticks(range(count), names, rotation=0 if upright else 90, fontsize=size, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axes.tick_params(colors=look.INK, length=0, pad=6)
    axes.spines[:].set_color(look.FAINT)
    look.label_axes(axes, x="predicted", y="true")
    texts = [[f"{value}" if value else "" for value in row] for row in matrix]
    is_dark = [[share**0.5 > 0.55 for share in row] for row in shares]
    look.write_cells(axes, texts, is_dark, fontsize=size - 2 if max(map(max, matrix)) > 999 or count > 25 else size)
    return figure


def _draw_pairs(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    pairs = [(value, y, x) for y, row in enumerate(matrix) for x, value in enumerate(row) if value and x != y]
    pairs.sort(key=lambda pair: (-pair[0] / sum(matrix[pair[1]]), -pair[0], pair[1], pair[2]))
    shown = pairs[:PAIRS][::-1]
    height = 2.4 + 0.3 * max(1, len(shown))
    figure = look.new_figure(height=height)
    axes = figure.add_axes((0.36, 0.8 / height, 0.56, 1 - 2.0 / height))
    shares = [value / sum(matrix[y]) for value, y, _ in shown]
    axes.barh(range(len(shown)), shares, color=look.BLUE, height=0.7)
    look.clean_axes(axes)
    look.label_axes(axes, x="share of the true class's test images")
    axes.grid(visible=False, axis="y")
    names = [look.shortened(name, NAME_CHARS) for name in classes]
    axes.set_yticks(range(len(shown)), [f"{names[y]} taken for {names[x]}" for _, y, x in shown], parse_math=False)
    for place, (share, (value, _, _)) in enumerate(zip(shares, shown, strict=True)):
        axes.text(share, place, f"  {value}", va="center", fontsize=10, color=look.INK)
    axes.set_xlim(0, max([*shares, 0.01]) * 1.12)
    axes.set_ylim(-0.6, max(1, len(shown)) - 0.4)
    if not shown:
        axes.text(0.0005, 0, "no two classes were confused", va="center", fontsize=12, color=look.INK)
    return figure
