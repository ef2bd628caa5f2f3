"""Upstream models as `LayeredModel`s with a classifier, their preprocessing, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from finetune.config import Family, ModelConf
from finetune.models import from_open_clip, from_timm
from finetune.models.built import BuiltModel

__all__ = ["BuiltModel", "build_model"]

BUILDERS: dict[Family, Callable[..., BuiltModel]] = {
    Family.clip: from_open_clip.build,
    Family.vit: from_timm.build,
}


def build_model(
    conf: ModelConf, classes: Sequence[str], *, load: bool = True, device: torch.device | str = "cpu"
) -> BuiltModel:
    """The model of a run, in training mode, with a classifier for `classes`.

    What is random, the head's first values above all, comes from torch's global generator: seed it first.

    Args:
        conf: Which model, weights and head.
        classes: Class names in the order of the labels.
        load: False leaves the weights and head random and looks for no file: for a checkpoint that follows.
        device: Where to; `meta` builds without memory or weights, for looking at a model.

    Raises:
        ValueError: A name, tag or setting that does not exist or fit; weights of another model.
        FileNotFoundError: Weights that are neither here nor to be fetched.
    """
    target = torch.device(device)
    return BUILDERS[Family(conf.family)](conf, classes, load=load and target.type != "meta", device=target)
