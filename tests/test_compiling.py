"""A compiled step is the same step but for rounding, and a short last batch compiles nothing anew."""

from __future__ import annotations

import shutil

import pytest
import torch
from small import small_images, small_model

from finetune.claim import Holding
from finetune.compiling import compiled
from finetune.config import CompileMode, Conf, TrainConf
from finetune.layers import freeze
from finetune.resume import first_promise

CPU = torch.device("cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
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


def test_none_is_none_and_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("vit")
    assert compiled(model, CompileMode.none, batch_size=4, device=CPU) is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, .* use train\.compile=none"):
        compiled(model, CompileMode.default, batch_size=4, device=CPU)


def test_the_promise_is_weaker() -> None:
    conf = Conf(train=TrainConf(compile=CompileMode.default))
    assert first_promise(conf, CPU, Holding()).kind == "close"
    assert first_promise(Conf(), CPU, Holding()).kind == "bitwise"
