"""What `precision` comes to on GPUs, which torch only pretends to have here, and which kernels it allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from finetune.app.description import forward_precision
from finetune.config import Conf, Precision
from finetune.core.device import computed_in, pick_precision, set_deterministic, set_kernels

CUDA = torch.device("cuda")


@pytest.fixture(params=[(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)], ids=["T4", "A100", "H100"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A GPU of some compute capability, as torch would ask it; what `auto` is on it."""
    major, expected = request.param
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # by emulation
    return expected  # type: ignore[no-any-return]


def test_auto_takes_bfloat16_where_the_gpu_has_it_and_not_where_it_is_emulated(gpu: torch.dtype) -> None:
    assert torch.cuda.is_bf16_supported()
    assert pick_precision(Precision.auto, CUDA, is_wide=False) == gpu
    assert pick_precision(Precision.bf16, CUDA, is_wide=False) == torch.bfloat16
    assert pick_precision(Precision.tf32, CUDA, is_wide=False) == torch.float32
    assert forward_precision(Conf(device="cuda:3"), cuda=True, is_wide=False)[0] == torch.bfloat16  # another machine's
    dtype, words = forward_precision(Conf(), cuda=True, is_wide=False)
    assert dtype == gpu and words.startswith("bf16" if gpu == torch.bfloat16 else "fp32")


@pytest.fixture
def kernels() -> Iterator[None]:
    """Torch's switches, put back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fastpath = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
    torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.mark.usefixtures("kernels")
def test_tf32_is_on_where_it_is_asked_for_and_off_again_in_the_next_run() -> None:
    for word, is_tf32 in ((Precision.tf32, True), (Precision.fp32, False), (Precision.tf32, True)):
        set_kernels(word, torch.float32)
        assert torch.backends.cuda.matmul.allow_tf32 is is_tf32
        assert torch.backends.cudnn.allow_tf32 is is_tf32
        assert torch.backends.mha.get_fastpath_enabled()
    set_kernels(Precision.auto, torch.bfloat16)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.mha.get_fastpath_enabled()


def test_deterministic_kernels_are_off_again_in_the_next_run() -> None:
    try:
        for wanted in (True, False):
            set_deterministic(wanted)
            assert torch.are_deterministic_algorithms_enabled() is wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_it_came_to_in_a_word() -> None:
    assert computed_in(Precision.tf32, torch.float32) == "tf32"
    assert computed_in(Precision.auto, torch.float32) == computed_in(Precision.fp32, torch.float32) == "float32"
    assert computed_in(Precision.auto, torch.bfloat16) == "bfloat16"
    assert computed_in(Precision.fp16, torch.float16) == "float16"
