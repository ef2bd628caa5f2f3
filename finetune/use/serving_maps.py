"""Where a network looked: a map of how much each place of an image spoke for the class that won."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.device import autocast
from finetune.core.layers import LayeredModel

MOST_PREFIX_TOKENS = 16  # class token, distillation token and registers stand ahead of the patches' tokens


def heat_maps(model: LayeredModel, inputs: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where the network looked, float32 (batch, rows, columns) in [0, 1] on the host; None where it gives no map.

    `inputs` are normalised images (batch, channels, size, size). The map is the gradient of the winning logit times the
    activations, summed over the channels, where that is positive: HiResCAM (Draelos and Carin, arXiv:2011.08891). It is
    taken of the last map of a network of convolutions, and of a transformer's tokens ahead of its last block: behind
    that block only the class token may have a gradient. The largest value of each image is 1, or all are 0.
    """
    with torch.inference_mode(False), torch.enable_grad(), autocast(dtype, inputs.device):
        inputs = inputs.clone()  # of a tensor of inference mode no gradient may be taken
        found = _of_chain(model, inputs) if model.is_chain else _of_whole(model, inputs)
        if found is None:
            return None
        activations, logits = found
        won = logits.float().max(dim=1).values.sum()
        (gradient,) = torch.autograd.grad(won, activations, materialize_grads=True)  # zeros where nothing depends on it
    return _as_map(gradient.float() * activations.detach().float(), _patches_a_side(model.net, inputs.shape[-1]))


def _of_chain(model: LayeredModel, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """The activations that the map is made of, and the logits that follow from them."""
    last = model.num_blocks
    with torch.no_grad():
        h = model(inputs, stop=last)
        if h.ndim == 4:
            h, last = model(h, start=last, stop=last + 1), last + 1
    h = h.detach().requires_grad_()
    return (h, model(h, start=last)) if h.ndim in (3, 4) else None


def _of_whole(model: LayeredModel, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `_of_chain`, for a network that runs only whole: hooks find what the last block reads and gives."""
    modules = dict(model.net.named_modules())
    blocks = [modules[name] for name in model.layers[model.num_blocks].owns if name in modules]
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3:
            seen.append(args[0].detach().requires_grad_())
            return (seen[-1], *args[1:])
        return None

    def behind(_: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not seen and isinstance(output, Tensor) and output.ndim == 4:
            seen.append(output.detach().requires_grad_())
            return seen[-1]
        return None

    handles = [block.register_forward_pre_hook(before) for block in blocks[-1:]]
    handles += [block.register_forward_hook(behind) for block in blocks[-1:]]
    try:
        logits = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (seen[0], logits) if seen else None


def _patches_a_side(net: nn.Module, size: int) -> int:
    """How many patches a network cuts a side of `size` pixels into; 0 where no convolution without overlap does it."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            kernel = int(module.kernel_size[0])
            return size // kernel if module.kernel_size == module.stride else 0
    return 0


def _as_map(weights: Tensor, patches: int) -> Tensor | None:
    """The sum over the channels as a square for each image, scaled to [0, 1]; None where the places are no square."""
    if weights.ndim == 3:
        places = weights.sum(dim=2)
        prefix = places.shape[1] - patches**2
        if not patches or not 0 <= prefix <= MOST_PREFIX_TOKENS:
            return None
        square = places[:, prefix:].reshape(-1, patches, patches)
    elif weights.shape[2] == weights.shape[3]:
        square = weights.sum(dim=1)
    elif weights.shape[1] == weights.shape[2]:  # channels last, as in Swin
        square = weights.sum(dim=3)
    else:
        return None
    square = square.clamp(min=0)
    return (square / square.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).nan_to_num(0).cpu()
