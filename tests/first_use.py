"""The order in which a forward pass first reads each tensor of a network; on the meta device it costs no memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.core.layers import Layer
from finetune.core.ownership import assign_layers
from finetune.core.weight_decay import EMBEDDINGS

# Names that a later layer reads first, rightly. Tokens and positions enter late in networks with class attention; all
# blocks of a stage share a table; a side branch (a head for each stage, a second head) runs beside the main path.
LATE = re.compile(r"(.*\.)?(" + "|".join(EMBEDDINGS) + r")$|(.*\.)?(rope|shared_rel_pos|rel_pos_bias|crpe\d)\.")
SIDE = {
    "EfficientViM": r"norm\.",
    "EfficientViMDistilled": r"norm\.",
    "LevitDistilled": r"head_dist\.",
    "RepVit": r"head\.head_dist\.",
    "IFormer": r"head\.head_dist\.",
}


class FirstUse(TorchDispatchMode):
    """While active, adds each parameter and buffer of `net` to `names` when an operation first reads it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        # Holds the tensors, since another tensor could get the id of a freed one.
        self.tensors = [*net.named_parameters(), *net.named_buffers()]
        self.by_id = {id(tensor): name for name, tensor in self.tensors}
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and id(value) in self.by_id:
                self.names.setdefault(self.by_id[id(value)])
        return func(*args, **(kwargs or {}))


def first_use(net: nn.Module, images: Tensor) -> list[str]:
    """Names of parameters and buffers in the order in which a forward pass in eval mode first reads them."""
    with torch.no_grad(), FirstUse(net.eval()) as seen:
        net(images)
    return list(seen.names)


def out_of_order(net: nn.Module, ids: Mapping[str, int], images: Tensor) -> list[str]:
    """Names that the forward pass first reads after a name of a higher layer, without the known cases."""
    side = SIDE.get(type(net).__name__, r"(?!)")
    late, highest = [], -1
    for name in first_use(net, images):
        if LATE.match(name.removeprefix("trunk.")) or re.match(side, name):
            continue
        if ids[name] < highest:
            late.append(f"{name} (layer {ids[name]} after {highest})")
        highest = max(highest, ids[name])
    return late


def check_layers(net: nn.Module, layers: list[Layer]) -> dict[str, int]:
    """Check the laws of layers that hold for every architecture; return the layer ids."""
    ids = assign_layers(net, layers)  # every tensor and leaf module has exactly one owner
    names = [layer.name for layer in layers]
    tail = ["readout"] if names[-1] == "readout" else ["readout", "head"]
    blocks = len(names) - 1 - len(tail)
    assert names == ["stem", *(f"block.{number + 1}" for number in range(blocks)), *tail]
    assert blocks > 0
    held = {ids[name] for name, _ in net.named_parameters()}
    # Every layer has parameters, except a readout that only pools.
    assert set(range(len(layers))) - held <= {blocks + 1}
    return ids


@contextmanager
def torchvision_on_meta() -> Iterator[None]:
    """Build torchvision's models on the meta device, except the tensors from which RegNet reads its widths."""
    from torchvision.models.regnet import BlockParams

    original = BlockParams.__dict__["from_init_params"]

    def on_cpu(cls: type, *args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return original.__func__(cls, *args, **kwargs)

    BlockParams.from_init_params = classmethod(on_cpu)  # type: ignore[method-assign,assignment]
    try:
        with torch.device("meta"):
            yield
    finally:
        BlockParams.from_init_params = original  # type: ignore[method-assign]
