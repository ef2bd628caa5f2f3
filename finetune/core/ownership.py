"""Which layer owns each parameter, buffer and module of a network: every name belongs to exactly one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from finetune.system.errors import UserError

if TYPE_CHECKING:
    from finetune.core.layers import Layer


def assign_layers(net: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """The layer id of every parameter and buffer of `net`, by its name.

    Raises:
        UserError: No layer owns a name, two layers own it, or a layer owns a name that the network lacks.
    """
    owner: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name in layer.owns:
            if name in owner:
                raise UserError(f"{name} belongs to two layers: {layers[owner[name]].name} and {layer.name}")
            owner[name] = index

    def find(name: str) -> int:
        parts = name.split(".")
        found = {owner[p] for end in range(1, len(parts) + 1) if (p := ".".join(parts[:end])) in owner}
        if len(found) != 1:
            names = " and ".join(layers[index].name for index in sorted(found)) or "no layer"
            raise UserError(f"{type(net).__name__}: {name} belongs to {names}; every name must belong to exactly one")
        return found.pop()

    tensors = [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]
    modules = dict(net.named_modules())
    for name in sorted(owner.keys() - {*tensors, *modules}):
        raise UserError(f"layer {layers[owner[name]].name} owns {name}, which {type(net).__name__} lacks")
    for name, module in modules.items():
        if name and not any(True for _ in module.children()):
            find(name)  # a dropout module that no layer owns would stay active in the frozen layers
    return {name: find(name) for name in tensors}
