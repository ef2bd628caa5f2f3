"""Laws of the pictures: every layer's rate is in lr.png, a gap is shown, any run that left files can be drawn."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.report.look import short, spread
from finetune.report.rates_figure import rate_lines, rates_figure, turning_points
from finetune.report.run_figures import curves_figure, plot_curves, plot_rates
from finetune.system import files
from finetune.system.ours import FolderKind, claim


def plan_of(num_blocks: int, epochs: int, *, frozen: int = 0, decay: float = 0.75, warmup: int = 0) -> dict[str, Any]:
    """`rates.json` of a linear schedule, one x an epoch."""
    names = ["stem", *(f"block.{i}" for i in range(1, num_blocks + 1)), "readout", "head"]
    scales = [decay ** (num_blocks + 1 - min(i, num_blocks + 1)) for i in range(num_blocks + 3)]
    factors = [(t + 1) / (warmup + 1) if t < warmup else 1 - (t - warmup) / (epochs - warmup) for t in range(epochs)]
    layers = {n: [1e-3 * s * f for f in factors] for n, s in list(zip(names, scales, strict=True))[frozen:]}
    return {"unit": "epoch", "interval": "epoch", "x": list(range(epochs)), "layers": layers, "frozen": names[:frozen]}


def rows_of(plan: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """History rows of a run that did what `plan` says."""
    return [
        {
            "epoch": i + 1,
            "train/loss": 1 / (i + 1),
            "train/top1": 1 - 0.3 / (i + 1),
            "val/loss": 1.1 / (i + 1),
            "val/top1": 1 - 0.2 / (i + 1),
            "lr": {
                f"{name}.{kind}": rates[i] for name, rates in plan["layers"].items() for kind in ("decay", "no_decay")
            },
            "images_per_s": 1000.0,
            "seconds": 1.0,
        }
        | changes
        for i in range(len(plan["x"]))
    ]


def write_run(folder: Path, plan: dict[str, Any], rows: list[dict[str, Any]], result: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rates.json").write_text(json.dumps(plan))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def lines_by_name(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


# --- lr.png ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "epochs", "frozen"), [(1, 1, 0), (6, 15, 0), (12, 4, 5), (40, 3, 0), (3, 5, 4)])
def test_every_layer_has_its_line_its_dots_and_its_name(num_blocks: int, epochs: int, frozen: int) -> None:
    plan = plan_of(num_blocks, epochs, frozen=frozen)
    figure = rates_figure(plan, rows_of(plan))
    curves, ladder = figure.axes
    lines = lines_by_name(curves)
    for name, rates in plan["layers"].items():
        label = "readout + head" if name in ("readout", "head") else name
        assert list(lines[label].get_ydata())[: len(rates)] == rates
        assert list(lines[label].get_xdata())[: len(rates)] == plan["x"]
    names = {text.get_text() for text in ladder.texts}
    assert {"readout + head", *(name for name in plan["layers"] if name not in ("readout", "head"))} <= names
    colours = [line.get_color() for line in lines.values() if line.get_label() not in ("", "stem ... block.4")]
    assert len(set(map(str, colours))) >= len(plan["layers"]) - 1, "each rate its own colour"
    dots = [tuple(p) for collection in curves.collections for p in collection.get_offsets().tolist()]
    expected = {(float(e), rates[e]) for rates in plan["layers"].values() for e in range(epochs)}
    assert expected <= {(x, y) for x, y in dots}
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("epoch", "learning rate")


def test_frozen_layers_are_named_as_frozen_and_lie_at_zero() -> None:
    figure = rates_figure(plan_of(6, 4, frozen=3), [])
    curves, ladder = figure.axes
    assert set(lines_by_name(curves)["stem ... block.2"].get_ydata()) == {0}
    texts = [text.get_text() for text in ladder.texts]
    assert texts.count("frozen: rate 0") == 1 and "stem ... block.2" in texts


def test_a_measured_rate_that_strays_from_the_plan_is_drawn_where_it_was() -> None:
    plan = plan_of(2, 3)
    rows = rows_of(plan)
    rows[1]["lr"]["readout.decay"] = rows[1]["lr"]["readout.no_decay"] = 5e-3
    figure = rates_figure(plan, rows)
    assert {"readout", "head"} <= set(lines_by_name(figure.axes[0])), "they no longer share a line"
    dots = [p for collection in figure.axes[0].collections for p in collection.get_offsets().tolist()]
    assert [1.0, 5e-3] in dots
    assert figure.axes[0].get_ylim()[1] > 5e-3


def test_layers_of_one_rate_share_one_line() -> None:
    lines, _ = rate_lines(plan_of(12, 3, decay=1.0), [])
    assert [line.label for line in lines] == ["stem ... head"]


LINEAR = [1 - t / 10 for t in range(11)]


@pytest.mark.parametrize(
    ("rates", "warmup_end", "ends"),
    [
        (LINEAR, 0, []),
        ([0.25, 0.5, 0.75, *LINEAR], 3, []),
        (LINEAR + LINEAR[-2::-1] + LINEAR[1:], 0, [10]),  # mirror: down, up, down
        (LINEAR[:-1] * 3, 0, [10, 20]),  # restart
        ([*LINEAR, 0.0, 0.0], 0, [10]),  # hold
        ([1.0], 0, []),
        ([], 0, []),
        ([0.5] * 4, 0, []),
    ],
)
def test_turning_points(rates: list[float], warmup_end: int, ends: list[int]) -> None:
    assert turning_points(rates) == (warmup_end, ends)


def test_warmup_and_the_end_of_a_cycle_are_marked() -> None:
    plan = plan_of(2, 6, warmup=2)
    plan["x"] = list(range(8))
    plan["layers"] = {name: [*rates, 0.0, 0.0] for name, rates in plan["layers"].items()}
    texts = [text.get_text().strip() for text in rates_figure(plan, []).axes[0].texts]
    assert texts == ["warmup", "end of cycle"]


# --- curves.png ------------------------------------------------------------------------------------------------------


def test_curves_hold_the_history_zero_shot_best_and_test() -> None:
    plan = plan_of(2, 5)
    rows = rows_of(plan)
    result = {"status": "finished", "zeroshot/top1": 0.7, "best_epoch": 4, "test/top1": 0.93}
    loss, accuracy = curves_figure(rows, result).axes
    for axes, metric in ((loss, "loss"), (accuracy, "top1")):
        lines = lines_by_name(axes)
        assert list(lines["train"].get_ydata()) == [row[f"train/{metric}"] for row in rows]
        assert list(lines["val"].get_ydata()) == [row[f"val/{metric}"] for row in rows]
        assert list(lines["val"].get_xdata()) == [1, 2, 3, 4, 5]
    assert any(set(line.get_ydata()) == {0.7} for line in accuracy.get_lines())
    dots = [p for collection in accuracy.collections for p in collection.get_offsets().tolist()]
    assert [4.0, rows[3]["val/top1"]] in dots and [5.0, 0.93] in dots
    texts = [text.get_text() for text in accuracy.texts]
    assert {"zero-shot 0.700", "test 0.930", "val 0.960", "best, epoch 4"} <= set(texts)


def texts_of(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.texts}


def points_of(axes: Any) -> list[list[float]]:
    return [point for collection in axes.collections for point in collection.get_offsets().tolist()]


def test_averaged_weights_have_a_curve_and_the_best_score_is_of_what_was_kept() -> None:
    rows = rows_of(plan_of(2, 4))
    for row, score in zip(rows, [0.2, 0.8, 0.7, 0.7], strict=True):
        row |= {"val/top1": 0.5, "val_ema/top1": score, "val_ema/loss": 1 - score}
    for result in ({"best_epoch": 2, "best_weights": "ema"}, {}):
        figure = curves_figure(rows, {"status": "finished", **result})
        loss, accuracy = figure.axes
        assert list(lines_by_name(accuracy)["val_ema"].get_ydata()) == [0.2, 0.8, 0.7, 0.7]
        assert list(lines_by_name(loss)["val_ema"].get_ydata()) == pytest.approx([0.8, 0.2, 0.3, 0.3])
        assert [2.0, 0.8] in points_of(accuracy) and "val_ema 0.700" in texts_of(accuracy)
        assert any("best validation 0.800" in text for text in texts_of(figure))
    kept = curves_figure(rows, {"status": "finished", "best_epoch": 1, "best_weights": "raw"})
    assert any("best validation 0.500" in text for text in texts_of(kept))


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [("map", [0.4, 0.6, 0.5], 2), ("ece", [0.4, 0.6, 0.1], 3), ("loss", [3.0, 1.0, 2.0], 2)],
)
def test_the_metric_that_judges_is_the_one_that_is_told(metric: str, scores: list[float], best: int) -> None:
    rows = rows_of(plan_of(2, 3))
    for row, score in zip(rows, scores, strict=True):
        row[f"val/{metric}"] = score
    result = {"status": "finished", "monitor": f"val/{metric}", "test/top1": 0.77}
    figure = curves_figure(rows, {**result, f"zeroshot/{metric}": 0.9, f"test/{metric}": 0.55})
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "top1 accuracy"] + [metric] * (metric != "loss")
    judged = panels[metric]
    assert [float(best), scores[best - 1]] in points_of(judged) and [3.0, 0.55] in points_of(judged)
    assert {f"best, epoch {best}", "zero-shot 0.900", "test 0.550"} <= texts_of(judged)
    (note,) = [text for text in judged.texts if text.get_text().startswith("best")]
    assert (note.xyann[1] > 0) == (metric == "ece")  # this score lies on the axis: below are the epochs' numbers
    assert "test 0.770" in texts_of(panels["top1 accuracy"])
    assert not any(text.startswith("best") for text in texts_of(panels["top1 accuracy"]))
    assert f"zero-shot {metric} 0.900   best validation {metric} {scores[best - 1]:.3f}   test {metric} 0.550" in (
        texts_of(figure)
    )


@pytest.mark.parametrize(
    ("loss", "name"),
    [("ce", "cross-entropy"), ("bce", "binary cross-entropy"), ("asl", "asymmetric"), (None, None)],
)
def test_the_axis_of_the_loss_names_it(loss: str | None, name: str | None) -> None:
    result = {"status": "finished"} if loss is None else {"status": "finished", "loss": loss}
    axes, _ = curves_figure(rows_of(plan_of(1, 2)), result).axes
    assert axes.get_ylabel() == ("loss" if name is None else f"loss ({name})")


def test_not_finite_epochs_leave_a_gap_and_a_mark() -> None:
    rows = rows_of(plan_of(2, 3))
    rows[2] |= {"train/loss": None, "val/loss": None, "val/top1": None}
    loss, accuracy = curves_figure(rows, {"status": "diverged"}).axes
    assert math.isnan(lines_by_name(loss)["train"].get_ydata()[2])
    assert all("not finite" in [text.get_text() for text in axes.texts] for axes in (loss, accuracy))
    assert "best, epoch 2" in [text.get_text() for text in accuracy.texts]


@pytest.mark.parametrize("num_rows", [0, 1, 2])
@pytest.mark.parametrize("is_nan", [False, True])
def test_any_run_can_be_drawn(tmp_path: Path, num_rows: int, is_nan: bool) -> None:
    plan = plan_of(1, max(num_rows, 1))
    changes = {f"{split}/{metric}": None for split in ("train", "val") for metric in ("loss", "top1")} if is_nan else {}
    write_run(tmp_path, plan, rows_of(plan, **changes)[:num_rows], {"status": "failed", "zeroshot/top1": None})
    plot_rates(tmp_path)
    plot_curves(tmp_path)
    for name in ("lr.png", "curves.png"):
        picture = pixels(tmp_path / name)
        assert picture.shape[:2] == (700, 1200)
        assert picture.std() > 0.01, "not blank"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_rates_of_steps_and_words_with_dollars_can_be_drawn(tmp_path: Path) -> None:
    plan = plan_of(3, 4)
    plan |= {"interval": "step", "x": [i / 10 for i in range(4)]}
    plan["layers"]["odd $name_{"] = plan["layers"]["stem"]
    write_run(tmp_path, plan, [], None)
    plot_rates(tmp_path)
    assert pixels(tmp_path / "lr.png").shape[:2] == (700, 1200)


def test_a_failing_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, plan_of(1, 2), [], None)
    plot_rates(tmp_path)
    before = (tmp_path / "lr.png").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        plot_rates(tmp_path)
    assert (tmp_path / "lr.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_redraws_a_run_without_torch(tmp_path: Path) -> None:
    plan = plan_of(2, 2)
    claim(tmp_path, FolderKind.run)
    write_run(tmp_path, plan, rows_of(plan), {"status": "finished", "test/top1": 0.9})
    code = (
        "import sys; from finetune.commands.report import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(tmp_path / "lr.png"), str(tmp_path / "curves.png")]
    assert {"lr.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_command_sums_up_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim(tmp_path, FolderKind.sweep)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").write_text(
        '{"status": "finished", "overrides": ["optim.lr=1e-3"], "val/top1": 0.9}'
    )
    assert main(["report", str(tmp_path)]) == 0
    assert "best: optim.lr=1e-3 (val 0.9000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, None, "has neither rates.json nor history.jsonl yet"),
        ("rates.json", "{", "rates.json is damaged"),
        ("rates.json", "[1]", "expected 'object'"),
        ("rates.json", '{"interval": "step", "x": [], "frozen": []}', "missing required field 'layers'"),
        (
            "rates.json",
            '{"interval": "step", "x": [0, 1], "frozen": [], "layers": {"stem": [1e-3]}}',
            "layer stem has 1 rates for 2",
        ),
        ("history.jsonl", '{"epoch"\n{"epoch": 2}\n', "history.jsonl is damaged: line 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, text: str | None, message: str
) -> None:
    claim(tmp_path, FolderKind.run)
    if name is not None and text is not None:
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_no_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none\x1b[2J")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/none\\x1b[2J is no folder: give a run or a sweep under outputs/\n"
    )


# --- numbers and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1e-3, "1e-3"), (5.625e-4, "5.62e-4"), (0.0, "0"), (1.0, "1e0"), (0.00075, "7.5e-4"), (math.nan, "not finite")],
)
def test_short_rates(rate: float, text: str) -> None:
    assert short(rate) == text


@given(st.lists(st.floats(0, 1), max_size=12))
def test_spread_labels_keep_their_order_and_distance_and_move_only_where_they_must(wishes: list[float]) -> None:
    placed = spread(wishes, 0.05)
    order = sorted(range(len(wishes)), key=lambda i: wishes[i])
    for low, high in pairwise(order):
        assert placed[high] - placed[low] >= 0.05 - 1e-9
    apart = sorted(wishes)
    if all(b - a >= 0.05 for a, b in pairwise(apart)):
        assert placed == pytest.approx(wishes)
    assert sum(placed) == pytest.approx(sum(wishes)), "no drift: blocks stay around their common middle"
