"""What a builder hands over, and what builders share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from finetune.config import HeadKind, ModelConf
from finetune.layers import Layer, LayeredModel
from finetune.preprocess import Preprocess


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to fine-tune.

    Attributes:
        model: In training mode, nothing frozen.
        preprocess: What its weights expect of an image.
        description: The plain line that a run starts with.
        has_zeroshot: Whether the head already classifies, from class names.
    """

    model: LayeredModel
    preprocess: Preprocess
    description: str
    has_zeroshot: bool


@runtime_checkable
class SparesWeightDecay(Protocol):
    """An upstream model that names the parameters it wants no weight decay on."""

    def no_weight_decay(self) -> set[str]:
        """Names relative to the model."""


def spared_names(net: nn.Module) -> frozenset[str]:
    """The names that `net`, or any module in it, spares from weight decay, as `net.named_parameters` gives them."""
    there = {name for name, _ in net.named_parameters()}
    spared = set()
    for path, module in net.named_modules():
        if isinstance(module, SparesWeightDecay):
            spared |= {f"{path}.{name}" if path else name for name in module.no_weight_decay()}
    return frozenset(spared & there)


def layered(net: nn.Module, layers: Sequence[Layer]) -> LayeredModel:
    """A `LayeredModel` that spares what upstream spares."""
    return LayeredModel(net, layers, no_weight_decay=spared_names(net))


def head_kind(conf: ModelConf, *, has_text: bool) -> HeadKind:
    """The head that `auto` stands for.

    Raises:
        ValueError: A zero-shot head without a text tower.
    """
    if conf.head == HeadKind.auto:
        return HeadKind.zeroshot if has_text else HeadKind.random
    if conf.head == HeadKind.zeroshot and not has_text:
        raise ValueError(
            f"model.head=zeroshot needs a text tower, and {conf.name} has none: use model.head=random, or a CLIP (model=clip)"
        )
    return HeadKind(conf.head)


def square(size: Sequence[int] | int, name: str) -> int:
    """Pixels a side.

    Raises:
        ValueError: Height and width differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"{name} takes images of {tuple(sides)} pixels; finetune feeds square images, so set model.image_size"
        )
    return sides.pop()


def saved_preprocess(path: Path) -> Preprocess | None:
    """What a weights file that finetune wrote says of its preprocessing; None for other people's files."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "preprocess" not in metadata:
        return None
    values = json.loads(metadata["preprocess"])
    return Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
