"""What only a CUDA GPU can show: `python -m pytest -m gpu`. Each test is skipped where torch sees no GPU."""

from __future__ import annotations

import functools
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_run, finetune, history

from finetune.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
# Kernels that give the same bits every time, so that two runs can be compared bit by bit.
SAME_BITS = ("device=cuda", "precision=fp32", "deterministic=true")
SMALL = ("data.shots=30", "train.epochs=3")


def run(name: str, *words: str) -> dict:
    """Run to the end in the folder `name`, in this process; its `result.json`."""
    assert main([*SMALL, *words, f"hydra.run.dir={name}"]) == 0
    result: dict = json.loads((Path(name) / "result.json").read_text())
    assert result["status"] == "finished"
    return result


def test_fp16_trains_under_the_loss_scaler(folder: Path) -> None:
    result = run("fp16", "model=vit", "device=cuda", "precision=fp16")
    assert result["computed_in"] == "float16"
    assert result["val/top1"] > 0.3
    state = torch.load(folder / "fp16" / "checkpoints" / "last.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1
    losses = [row["train/loss"] for row in history(folder / "fp16")]
    assert losses[-1] < losses[0]


def test_a_step_that_overflows_in_fp16_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first scale of 2 to the 40th overflows fp16 gradients: the scaler skips those steps and halves its scale."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    run("fp16", "model=vit", "device=cuda", "precision=fp16", "train.epochs=10")
    state = torch.load(folder / "fp16" / "checkpoints" / "last.pt", weights_only=True)
    assert state["counters"]["skipped"] > 0
    assert state["scaler"]["scale"] < 2.0**40
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values() if tensor.is_floating_point())


def test_bf16_is_the_default_and_reports_utilisation(folder: Path) -> None:
    assert run("auto", "model=vit", "device=cuda")["computed_in"] in ("bfloat16", "float32")
    assert all(
        0 < row["mfu"] < 1 for row in map(json.loads, (folder / "auto" / "history.jsonl").read_text().splitlines())
    )


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compiled_steps_learn_the_same(folder: Path, mode: str) -> None:
    """`max-autotune` records CUDA graphs; a short last batch runs as it would without."""
    run("plain", "model=vit", *SAME_BITS[:2], "augment=none")
    run("compiled", "model=vit", *SAME_BITS[:2], "augment=none", f"train.compile={mode}")
    for ours, theirs in zip(history(folder / "compiled"), history(folder / "plain"), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-2)


def test_images_cached_on_the_device_are_the_same_images(folder: Path) -> None:
    run("host", "model=vit", *SAME_BITS, "augment=none")
    run("device", "model=vit", *SAME_BITS, "augment=none", "data.cache=device")
    assert_same_run(folder / "host", folder / "device")


def test_activations_cached_on_the_device_are_the_same_activations(folder: Path) -> None:
    frozen = ("model=clip", *SAME_BITS, "optim.fix_layer=3", "augment.views=2")
    for cache in ("none", "ram", "device"):
        run(cache, *frozen, f"prefix.cache={cache}")
    assert_same_run(folder / "none", folder / "ram")
    assert_same_run(folder / "none", folder / "device")


def test_pinned_copies_arrive_whole(folder: Path) -> None:
    """Loader processes hand their batches over in pinned memory, which is copied beside the computation."""
    run("alone", "model=vit", *SAME_BITS, "data.workers=0")
    run("workers", "model=vit", *SAME_BITS, "data.workers=2")
    assert_same_run(folder / "alone", folder / "workers")


def test_auto_batch_fits_and_keeps_the_images_of_a_step(folder: Path) -> None:
    result = run("auto", "model=vit", "device=cuda", "data.batch_size=fit", "train.accumulate=2")
    assert result["auto_batch_size"] * result["auto_accumulate"] == 128
    assert torch.cuda.max_memory_reserved() < torch.cuda.get_device_properties(0).total_memory


def test_stopped_and_resumed_is_bitwise_on_a_gpu(folder: Path) -> None:
    words = ("model=vit", "model.drop_path=0.1", *SAME_BITS, *SMALL, "data.workers=0")
    assert main([*words, "hydra.run.dir=straight"]) == 0
    process = finetune(*words, "train.save_every_steps=2", "hydra.run.dir=stopped", cwd=folder, wait=False)
    while process.poll() is None and not (folder / "stopped" / "checkpoints" / "last.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert main(["resume=stopped"]) == 0
    assert_same_run(folder / "straight", folder / "stopped")
