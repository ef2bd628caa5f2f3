"""A person's commands, run for real: what they leave, what they refuse, and that nothing but the seed decides."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import ROOT, assert_same_run, finetune, go, history, small

from finetune.__main__ import main
from finetune.app.session import log_summary
from finetune.config import (
    AugmentConf,
    Family,
    HeadKind,
    ModelConf,
    OptimConf,
    Recipe,
    SchedulerConf,
)
from finetune.system.ours import FolderKind, claim


def test_the_main_job(tmp_path: Path) -> None:
    """The README's command, two epochs of it: zero-shot to better, every rate as planned, and a whole run directory."""
    process = finetune("model=clip", "sched.mode=cosine_pi", "train.epochs=2", cwd=tmp_path)
    assert process.returncode == 0, process.err
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "run.log", "history.jsonl", "result.json", "rates.json", "lr.png", "curves.png", "checkpoints",
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["zeroshot/top1"] >= 0.75
    assert result["test/zeroshot/top1"] >= 0.75
    assert result["test/top1"] >= 0.95
    assert result["test/top1"] > result["test/zeroshot/top1"]
    assert result["overrides"] == ["model=clip", "sched.mode=cosine_pi", "train.epochs=2"]
    if result["device"] == "cpu":
        assert result["computed_in"] == "float32"  # the model is too narrow for anything else
    assert f"in {result['computed_in']}; this run" in process.out
    assert yaml.safe_load((folder / "config.yaml").read_text())["sched"]["mode"] == "cosine_pi"

    # Layer decay 0.75 on 6 blocks: 8 distinct rates, lr * 0.75 ** distance, times the schedule's factor.
    rows = history(folder)
    depths = {"stem": 7, **{f"block.{i}": 7 - i for i in range(1, 7)}, "readout": 0, "head": 0}
    assert {name.rsplit(".", 1)[0] for name in rows[0]["lr"]} == set(depths)
    for epoch, row in enumerate(rows):
        factor = 0.5 + 0.5 * math.cos(math.pi * epoch / 2)
        for name, rate in row["lr"].items():
            assert rate == pytest.approx(1e-3 * 0.75 ** depths[name.rsplit(".", 1)[0]] * factor, rel=1e-12)
        assert len(set(row["lr"].values())) == 8

    for word in (
        "bundled for offline use",
        "zero-shot",
        "block.6",
        "learns",
        "epoch 2/2",
        "test/top1",
        str(folder.name),
    ):
        assert word in process.out, word
    with safe_open(folder / "checkpoints" / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == [str(digit) for digit in range(10)]
        assert json.loads(file.metadata()["preprocess"])["size"] == 32
        assert json.loads(file.metadata()["is_multilabel"]) is False and "threshold" not in file.metadata()
        assert "visual.conv1.weight" in file.keys()  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_the_same_seed_gives_the_same_bits_whatever_the_workers(stripes: Path, tmp_path: Path, family: str) -> None:
    model = ModelConf(family=Family(family), name=f"glyph_{family}", head_dropout=0.3)
    for name, workers in (("one", 0), ("again", 0), ("workers", 2)):
        go(small(stripes, model=model, data__workers=workers), tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "again")
    assert_same_run(tmp_path / "one", tmp_path / "workers")
    go(small(stripes, model=model, seed=1), tmp_path / "other")
    assert history(tmp_path / "one") != history(tmp_path / "other")


@pytest.mark.parametrize("fix_layer", [-1, 0, 3, 6, 7])
def test_what_is_frozen_keeps_the_bundled_weights(stripes: Path, tmp_path: Path, fix_layer: int) -> None:
    conf = small(stripes, optim=OptimConf(fix_layer=fix_layer), augment=AugmentConf(recipe=Recipe.none))
    conf.train.epochs = 1
    go(conf, tmp_path / "run")
    bundled = load_file(ROOT / "finetune" / "models" / "bundled" / "glyph_clip.safetensors")
    learned = load_file(tmp_path / "run" / "checkpoints" / "last.safetensors")
    ids = {"conv1": 0, "class_embedding": 0, "positional_embedding": 0, "ln_pre": 0, "ln_post": 7, "proj": 7}
    for name, value in learned.items():
        part = name.split(".")
        if part[0] == "head":
            continue
        layer = int(part[3]) + 1 if part[1] == "transformer" else ids[part[1]]
        assert torch.equal(value, bundled[name].float()) == (layer <= fix_layer), name
    assert {row["layer"] for row in _table(tmp_path / "run") if row["state"] == "frozen"} == _names(fix_layer)


def _table(folder: Path) -> list[dict[str, str]]:
    """The table of layers as run.log holds it."""
    lines = (folder / "run.log").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "id  layer" in line)
    rows = []
    for line in lines[first + 2 : first + 11]:
        cells = line.split()
        rows.append({"layer": cells[1], "rate": cells[2], "state": cells[-1]})
    return rows


def _names(fix_layer: int) -> set[str]:
    return {"stem", *(f"block.{i}" for i in range(1, 7)), "readout"} if fix_layer == 7 else {
        ["stem", *(f"block.{i}" for i in range(1, 7))][i] for i in range(fix_layer + 1)
    }  # fmt: skip


def test_a_run_started_again_in_its_folder_continues_or_rests(stripes: Path, tmp_path: Path) -> None:
    conf = small(stripes)
    first = go(conf, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert go(conf, tmp_path / "run") == first
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"another configuration \(seed: 0 -> 3\)"):
        go(small(stripes, seed=3), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", ["", "run.log", "run.log .lock .lock.json", "config.yaml", "config.yaml result.json"])
def test_a_start_that_was_killed_before_its_first_step_is_begun_anew(stripes: Path, tmp_path: Path, left: str) -> None:
    """Whatever it left, torn or whole, the same command and another one take the folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    claim(folder, FolderKind.run)
    for name in left.split():
        (folder / name).write_text("")
    (folder / "checkpoints").mkdir()
    assert go(small(stripes, seed=3), folder)["status"] == "finished"
    log = (folder / "run.log").read_text()
    assert ("the start before this one" in log) == bool(set(left.split()) - {".lock", ".lock.json"})


def test_a_start_that_failed_before_its_first_step_leaves_the_folder_to_another(stripes: Path, tmp_path: Path) -> None:
    folder, right = tmp_path / "run", small(stripes)
    for wrong in (small(tmp_path / "nowhere"), small(stripes, seed=1, train__monitor="val/map")):
        with pytest.raises((ValueError, OSError)):
            go(wrong, folder)
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    (folder / "skipped.txt").write_text("of the images of the other start")
    (folder / "bad_batch").mkdir()
    (folder / "bad_batch" / "step_1.pt").write_text("of its first step")
    (folder / "notes.txt").write_text("mine")
    result = go(right, folder)
    assert result["status"] == "finished" and result["resumed_at"] == []
    left = {path.name for path in folder.iterdir()} - {"notes.txt", "bad_batch"}
    go(right, tmp_path / "straight")
    assert left == {path.name for path in (tmp_path / "straight").iterdir()}
    assert not list((folder / "bad_batch").iterdir()) and (folder / "notes.txt").read_text() == "mine"
    assert_same_run(folder, tmp_path / "straight")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        go(small(stripes, seed=1), folder)


def test_resume_of_a_start_that_saved_no_step_takes_other_settings(stripes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        go(small(tmp_path / "nowhere"), folder)
    assert main([f"resume={folder}", f"data.root={stripes}", "train.epochs=1"]) == 0
    assert json.loads((folder / "result.json").read_text())["epochs"] == 1


def test_a_run_without_its_checkpoints_is_not_begun_anew(stripes: Path, tmp_path: Path) -> None:
    """They are large, and somebody may have removed them; history and scores are still of worth."""
    go(small(stripes), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        go(small(stripes, seed=1), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_somebody_elses_files_is_left_alone(stripes: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("mine")
    with pytest.raises(ValueError, match=r"result\.json but no \.finetune\.json.*choose another folder"):
        go(small(stripes), tmp_path)
    assert (tmp_path / "result.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal_and_started_again_equals_a_straight_run(
    stripes: Path, tmp_path: Path, signum: int, code: int
) -> None:
    words = [
        "data=folder",
        f"data.root={stripes}",
        "data.batch_size=8",
        "train.epochs=12",
        "model.head_dropout=0.2",
        "data.workers=2",
    ]
    conf = small(stripes, model__head_dropout=0.2, data__workers=2)
    conf.train.epochs = 12
    go(conf, tmp_path / "straight")

    command = [*words, f"hydra.run.dir={tmp_path}/stopped"]
    process = finetune(*command, cwd=tmp_path, wait=False)
    history_file = tmp_path / "stopped" / "history.jsonl"
    deadline = time.monotonic() + 120
    while not (history_file.exists() and history_file.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signum)  # as a scheduler or a terminal does: workers get it too
    process.communicate(timeout=60)
    assert process.returncode == code
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["status"] == "interrupted"

    again = finetune(*command, cwd=tmp_path)
    assert again.returncode == 0, again.err
    assert "resumed at step" in again.out
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert result["status"] == "finished"
    assert len(result["resumed_at"]) == 1
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_loss_that_is_not_finite_stops_with_its_images_named(stripes: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={stripes}", "data.batch_size=8", "optim.lr=1e30", "train.clip_grad=0"]
    process = finetune(*words, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert process.returncode == 1
    assert "Traceback" not in process.err + process.out
    assert "not finite in epoch 1, step" in process.err
    assert ".png" in process.err
    assert "optim.lr" in process.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "diverged"
    weights = load_file(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()
    assert weights


def test_a_sweep_into_a_folder_of_another_one_says_what_it_could_not_run(
    stripes: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier sweep's files stay as they are; a job that was refused its folder is a row of its own."""
    words = ["data=folder", f"data.root={stripes}", "train.epochs=1", f"hydra.sweep.dir={folder}/x/../sweep", "-m"]
    assert main([*words, "optim.lr=1e-3,1e-4"]) == 0
    before = (folder / "sweep" / "1" / "result.json").read_bytes()
    capsys.readouterr()
    assert main([*words, "optim.lr=1e-3,5e-4,1e-5"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "3 of 4 jobs finished" in shown.out and "job 1: refused: " in shown.out
    assert (folder / "sweep" / "1" / "result.json").read_bytes() == before
    assert main([*words, "optim.lr=1e-3,1e-4"]) == 0
    assert "3 of 3 jobs finished" in capsys.readouterr().out  # the earlier sweep's job is one of them


def test_jobs_that_go_to_their_own_folder_are_counted_once(stripes: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={stripes}", "train.epochs=1", "hydra.job.chdir=true", "seed=0,1", "-m"]
    process = finetune(*words, cwd=tmp_path)
    assert process.returncode == 0 and "2 of 2 jobs finished" in process.out, process.err


def test_a_sweep_with_folders_of_its_own_names(stripes: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={stripes}", "train.epochs=1", "hydra.sweep.dir=sweep", "optim.lr=1e-3,1e-4"]
    process = finetune(*words, "hydra.sweep.subdir=lr_${optim.lr}", "-m", cwd=tmp_path)
    assert process.returncode == 0, process.err
    assert "2 of 2 jobs finished" in process.out and "in sweep/lr_0.00" in process.out
    for subdir in ("", "same"):
        process = finetune(*words, f"hydra.sweep.subdir={subdir}", "-m", cwd=tmp_path)
        assert process.returncode == 1 and "a folder of its own" in process.err, process.err


def test_the_last_lines_where_no_epoch_had_a_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "finetune")
    about = {"monitor": "val/top1", "data": {"val": 9, "test": 9}, "overrides": []}
    log_summary(tmp_path, {**about, "test/top1": 0.5, "epochs": 3, "best_epoch": 0, "seconds": 1.0})
    assert "val/top1 nan   test/top1 0.5000" in caplog.text


def test_a_sweep_goes_on_past_a_failed_job_and_sums_up(stripes: Path, tmp_path: Path) -> None:
    words = ["data=folder", f"data.root={stripes}", "train.epochs=1", "optim.fix_layer=6,99", "seed=0,1", "-m"]
    process = finetune(*words, cwd=tmp_path)
    assert process.returncode == 1
    (folder,) = (tmp_path / "outputs" / "sweeps").glob("*/*")
    with (folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "failed"]
    assert "use -1" in rows[2]["error"]
    assert (folder / "sweep.png").stat().st_size > 5000
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2", "3"]
    assert "Traceback" not in process.err + process.out
    assert "optim.fix_layer" in process.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["device=cuda:7"], ["cuda:7"]),
        (["optim.fix_layer=8"], ["fix_layer=8", "-1", "7"]),
        (["sched.interval=step", "sched.warmup=9999"], ["sched.warmup=9999", "680"]),
        (["optim.no_weight_decay=[*.bias_k]"], ["'*.bias_k'"]),
        (["data=folder", "data.root=nowhere"], ["nowhere"]),
        (["model.image_size=33"], ["33"]),
    ],
)
def test_what_only_model_data_or_machine_can_tell_is_one_clear_line(
    words: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "hydra.run.dir=run"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert len([line for line in shown.err.splitlines() if line.startswith("error:")]) == 1, shown.err
    for word in expected:
        assert word in shown.err
    assert "zero-shot, before" not in shown.out  # refused ahead of a long look at the images
    assert json.loads((folder / "run" / "result.json").read_text())["status"] == "failed"
    assert not list((folder / "run").rglob("*.safetensors"))


def test_accumulation_and_step_schedule_count_optimizer_steps(stripes: Path, tmp_path: Path) -> None:
    """36 training images in batches of 8 make 5 micro-batches, so 3 optimizer steps an epoch at accumulate=2."""
    conf = small(stripes, sched=SchedulerConf(interval="step", mode="linear"), train__accumulate=2)  # type: ignore[arg-type]
    go(conf, tmp_path / "run")
    rates = [row["lr"]["head.decay"] for row in history(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 0.5e-3], rel=1e-12)
    plan = json.loads((tmp_path / "run" / "rates.json").read_text())
    assert plan["layers"]["head"] == pytest.approx([1e-3 * (1 - t / 6) for t in range(6)], rel=1e-12)


def test_a_fitted_head_is_reported_before_it_is_fine_tuned(stripes: Path, tmp_path: Path) -> None:
    """LP-FT: the probe alone is already good, and what is trained from it starts there."""
    conf = small(stripes, model__head=HeadKind.linear_probe, optim__fix_layer=7, optim__lr=1e-9)
    result = go(conf, tmp_path / "run")
    assert result["probe/top1"] >= 0.5
    assert result["val/top1"] == pytest.approx(result["probe/top1"])
    assert "linear probe, before fine-tuning" in (tmp_path / "run" / "run.log").read_text()


def test_recomputing_changes_memory_and_nothing_else(stripes: Path, tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        conf = small(stripes, optim__fix_layer=2, model__head_dropout=0.2)
        conf.train.recompute = recompute
        go(conf, tmp_path / name)
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")
