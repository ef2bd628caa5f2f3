"""The benchmark compares like with like: every loop does the same training. No clock is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_arms  # noqa: E402
import bench_machine  # noqa: E402
import bench_rivals  # noqa: E402
from bench_task import Task, make_images, our_model, picture, write_weights  # noqa: E402

VIEWS = ("augment=light", "augment.flip=0.5", "augment.views=2")


def make_task(folder: Path, **settings: Any) -> Task:
    make_images(folder / "images", 8, 4, size=(64, 64))
    task = Task(folder / "images", folder / "first.safetensors", "test_vit", epochs=3, batch_size=3, **settings)
    write_weights(task)
    return task


def outcome_of(arm: Any, task: Task, folder: Path, workers: int = 0) -> tuple[list[float], torch.Tensor]:
    folder.mkdir()
    flags = bench_arms.Flags(folder, workers=workers, same_pixels=True)
    outcome = arm(task, flags)
    return outcome.losses, bench_arms.final_logits(task, outcome)


@pytest.mark.parametrize("augment", [("augment=none",), VIEWS], ids=["resized", "views"])
@pytest.mark.parametrize("fix_layer", [-1, 3, 7], ids=["whole", "partly", "head"])
def test_every_loop_does_the_same_training(tmp_path: Path, fix_layer: int, augment: tuple[str, ...]) -> None:
    """From the same pixels every step's loss and the final logits agree within the rounding of fp32."""
    task = make_task(tmp_path, fix_layer=fix_layer, augment=augment)
    losses, logits = outcome_of(bench_arms.ours, task, tmp_path / "ours")
    assert len(losses) == 3 * 3
    assert losses[0] != pytest.approx(losses[-1], abs=1e-3), "nothing was learned: the comparison would say nothing"
    for arm in (bench_arms.plain, bench_arms.tuned, bench_rivals.with_timm):
        theirs, their_logits = outcome_of(arm, task, tmp_path / arm.__name__)
        assert theirs == pytest.approx(losses, abs=1e-5), arm.__name__
        assert (their_logits - logits).abs().max() < 1e-5, arm.__name__


def test_workers_change_nothing(tmp_path: Path) -> None:
    """Order and views of the other loops are asked for by key, so processes that live on see every epoch's."""
    task = make_task(tmp_path, fix_layer=3, augment=VIEWS)
    for arm in (bench_arms.tuned, bench_rivals.with_timm):
        alone = outcome_of(arm, task, tmp_path / f"{arm.__name__}0")
        helped = outcome_of(arm, task, tmp_path / f"{arm.__name__}2", workers=2)
        assert alone[0] == helped[0]


def test_transformers_does_the_same_training(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    task = make_task(tmp_path, fix_layer=3)
    losses, logits = outcome_of(bench_arms.ours, task, tmp_path / "ours")
    theirs, their_logits = outcome_of(bench_rivals.with_transformers, task, tmp_path / "theirs")
    assert theirs == pytest.approx(losses, abs=1e-5)
    assert (their_logits - logits).abs().max() < 1e-5


def test_the_other_loops_groups_are_ours(tmp_path: Path) -> None:
    """Rate and weight decay of every parameter, by the two independent rules."""
    from finetune.config import OptimConf
    from finetune.optim import param_groups

    task = make_task(tmp_path, fix_layer=2)
    model, _ = our_model(task)
    conf = OptimConf(lr=task.lr, layer_decay=task.layer_decay, weight_decay=task.weight_decay)
    ours = {
        name: (group["lr"], group["weight_decay"])
        for group in param_groups(model, conf)
        for name in group["param_names"]
    }
    net = bench_arms.first_model(task)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for merged in (False, True):
        groups = bench_arms.freeze_and_group(net, task, merged=merged)
        theirs = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert theirs.keys() == ours.keys()
        for name, values in theirs.items():
            assert values == pytest.approx(ours[name]), name


def test_images_are_the_same_in_every_run() -> None:
    first, again, other = (picture(name, 1, (40, 30)) for name in ("train0", "train0", "train1"))
    assert first.size == (40, 30)
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("has_it", [True, False])
def test_an_imitated_bf16_is_none(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    """An old GPU says yes unless it is asked about hardware, and the tuned arms would then be slower for it."""

    def supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert bench_machine.has_bf16("cuda") is has_it


def test_the_script_measures_prints_and_draws(tmp_path: Path) -> None:
    """Rows, in a process of its own, as a person types it."""
    words = "--model test_vit --images 6 --val-images 4 --batch-size 4 --epochs 1 --repeats 1 --workers 0"
    words += " --rows frozen head --fix-layer 2 4 --loops tuned ours"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *words.split(), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "only the head learns, 1 epochs" in done.stdout
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["fix_layer"] for row in report["rows"]] == [2, 4, 7]
    for row in report["rows"]:
        assert {arm["loop"] for arm in row["arms"]} == {"tuned", "ours"}
        assert all(len(arm["seconds"]) == 1 and arm["share_of_peak"] > 0 for arm in row["arms"])
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
