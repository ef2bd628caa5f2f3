"""What is told before a run is what the run will be: groups, rates, bytes kept for the backward pass, known FLOPs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.__main__ import main as finetune
from finetune.app.rate_plan import peak_optim
from finetune.app.run import run
from finetune.config import Family, LayerRule, ModelConf
from finetune.config.words.configuration import compose
from finetune.core.cost import FP32_BYTES, count_flops, estimate_memory
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.optim import build_optimizer
from finetune.models import build_model

ROOT = Path(__file__).parent.parent.parent


def main(words: list[str]) -> int:
    return finetune(["describe", *words])


def describe(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def on_meta(name: str, classes: int = 10, fix_layer: int = -1) -> LayeredModel:
    conf = compose([f"model={name}"]).model
    model = build_model(conf, [str(index) for index in range(classes)], device="meta").model
    freeze(model, fix_layer)
    return model


@pytest.mark.parametrize(
    ("name", "size", "gflop", "params"),
    [
        # Of the image tower, a multiply-add as two: open_clip's model_profile.csv and timm's results say half of it.
        ("clip_b32", 224, 8.8, 87.8),
        ("clip_b16", 224, 35.1, 86.2),
        ("clip_l14", 224, 162.0, 304.0),
        ("vit_b16_in21k", 224, 35.1, 85.8),
    ],
)
def test_known_flops_and_parameters(name: str, size: int, gflop: float, params: float) -> None:
    model = on_meta(name, classes=1)
    flops = count_flops(model, size)
    assert flops.forward / 1e9 == pytest.approx(gflop, rel=0.005)
    # Each product of the forward pass has two in the backward pass; that for the images themselves is not needed.
    assert flops.training / flops.forward == pytest.approx(3.0, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.005)


def test_the_backward_pass_counts_what_learns_only() -> None:
    whole = count_flops(on_meta("clip_b32"), 224)
    probe = count_flops(on_meta("clip_b32", fix_layer=13), 224)
    half = count_flops(on_meta("clip_b32", fix_layer=6), 224)
    assert probe.forward == half.forward == whole.forward
    assert probe.training - probe.forward == 2 * 512 * 10  # the head's weight gradient, and nothing else
    assert half.training - half.forward == pytest.approx((whole.training - whole.forward) / 2, rel=0.02)
    model = on_meta("clip_b32")
    model.recompute = True
    # Nearly a second forward pass: torch stops in each layer where all that the backward pass needs is there again.
    assert 0.6 * whole.forward < count_flops(model, 224).training - whole.training < whole.forward


@pytest.mark.parametrize("family", ["clip", "vit"])
@pytest.mark.parametrize("fix_layer", [-1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_real_forward_pass_keeps(family: str, fix_layer: int, dtype: torch.dtype) -> None:
    conf = ModelConf(family=Family(family), name=f"glyph_{family}")
    names = [str(index) for index in range(10)]
    real, meta = (build_model(conf, names, device=device).model for device in ("cpu", "meta"))
    for model in (real, meta):
        freeze(model, fix_layer)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        logits = real(torch.randn(6, 3, 32, 32))
    expected = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    memory = estimate_memory(meta, 32, batch_size=6, dtype=dtype)
    assert logits.shape == (6, 10)
    # To the byte in fp32; in bf16 some kernels keep a little more than their shapes say.
    assert memory.activations == pytest.approx(expected, rel=0 if dtype == torch.float32 else 0.002)


def test_memory_adds_up_and_recomputing_saves() -> None:
    model = on_meta("clip_b16", fix_layer=6)
    learning = FP32_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = estimate_memory(model, 224, batch_size=16, dtype=torch.bfloat16, averaged=True)
    assert memory.gradients == memory.average == learning
    assert memory.optimizer == 2 * learning
    assert memory.weights == FP32_BYTES * sum(p.numel() for p in model.parameters())
    assert memory.total == memory.weights + 4 * learning + memory.activations
    twice = estimate_memory(model, 224, batch_size=32, dtype=torch.bfloat16)
    assert memory.activations < twice.activations < 2 * memory.activations  # copies of weights are there once
    whole = estimate_memory(on_meta("clip_b16"), 224, batch_size=16, dtype=torch.bfloat16)
    assert memory.activations < 0.6 * whole.activations
    model.recompute = True
    assert estimate_memory(model, 224, batch_size=16, dtype=torch.bfloat16).activations < 0.4 * memory.activations
    assert model.recompute


@pytest.mark.parametrize("rule", ["beit", "timm"])
def test_rates_and_decay_are_those_of_the_real_optimizer(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optim.fix_layer=2", f"optim.layer_rule={rule}", "optim.lr_base_batch=128", "sched.warmup=3"]
    found = describe(capsys, *words)
    conf = compose(words)
    assert conf.optim.layer_rule == LayerRule(rule)
    model = build_model(conf.model, [str(index) for index in range(10)]).model
    freeze(model, 2)
    groups = build_optimizer(model, peak_optim(conf)).param_groups
    for row in found["layers"]:
        own = [group for group in groups if group["layer_id"] == row["id"]]
        assert row["state"] == ("frozen" if row["id"] <= 2 else "learns")
        assert row["rates_peak"] == sorted({group["lr"] for group in own}, reverse=True)
        assert row["rate_start"] == pytest.approx(row["rate_peak"] / 4)  # (0 + 1) / (3 + 1)
        decayed = [p.numel() for group in own if group["weight_decay"] for p in group["params"]]
        assert row["decayed"] == sum(decayed)
    assert found["totals"]["learning"] == sum(p.numel() for group in groups for p in group["params"])
    assert found["totals"]["groups"] == len(groups)


def test_the_plan_is_the_runs_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps, warmup and rates as the run writes them: a layer's peak, and the head's rate at the start."""
    words = [
        "train.epochs=1",
        "data.batch_size=256",
        "optim.fix_layer=6",
        "sched.interval=step",
        "sched.warmup_epochs=0.5",
    ]
    run(compose(words), tmp_path, words, quiet=True)
    rates = json.loads((tmp_path / "rates.json").read_text())
    found = describe(capsys, *words)
    assert found["schedule"]["steps"] == len(rates["x"])
    assert found["schedule"]["warmup"] == 2
    assert rates["layers"]["head"][0] == pytest.approx(found["schedule"]["lr_start"])
    assert rates["layers"]["head"][-1] == pytest.approx(found["schedule"]["lr_last"])
    assert rates["frozen"] == [row["layer"] for row in found["layers"] if row["state"] == "frozen"]


@pytest.mark.parametrize(
    ("words", "passes"),
    [(["augment=none"], 1), (["augment=light", "augment.views=4"], 4), (["augment=light", "augment.views=40"], 15)],
)
def test_work_with_cached_activations(capsys: pytest.CaptureFixture[str], words: list[str], passes: int) -> None:
    """Each view of an image once, whatever the 15 epochs; and what learns in all of them."""
    model = on_meta("vit", fix_layer=4)
    flops, images = count_flops(model, 32), 1079
    found = describe(capsys, "model=vit", "optim.fix_layer=4", "train.epochs=15", *words)["compute"]
    saved = found["pflop_run"] - found["pflop_run_kept"]
    assert saved == pytest.approx(flops.frozen * (15 - passes) * images / 1e15, rel=1e-6)
    assert main(["model=vit", "optim.fix_layer=4", *words]) == 0
    assert "with the activations of the frozen layers cached" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["optim.fix_layer=-1"], ["augment=light"], ["prefix.cache=none"]])
def test_work_without_a_cache(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    found = describe(capsys, "model=vit", "optim.fix_layer=4", "augment=none", *words)["compute"]
    assert found["pflop_run_kept"] is None


def test_a_person_reads_a_table_and_sees_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "rates.png"
    assert (
        main(
            ["experiment=ft_clip_b16", "data.batch_size=32", "--classes=37", "--images", "3680", "--plot", str(picture)]
        )
        == 0
    )
    text = capsys.readouterr().out
    for words in (
        "ViT-B-16", "37 classes, 3,680 training images: as given", "block.12", "frozen", "GFLOP", "activations",
        "warmup (10 epochs)", "BATCH: this run learns from 256 images", "optim.lr_base_batch=2048", "peak 7.5e-05",
    ):  # fmt: skip
        assert words in text, words
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_assumed_of_absent_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = describe(capsys, "data=folder", f"data.root={tmp_path}")
    assert found["assumed"].startswith("1,000 classes, 1,281,167 training images: ImageNet-1k's")
    assert describe(capsys)["assumed"] == "10 classes, 1,079 training images: data=digits counted"


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--classes", "0"], 2, "from 1 to"),
        (["--plot"], 2, "--plot: expected one argument"),
        (["--plot", "optim.lr=1e-3"], 2, "--plot=NAME"),
        (["-m", "optim.lr=1,2"], 2, "--multirun"),
        (["--jsn"], 2, "did you mean '--json'"),
        (["--optim.lr=1"], 2, "without dashes"),
        (["optim.lr=abc"], 1, "optim.lr"),
        (["data.batch_size=fit"], 1, "give a number"),
        (["optim.fix_layer=99"], 1, "layers 0 (stem) to 8 (head)"),
        (["model.name=ViT-B-17", "model.pretrained=openai"], 1, "ViT-B-16"),
        (["--plot", "/no/such/folder/x.png"], 1, "does not exist"),
    ],
)
def test_mistakes_are_one_clear_line(
    words: list[str], code: int, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert problem in printed.err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; from finetune.commands.describe import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--json" in shown.stdout


@pytest.mark.slow
def test_the_largest_clip_fits_into_two_gigabytes() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = [sys.executable, "-m", "finetune", "describe", "model=clip_bigg14", "precision=bf16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "1,844,920,064" in shown.stdout
    peak_gb = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e6
    assert before >= 2e6 or peak_gb < 2.0
