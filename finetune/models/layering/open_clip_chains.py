"""open_clip's other image towers one layer at a time: ModifiedResNet, and timm trunks in open_clip's wrapper.

Its own VisionTransformer stands in `clip`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from finetune.core.layers import Layer
from finetune.models.layering.placing import Rule

Run = Callable[[Any, Tensor], Tensor]

MODIFIED_RESNET = Rule(
    matcher={"stem": r"(?:conv|bn|act)[123](?:\.|$)|avgpool", "blocks": r"layer(\d+)\.(\d+)"},
    # Attention over positions, their embedding and the projection: CLIP's ResNet has no norm or proj apart from them.
    readout=r"attnpool",
)


def modified_resnet_runs(net: Any) -> list[Run]:
    """The functions of stem, blocks and readout of an open_clip ModifiedResNet."""
    blocks = [
        partial(_resnet_block, stage=stage, index=index)
        for stage, part in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1)
        for index in range(len(part))
    ]
    return [_resnet_stem, *blocks, _resnet_readout]


def _resnet_stem(net: Any, h: Tensor) -> Tensor:
    out: Tensor = net.stem(h)
    return out


def _resnet_block(net: Any, h: Tensor, *, stage: int, index: int) -> Tensor:
    part = {1: net.layer1, 2: net.layer2, 3: net.layer3, 4: net.layer4}[stage]
    out: Tensor = part[index](h)
    return out


def _resnet_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.attnpool(h)
    return features


def timm_tower_runs(trunk: Sequence[Layer]) -> list[Run] | None:
    """The functions of a TimmModel's stem, blocks and readout; None where its trunk is no chain.

    Args:
        trunk: The layers of `visual.trunk`, with a head where the trunk itself projects.
    """
    bare = [layer.run for layer in trunk if layer.run is not None]
    if len(bare) != len(trunk):
        return None
    end = [layer.name for layer in trunk].index("readout")
    inner = [partial(_run_trunk, run=run) for run in bare[:end]]
    return [*inner, partial(_run_timm_readout, parts=tuple(bare[end:]))]


def inside_trunk(run: Run | None) -> Run | None:
    """A function of a timm trunk as one of the TimmModel around it."""
    return None if run is None else partial(_run_trunk, run=run)


def _run_trunk(net: Any, h: Tensor, *, run: Run) -> Tensor:
    return run(net.trunk, h)


def _run_timm_readout(net: Any, h: Tensor, *, parts: tuple[Run, ...]) -> Tensor:
    for run in parts:
        h = run(net.trunk, h)
    features: Tensor = net.head(h)
    return features
