"""Laws of a sweep's summary: nothing that failed counts, statistics are statistics', the table is safe and complete."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.report.jobs import JobResult, Sweep, group_jobs, read_jobs, varied_keys
from finetune.report.sweep import summarize
from finetune.report.sweep_figure import levels, positions, sweep_figure
from finetune.runs.folders import JOBS, SweepRecord
from finetune.system.locks import run_lock
from finetune.system.ours import FolderKind, claim

FINISHED = {
    "status": "finished",
    "error": None,
    "epochs": 15,
    "seconds": 31.25,
    "zeroshot/top1": 0.79,
    "test/top1": 0.98,
}


def add_job(folder: Path, *overrides: str, **result: Any) -> Path:
    """A job's folder with `result.json`; `val` and `test` stand for their keys."""
    folder.mkdir(parents=True)
    names = {"val": "val/top1", "test": "test/top1"}
    data = FINISHED | {"overrides": list(overrides)} | {names.get(key, key): value for key, value in result.items()}
    (folder / "result.json").write_text(json.dumps(data))
    return folder


def job_of(overrides: dict[str, str], val: float, test: float = math.nan) -> JobResult:
    """A finished job with these scores."""
    words = [f"{key}={value}" for key, value in overrides.items()]
    return JobResult(Path("job"), "finished", words, {"val/top1": val, "test/top1": test})


def picture_of(jobs: list[JobResult], varied: list[str], *, num_missing: int = 0) -> Any:
    failed = [JobResult(Path("job"), "failed", [], {})] * num_missing
    return sweep_figure(Sweep(Path("sweep"), [*jobs, *failed], varied, "top1", []))


def table_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_summary_removes_what_a_killed_one_left_and_waits_for_another(tmp_path: Path) -> None:
    marker = claim(tmp_path, FolderKind.sweep)
    add_job(tmp_path / "0", "seed=0", val=0.9, test=0.8)
    left = [tmp_path / f".{name}.{marker.id}-99999.tmp" for name in ("summary.csv", "sweep.png")]
    foreign = tmp_path / f".summary.csv.{'0' * 16}-99999.tmp"
    for path in (*left, foreign):
        path.write_text("half")
    with ThreadPoolExecutor() as pool, run_lock(tmp_path):
        other = pool.submit(summarize, tmp_path)
        time.sleep(0.05)
        assert not other.done() and not (tmp_path / "summary.csv").exists()
        assert all(path.exists() for path in left), "they may be of the process that holds the lock"
    assert other.result() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        (".finetune.json", "0", "summary.csv", "sweep.png", foreign.name)
    )


# --- the whole -------------------------------------------------------------------------------------------------------


def test_a_sweep_with_failures_ends_with_a_table_a_picture_and_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_job(tmp_path / "0", "model=clip", "optim.layer_decay=0.65", val=0.981, test=0.975)
    add_job(tmp_path / "1", "model=clip", "optim.layer_decay=0.75", val=0.991, test=0.986)
    add_job(
        tmp_path / "2",
        "model=clip",
        "optim.layer_decay=0.9",
        status="failed",
        error="no such file\nsecond line",
        val=None,
    )
    add_job(tmp_path / "10", "model=clip", "optim.layer_decay=1.0", status="running", val=0.999)
    (tmp_path / "11").mkdir()
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "result.json").write_text('{"status": "fin')
    (tmp_path / "notes").mkdir()
    assert summarize(tmp_path) == 4
    rows = table_of(tmp_path)
    assert [row["job"] for row in rows] == ["0", "1", "2", "10", "11", "12"], "2 before 10, and only jobs"
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "interrupted", "failed", "failed"]
    assert list(rows[0]) == [
        *("job", "status", "optim.layer_decay", "zeroshot/top1", "val/top1", "test/top1", "epochs", "seconds", "error")
    ]
    assert rows[2]["val/top1"] == "" and rows[2]["error"] == "no such file"
    assert "12/result.json is damaged" in rows[5]["error"] and "no result" in rows[4]["error"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("*")] == [["*", "1", "0.75"]]
    assert "  job 2 (optim.layer_decay=0.9): failed: no such file" in lines
    assert f"best: optim.layer_decay=0.75 (val 0.9910, test 0.9860) in {tmp_path / '1'}" in lines
    assert lines[-1].endswith("python -m finetune -m model=clip optim.layer_decay=0.75 seed=0,1,2")
    assert "0.999" not in out, "what did not finish never counts"


def test_an_empty_sweep_and_one_in_which_all_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summarize(tmp_path) == 0
    assert table_of(tmp_path) == [] and "no jobs in" in capsys.readouterr().out
    add_job(tmp_path / "0", "seed=1", status="diverged", error="loss not finite")
    assert summarize(tmp_path) == 1
    assert f"no job finished: the reason of the first is in {tmp_path / '0' / 'run.log'}" in capsys.readouterr().out
    assert not (tmp_path / "sweep.png").exists()
    with pytest.raises(FileNotFoundError):
        summarize(tmp_path / "none")


DAMAGED = [
    "", "null", "[]", "{", "3", '{"status": 3}', '{"status": "finished"}', "\x00",
    '{"status": "finished", "overrides": 3}',
    '{"status": "finished", "overrides": [1, null, "a"], "val/top1": "high", "seconds": [], "error": {}}',
    '{"status": "finished", "overrides": ["a=1"], "val/top1": NaN, "test/top1": Infinity, "epochs": true}',
    '{"status": "\\u001b[2J", "overrides": ["=cmd()=\\u001b[2J"], "error": "\\u001b[2J"}', "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_no_file_stops_the_summary_or_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    add_job(tmp_path / "0", "a=2", val=0.9)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "result.json").write_text(text)
    summarize(tmp_path)
    assert len(table_of(tmp_path)) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out and "val 0.9000" in out
    assert "\x1b" not in (tmp_path / "summary.csv").read_text()


def test_a_job_that_another_process_works_in_is_not_called_dead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_job(tmp_path / "0", "seed=0", val=0.9)
    add_job(tmp_path / "1", "seed=1", status="running")
    with run_lock(tmp_path / "1"):
        assert summarize(tmp_path) == 1
    assert f"job 1: at work: process {os.getpid()} on" in capsys.readouterr().out
    assert summarize(tmp_path) == 1 and "killed, or out of memory" in capsys.readouterr().out


def test_a_folder_in_place_of_the_result_is_a_failed_job(tmp_path: Path) -> None:
    (tmp_path / "0" / "result.json").mkdir(parents=True)
    assert summarize(tmp_path) == 1


# --- seeds -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(scores=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=4))
def test_mean_and_deviation_over_seeds_are_those_of_statistics(scores: list[list[float]]) -> None:
    jobs = [
        job_of({"optim.lr": str(i), "seed": str(k)}, value)
        for i, values in enumerate(scores)
        for k, value in enumerate(values)
    ]
    groups = group_jobs(jobs, ["optim.lr"])
    assert [group.overrides for group in groups] == [{"optim.lr": str(i)} for i in range(len(scores))]
    for group, values in zip(groups, scores, strict=True):
        assert group.mean("val/top1") == statistics.fmean(values)
        assert group.std("val/top1") == (statistics.stdev(values) if len(values) > 1 else None)
        assert group.best_job("top1").number("val/top1") == max(values)
        assert math.isnan(group.mean("test/top1")) and group.std("test/top1") is None


def test_the_winner_over_seeds_is_the_best_mean_not_the_luckiest_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"0.65": [0.95, 0.999], "0.75": [0.98, 0.984], "0.9": [0.97]}
    jobs = [(decay, seed, value) for decay, each in values.items() for seed, value in enumerate(each)]
    for number, (decay, seed, value) in enumerate(jobs):
        add_job(tmp_path / str(number), f"optim.layer_decay={decay}", f"seed={seed}", val=value, test=value - 0.01)
    add_job(tmp_path / "5", "optim.layer_decay=0.9", "seed=1", status="failed", error="gone", val=0.0)
    assert summarize(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("over seeds, mean and standard deviation:")
    rows = [line.split() for line in lines[start + 4 : start + 7]]
    assert rows == [
        ["0.65", "2", "0.9745", f"{statistics.stdev([0.95, 0.999]):.4f}", "0.9645", "0.0346"],
        ["*", "0.75", "2", "0.9820", f"{statistics.stdev([0.98, 0.984]):.4f}", "0.9720", "0.0028"],
        ["0.9", "1", "0.9700", "-", "0.9600", "-"],
    ]
    assert "best: optim.layer_decay=0.75 (val 0.9820 ± 0.0028, test 0.9720 ± 0.0028, 2 seeds)" in lines
    assert f"its best run: val 0.9840, test 0.9740 in {tmp_path / '3'}" in lines
    assert lines[-1] == "next, a run with the winner: python -m finetune optim.layer_decay=0.75"


@pytest.mark.parametrize(("monitor", "winner"), [("val/map", "1"), ("val/loss", "2"), ("val/top1", "0")])
def test_the_winner_is_the_best_by_what_picked_the_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monitor: str, winner: str
) -> None:
    """Of a loss the least. A job of an older version, which does not say, was picked by top1."""
    metric = monitor.removeprefix("val/")
    told = {} if monitor == "val/top1" else {"monitor": monitor}
    for number, (top1, average, loss) in enumerate([(0.9, 0.2, 0.3), (0.8, 0.6, 0.2), (0.7, 0.5, 0.1)]):
        scores = {"val": top1, "val/map": average, "val/loss": loss, "test/map": average, "test/loss": loss}
        add_job(tmp_path / str(number), f"optim.lr={number}", **scores, **told)
    assert summarize(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    (best,) = (line for line in lines if line.startswith("best:"))
    assert best.startswith(f"best: optim.lr={winner} (val") and best.endswith(f"in {tmp_path / winner}")
    assert (f"val/{metric} " in best) == (metric != "top1")
    assert table_of(tmp_path)[0][f"test/{metric}"]
    (starred,) = (line for line in lines if line.lstrip().startswith("* "))
    assert starred.split()[1] == winner


def test_jobs_picked_by_different_metrics_are_ranked_by_the_common_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_job(tmp_path / "0", "train.monitor=val/loss", monitor="val/loss", **{"val": 0.9, "val/loss": 0.1})
    add_job(tmp_path / "1", "train.monitor=val/map", monitor="val/map", **{"val": 0.8, "val/map": 0.9})
    assert summarize(tmp_path) == 0
    out = capsys.readouterr().out
    assert "best: train.monitor=val/loss" in out and "ranked by val/top1, since" in out


def test_what_another_run_has_left_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_job(tmp_path / "0", "optim.lr=1", val=0.5)
    add_job(tmp_path / "1", "optim.lr=7", val=0.9)
    add_job(tmp_path / "named", "optim.lr=3", val=0.6)
    (tmp_path / "notes").mkdir()
    reason = "it holds a run of another configuration"
    for name, why in (("0", None), ("1", reason), ("named", None), ("0", "it is of job 0")):
        ident = SweepRecord(tmp_path).begin_job(tmp_path / name)
        if why is not None:
            SweepRecord(tmp_path).refuse_job(ident, why)
    with open(tmp_path / JOBS, "a") as file:
        file.write('null\n{"id": 3}\n{"job": "na')  # damage, and a kill
    assert summarize(tmp_path) == 2
    out = capsys.readouterr().out
    assert "2 of 4 jobs finished" in out and f"job 1: refused: {reason}" in out and "best: optim.lr=3" in out
    assert [row["status"] for row in table_of(tmp_path)] == ["finished", "finished", "refused", "refused"]
    SweepRecord(tmp_path).start()
    for name in ("1", "3"):  # somebody made room, and they were run
        SweepRecord(tmp_path).begin_job(tmp_path / name)
    add_job(tmp_path / "3", "optim.lr=4", val=0.1)
    assert summarize(tmp_path) == 0 and len(table_of(tmp_path)) == 4


def test_folders_that_begin_with_a_number_are_no_jobs(tmp_path: Path) -> None:
    """As `hydra.sweep.subdir='${seed}/${optim.lr}'` makes them; and runs that nobody put on record are not asked."""
    for number, name in enumerate(("0/a", "0/b", "1/a")):
        SweepRecord(tmp_path).begin_job(add_job(tmp_path / name, f"optim.lr={number}", val=0.5))
    add_job(tmp_path / "0/a/backup", "optim.lr=9", val=0.9)
    add_job(tmp_path / "other", "optim.lr=9", val=0.9)
    assert summarize(tmp_path) == 0 and len(table_of(tmp_path)) == 3


def test_ties_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, value in enumerate([0.9, 0.95, 0.95]):
        add_job(tmp_path / str(number), f"optim.lr={number}", val=value)
    summarize(tmp_path)
    assert "as good on validation: job 2" in capsys.readouterr().out.splitlines()


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_spreadsheet_never_runs_a_cell(tmp_path: Path) -> None:
    add_job(tmp_path / "0", "data.root==cmd()", "optim.fix_layer=-1", val=0.9)
    add_job(tmp_path / "1", 'data.root=@a, "b"', "optim.fix_layer=2", status="failed", error="-x|y")
    add_job(tmp_path / "2", "data.root=+1.5e3", "optim.fix_layer=0", status="failed", error="\t=1")
    summarize(tmp_path)
    rows = table_of(tmp_path)
    assert [row["data.root"] for row in rows] == ["'=cmd()", '\'@a, "b"', "+1.5e3"]
    assert [row["optim.fix_layer"] for row in rows] == ["-1", "2", "0"], "a negative number stays one"
    assert [row["error"] for row in rows] == ["", "'-x|y", "'=1"]


def test_the_table_holds_the_numbers_of_the_results(tmp_path: Path) -> None:
    add_job(tmp_path / "0", "optim.lr=1e-3", val=0.9123456789, test=None, seconds=12.5)
    summarize(tmp_path)
    row = table_of(tmp_path)[0]
    assert (float(row["val/top1"]), row["test/top1"], float(row["seconds"])) == (0.9123456789, "", 12.5)
    assert row["optim.lr"] == "1e-3", "as typed; a sweep of one job shows all its overrides"


def test_only_what_varies_is_a_column(tmp_path: Path) -> None:
    add_job(tmp_path / "0", "model=vit", "optim.lr=1e-3", "seed=0", val=0.9)
    add_job(tmp_path / "1", "model=vit", "optim.lr=1e-3", "seed=1", "+train.epochs=3", val=0.9)
    (tmp_path / "2").mkdir()
    jobs, _ = read_jobs(tmp_path)
    assert varied_keys(jobs) == ["seed", "train.epochs"]


def test_jobs_of_another_sweep_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = SweepRecord(tmp_path)
    record.start()
    for name, val in (("0", 0.8), ("1", 0.7)):
        record.begin_job(add_job(tmp_path / name, "optim.lr=1e-3", f"seed={name}", val=val))
    add_job(tmp_path / "7", "optim.lr=1", val=0.99)  # copied from elsewhere
    assert summarize(tmp_path) == 0
    assert "1 folder left out, since this sweep started no job there (jobs.jsonl): 7" in capsys.readouterr().out
    assert [row["job"] for row in table_of(tmp_path)] == ["0", "1"]
    # A damaged record, or none, leaves out nobody.
    with open(tmp_path / "jobs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "1-1", "jo')
    summarize(tmp_path)
    assert len(table_of(tmp_path)) == 3
    (tmp_path / "jobs.jsonl").unlink()
    summarize(tmp_path)
    assert len(table_of(tmp_path)) == 3 and "left out" not in capsys.readouterr().out


def test_the_next_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_job(tmp_path / "0", "data.root=/my  photos (2)", "optim.betas=[0.9,0.99]", val=0.9)
    summarize(tmp_path)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("python -m finetune -m 'data.root=/my  photos (2)' 'optim.betas=[0.9,0.99]' seed=0,1,2")


# --- the picture -----------------------------------------------------------------------------------------------------


def dots_of(axes: Any) -> list[list[float]]:
    return [point for collection in axes.collections for point in collection.get_offsets().tolist()]


def test_one_number_is_a_line_of_means_with_a_dot_a_seed() -> None:
    jobs = [
        job_of({"optim.layer_decay": d, "seed": str(s)}, float(d) - s / 100, math.nan if d == "0.9" else 0.5)
        for d in ("0.9", "0.65", "0.75")
        for s in (0, 1)
    ]
    figure = picture_of(jobs, ["optim.layer_decay", "seed"], num_missing=1)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["val"].get_xdata()) == [0.65, 0.75, 0.9]
    assert list(lines["val"].get_ydata()) == pytest.approx([0.645, 0.745, 0.895])
    assert list(lines["test"].get_xdata()) == [0.65, 0.75], "what is missing is absent"
    assert all(y > 0 for _, y in dots_of(axes))
    assert [0.65, 0.65] in dots_of(axes) and [0.65, 0.64] in dots_of(axes)
    assert "without a score: 1 of 7 jobs" in figure.texts[1].get_text()


def test_words_are_dots_without_a_line_between_them() -> None:
    jobs = [job_of({"sched.mode": mode}, 0.9, 0.8) for mode in ("linear", "cosine")]
    (axes,) = picture_of(jobs, ["sched.mode"]).axes
    assert {line.get_linestyle() for line in axes.get_lines() if line.get_label() in ("val", "test")} == {"None"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["linear", "cosine"]


def test_two_settings_are_a_grid_with_gaps_for_what_failed() -> None:
    pairs = [("1e-4", "0.65"), ("1e-3", "0.65"), ("1e-3", "0.75")]
    jobs = [job_of({"optim.lr": lr, "optim.layer_decay": d}, 0.9 + i / 100, 0.8) for i, (lr, d) in enumerate(pairs)]
    figure = picture_of(jobs, ["optim.lr", "optim.layer_decay"], num_missing=1)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["val/top1", "test/top1"]
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2, 2) and math.isnan(image.filled(math.nan)[1, 0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.900", "0.910", "0.920"]
    assert sum(patch.get_hatch() is not None for patch in figure.axes[0].patches) == 1


@pytest.mark.parametrize("varied", [["a", "b", "c"], ["seed"], [], ["a"]])
def test_anything_else_is_a_ranking_by_validation(varied: list[str]) -> None:
    jobs = [job_of({"a": "x", "b.k": str(i), "c": "$1_{", "seed": str(i)}, i / 100, math.nan) for i in range(1, 60)]
    if varied == ["a"]:
        jobs = jobs[:1]
    figure = picture_of(jobs, varied)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert 1 <= len(labels) <= 30
    figure.canvas.draw()


def test_a_ranking_has_the_best_on_top() -> None:
    jobs = [job_of({"seed": str(i)}, 0.5 + i / 10, 0.4) for i in range(4)]
    axes = picture_of(jobs, ["seed"]).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["seed=3", "seed=2", "seed=1", "seed=0"]
    assert axes.yaxis_inverted()


def test_levels_and_their_places() -> None:
    assert levels(["1e-3", "1e-4", "1e-3", "2"]) == ["1e-4", "1e-3", "2"]
    assert levels(["b", "10", "a", "b"]) == ["b", "10", "a"]
    assert positions(["0.65", "0.75"]) == ([0.65, 0.75], "linear")
    assert positions(["1e-5", "1e-3"]) == ([1e-5, 1e-3], "log")
    assert positions(["0", "1e-5", "1e-3"]) == ([0.0, 1.0, 2.0], "even")
    assert positions(["linear", "cosine"]) == ([0.0, 1.0], "even")
    assert [group.value("a") for group in group_jobs([job_of({}, 1), job_of({"a": "1"}, 1)], ["a"])] == ["default", "1"]
