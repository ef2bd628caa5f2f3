"""The memory in bytes and the work in FLOPs that training a model takes, measured before there is any training.

The model's own forward and backward pass and the optimizer's own step run on tensors that have shapes and no values.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from finetune.config import OptimConf
from finetune.core.layers import LayeredModel
from finetune.core.optim import build_optimizer

FP32_BYTES = 4


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one image; a multiplication and an addition are two."""

    forward: float  # in the forward pass
    training: float  # in forward and backward pass; frozen layers have no backward pass
    frozen: float  # in the forward pass through the layers below `model.boundary`, whose activations can be cached


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors that exist at the end of a forward pass."""

    weights: int  # parameters and buffers
    gradients: int  # of the parameters that learn, fp32
    optimizer: int  # the optimizer's state between two steps
    average: int  # the moving average of the weights; 0 without one
    # What the forward pass of one micro-batch saves for the backward pass: activations, and copies of weights in a
    # lower precision.
    activations: int

    @property
    def total(self) -> int:
        """The sum. A GPU needs some GiB more for its context, workspaces and gaps between tensors."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def count_flops(model: LayeredModel, image_size: int) -> Flops:
    """Count the work on one image of `image_size` pixels a side; put `model` on the meta device and freeze it before.

    `torch.utils.flop_counter` counts matrix products, convolutions and attention. Operations element by element (norms,
    activation functions) are below a percent and not counted. Work that `train.recompute` repeats is counted twice.
    """
    images = torch.empty(2, model.channels, image_size, image_size, device="meta")  # BatchNorm refuses a batch of one
    model.train()
    with FlopCounterMode(display=False) as counter:
        h = model(images, stop=model.boundary) if model.boundary else images
        frozen = counter.get_total_flops()
        logits = model(h, start=model.boundary)
        forward = counter.get_total_flops()
        logits.sum().backward()
        both = counter.get_total_flops()
    model.zero_grad()
    return Flops(forward / len(images), both / len(images), frozen / len(images))


def estimate_memory(
    model: LayeredModel,
    image_size: int,
    *,
    batch_size: int,
    dtype: torch.dtype,
    averaged: bool = False,
    optim: OptimConf | None = None,
) -> Memory:
    """Add up the memory that training a model takes; put `model` on the meta device and freeze it before.

    The forward pass computes in `dtype` on micro-batches of `batch_size` images of `image_size` pixels a side. A run
    that is `averaged` has a moving average of the weights. Without `optim` the optimizer is AdamW.
    """
    learning = FP32_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = (batch_size, model.channels, image_size, image_size)
    activations = _saved_bytes(model, shape, dtype)
    if model.recompute:
        # While the backward pass computes one layer again, that layer's activations join the inputs of all others.
        plain = copy.copy(model)  # shallow: the same network, run without gradient checkpointing
        plain.recompute = False
        whole = _saved_bytes(plain, shape, dtype)
        activations += max(0, whole - activations) // max(1, len(model.layers) - model.num_frozen)
    return Memory(
        weights=sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
        gradients=learning,
        optimizer=optimizer_bytes(model, optim or OptimConf()),
        average=learning if averaged else 0,
        activations=activations,
    )


def optimizer_bytes(model: LayeredModel, conf: OptimConf) -> int:
    """Bytes of the optimizer's state between two steps, without step counters; `model` is on the meta device."""
    if conf.name == "adamw8bit":  # bitsandbytes has no step on the meta device
        return sum(_adamw8bit_bytes(p.numel()) for p in model.parameters() if p.requires_grad)
    optimizer = build_optimizer(model, conf)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with _ItemsAreHalf():  # type: ignore[no-untyped-call]
        optimizer.step()
    model.zero_grad()
    states = optimizer.state.values()
    tensors = [t for state in states for name, t in state.items() if isinstance(t, Tensor) and name != "step"]
    return sum(t.numel() * t.element_size() for t in tensors)


class _ItemsAreHalf(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers 0.5 where an optimizer reads a number from a tensor, which on the meta device has none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0.5 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _adamw8bit_bytes(size: int) -> int:
    """Both moments of a tensor of `size` numbers in bitsandbytes: 8-bit ones, 256 with an fp32 scale, or small fp32."""
    return 2 * (FP32_BYTES * size if size < 4096 else size + FP32_BYTES * -(-size // 256))


def _saved_bytes(model: LayeredModel, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes of the storages that one forward pass saves for the backward pass, each counted once."""
    # Fake tensors on a CPU and not on the meta device: there torch takes its plain attention, which saves a matrix
    # (tokens, tokens) for each head, and on a CPU the fused one, which saves none, as on a GPU.
    saved: dict[int, Tensor] = {}
    with FakeTensorMode():
        fakes: dict[str, Tensor] = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        for name, p in model.named_parameters():
            fakes[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        own = {tensor.untyped_storage()._cdata for tensor in fakes.values()}

        def save(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor  # it stays alive here: no other storage gets its address
            return tensor

        model.train()
        context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=torch.bfloat16)
        with context, saved_tensors_hooks(save, lambda tensor: tensor):
            logits = torch.func.functional_call(model, fakes, (torch.empty(shape),))
        total = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
    del logits
    return total
