"""The first convolution of a network for images of another number of channels than three.

timm's rule: for one channel the weights of all channels are summed, for more they are repeated and scaled, so that
equal channels give the same features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from finetune.models.upstream.layouts import StateDict
from finetune.system.errors import UserError


def set_channels(net: nn.Module, channels: int) -> None:
    """Give `net` a first convolution for `channels` channels, without its weights, in place; 3 changes nothing."""
    if channels == 3:
        return
    name, old = first_convolution(net)
    _check_reads(net, old, 3, channels)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        dilation=old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    net.set_submodule(name, new)


def check_stem(net: nn.Module, channels: int) -> None:
    """Raise a UserError where the weights of `net`, of three channels, cannot have been adapted to `channels`.

    Some networks take an image apart before the first convolution; timm would leave that one with random weights.
    """
    if channels != 3:
        _check_reads(net, first_convolution(net)[1], channels, channels)


def _check_reads(net: nn.Module, stem: nn.Conv2d, wanted: int, channels: int) -> None:
    if stem.in_channels != wanted or stem.groups != 1:
        problem = f"the first convolution of {type(net).__name__} reads {stem.in_channels} channels, and no images"
        raise UserError(f"model.in_channels={channels}: {problem}, so its weights cannot be adapted; leave it at 3")


def first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    """The name and module of the convolution that reads the images; a UserError where a network has none."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise UserError(f"{type(net).__name__} has no convolution that reads the images, so leave model.in_channels at 3")


def fit_stem(state: StateDict, net: nn.Module, start: str = "") -> str:
    """Adapt the first convolution in `state`, in place, to the number of channels of that in `net`.

    The names in `state` begin with `start`. Returns a note for the line about the model; empty where nothing changed.
    """
    from timm.models._manipulate import adapt_input_conv

    found = next(((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d)), None)
    if found is None or f"{start}{found[0]}.weight" not in state:
        return ""
    key, wanted = f"{start}{found[0]}.weight", found[1].weight.shape
    weight = state[key]
    if weight.ndim != 4 or weight.shape[1] == wanted[1] or weight.shape[0] != wanted[0] or found[1].groups != 1:
        return ""
    old = weight.shape[1]
    state[key] = adapt_input_conv(wanted[1], weight, base_chans=old)
    return f"; its stem for {old} channel{'s' * (old != 1)} is adapted to {wanted[1]}"


def has_stem(group: StateDict, net: nn.Module) -> bool:
    """Whether a tensor can be the first convolution of `net`, for any number of channels, maybe flat.

    timm would resample the weights of patches of another size, and the features would be other ones.
    """
    first = next((module.weight.shape for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return True
    area = first[2] * first[3]
    shapes = [tensor.shape for tensor in group.values() if tensor.ndim in (2, 4) and tensor.shape[0] == first[0]]
    return any(shape[2:] == first[2:] if len(shape) == 4 else shape[1] % area == 0 for shape in shapes)


def check_archive_stem(shapes: Mapping[str, Sequence[int]], net: nn.Module, path: Path) -> None:
    """Raise a UserError where no kernel of a JAX archive can be the first convolution of `net`.

    `shapes` are those of its arrays by name; a kernel has (height, width, in, out).
    """
    kernels = {name: [shape[axis] for axis in (3, 2, 0, 1)] for name, shape in shapes.items() if len(shape) == 4}
    if has_stem({name: torch.empty(shape, device="meta") for name, shape in kernels.items()}, net):
        return
    listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in list(kernels.items())[:3]) or "none"
    problem = f"its convolutions are {listed}; the first one here is {tuple(first_convolution(net)[1].weight.shape)}"
    raise UserError(f"{path} holds the weights of another model than the one built here ({problem}); check model.name")
