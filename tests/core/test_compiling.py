"""A compiled step is the same step but for rounding, and a short last batch compiles nothing anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import small_images, small_model
from small_runs import go, small

from finetune.config import AugmentConf, CompileMode, Conf, Family, ModelConf, Recipe, find_problems
from finetune.core.compiling import compiled
from finetune.core.freezing import freeze
from finetune.runs.earlier import EarlierRun
from finetune.runs.resume import first_promise

CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_a_compiler
def test_the_same_logits_and_gradients() -> None:
    model = small_model("tv-vit")
    freeze(model, 2)
    model.eval()  # no dropout: its random numbers are another kernel's
    run = compiled(model, CompileMode.default, batch_size=4, device=CPU)
    assert run is not None
    with torch.no_grad():
        h = model(small_images("tv-vit", batch=4), stop=model.boundary)
    torch._dynamo.utils.counters.clear()
    for inputs in (h, h, h[:3]):
        expected = model(inputs, start=model.boundary)
        expected.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        logits = run(inputs, model.boundary)
        logits.square().sum().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
        model.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_a_compiler
def test_the_ninth_job_of_a_sweep_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch compiles one function eight times and then no more. Kernels are left out here: graphs are what counts."""
    compile_it, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_it(function, backend=backend, dynamic=False))
    for job in range(1, 11):
        model = small_model("vit")
        run = compiled(model, CompileMode.default, batch_size=2, device=CPU)
        assert run is not None
        run(small_images("vit", batch=2), 0)
        assert len(graphs) == job


def test_none_is_none_and_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("vit")
    assert compiled(model, CompileMode.none, batch_size=4, device=CPU) is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, .* use train\.compile=none"):
        compiled(model, CompileMode.default, batch_size=4, device=CPU)


def test_the_promise_is_weaker() -> None:
    assert first_promise(EarlierRun(), CPU, deterministic=False, is_compiled=True).kind == "close"
    assert first_promise(EarlierRun(), CPU, deterministic=False, is_compiled=False).kind == "bitwise"


def last_block(stripes: Path, mode: CompileMode, **changes: object) -> Conf:
    """An epoch in which the last block of the small ViT learns, and what comes above it; its last batch is short."""
    vit = ModelConf(family=Family.vit, name="glyph_vit")
    plain = AugmentConf(recipe=Recipe.none)
    return small(stripes, model=vit, augment=plain, optim__fix_layer=5, train__epochs=1, train__compile=mode, **changes)


@needs_a_compiler
def test_a_compiled_run_is_the_same_run_but_for_rounding(stripes: Path, tmp_path: Path) -> None:
    results, weights, losses = [], [], []
    torch._dynamo.utils.counters.clear()
    for mode in (CompileMode.none, CompileMode.default):
        folder = tmp_path / mode.name
        results.append(go(last_block(stripes, mode), folder))
        weights.append(load_file(folder / "checkpoints" / "last.safetensors"))
        losses.append(json.loads((folder / "history.jsonl").read_text())["train/loss"])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (mode == CompileMode.default)
    for name, weight in weights[0].items():
        if not name.endswith("qkv.bias"):  # that of keys has no gradient but rounding, and AdamW makes steps of it
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=2e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [result["promise"] for result in results] == ["bitwise", "close"]


def test_graphs_and_accumulation_are_refused_together(stripes: Path, tmp_path: Path) -> None:
    graphs = CompileMode.max_autotune
    (problem,) = find_problems(last_block(stripes, graphs, train__accumulate=2))
    for word in ("train.compile=max-autotune with train.accumulate=2", "train.compile=default", "train.accumulate=1"):
        assert word in problem
    assert not find_problems(last_block(stripes, CompileMode.default, train__accumulate=2))
    conf = last_block(stripes, graphs)  # and where nobody asked for micro-batches, but memory makes them
    conf.data.batch_size, conf.optim.recipe_batch = 0, 128
    assert not find_problems(conf)
    with pytest.raises(ValueError, match=r"batch_size=fit came to 64 images: .*max-autotune with train\.accumulate=2"):
        go(conf, tmp_path / "run")
    assert "epoch" not in (tmp_path / "run" / "run.log").read_text()
