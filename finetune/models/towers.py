"""Which architecture is cut into layers by which function: one line a family.

Families are named, not imported: upstream libraries are slow to import, and few runs need more than one.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from finetune.layers import Layer

# Upstream class -> our module of the same package, whose `layers_of(tower)` gives stem, blocks and readout.
FAMILIES = {
    "open_clip.transformer.VisionTransformer": "clip",
    "clip.model.VisionTransformer": "clip",  # OpenAI's own package
    "timm.models.vision_transformer.VisionTransformer": "vit",
}
# Known by their names only: the forward pass is not what our module runs.
NAMES_ONLY = {"clip.model.VisionTransformer"}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def layers_of(tower: nn.Module) -> list[Layer]:
    """Stem, blocks and readout of an image tower, without its classifier.

    Somebody's subclass of a known class gets its ids, but no slices: its forward pass may be another.

    Raises:
        ValueError: No family knows this class.
    """
    for kind in type(tower).__mro__:
        if _name(kind) in FAMILIES:
            module = importlib.import_module(f"finetune.models.{FAMILIES[_name(kind)]}")
            cut: Callable[[nn.Module], list[Layer]] = module.layers_of
            layers = cut(tower)
            runs = kind is type(tower) and _name(kind) not in NAMES_ONLY
            return layers if runs else [dataclasses.replace(layer, run=None) for layer in layers]
    known = ", ".join(name.rpartition(".")[0].partition(".")[0] + "'s " + name.rpartition(".")[2] for name in FAMILIES)
    raise ValueError(f"{_name(type(tower))} is no image tower that finetune can cut into layers; it knows {known}")


def classifier_names(tower: nn.Module) -> tuple[str, ...]:
    """The names under which a tower keeps its classifier: none in a CLIP, two in a distilled ViT."""
    home = type(tower).__module__.partition(".")[0]
    if home == "open_clip":
        return ()
    if not isinstance(tower, HasPretrainedCfg):
        return ("head",)  # built by its class and not by timm.create_model
    names = tower.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


@runtime_checkable
class HasPretrainedCfg(Protocol):
    """A model that `timm.create_model` made."""

    pretrained_cfg: dict[str, Any]
