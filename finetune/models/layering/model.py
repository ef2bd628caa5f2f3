"""A network and its layers as a `LayeredModel`, with what upstream says of weight decay and fixed parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from finetune.core.layers import Layer, LayeredModel


@runtime_checkable
class SparesWeightDecay(Protocol):
    """An upstream module that names its parameters that should get no weight decay."""

    def no_weight_decay(self) -> set[str]:
        """Names relative to the module."""


def spared_names(net: nn.Module) -> frozenset[str]:
    """The parameters that `net`, or a module in it, spares from weight decay, by their names in `net`."""
    existing = {name for name, _ in net.named_parameters()}
    spared = set()
    for path, module in net.named_modules():
        if isinstance(module, SparesWeightDecay):
            spared |= {f"{path}.{name}" if path else name for name in module.no_weight_decay()}
    return frozenset(spared & existing)


def layered(net: nn.Module, layers: Sequence[Layer]) -> LayeredModel:
    """A `LayeredModel` that spares the parameters that upstream spares, and never trains those that upstream fixes."""
    for module in list(net.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                # Fixed sine position embeddings, for example. As a buffer it keeps its name, and `freeze` never makes
                # it learn.
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return LayeredModel(net, layers, no_weight_decay=spared_names(net))
