"""Upstream models as `LayeredModel`s with a classifier, their preprocessing, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from finetune.config import Family, Library, ModelConf, Pool
from finetune.core.layers import LayeredModel
from finetune.models.upstream import from_open_clip, from_timm, from_torchvision, glyphs
from finetune.models.upstream.built import BuiltModel
from finetune.system.errors import UserError

__all__ = ["BuiltModel", "build_model"]

BUILDERS: dict[Library, Callable[..., BuiltModel]] = {
    Library.open_clip: from_open_clip.build,
    Library.timm: from_timm.build,
    Library.torchvision: from_torchvision.build,
}


def build_model(
    conf: ModelConf, classes: Sequence[str], *, load: bool = True, device: torch.device | str = "cpu"
) -> BuiltModel:
    """The model of a run, in training mode, with a classifier for `classes`.

    What is random, the head's first values above all, comes from torch's global generator: seed it first. A head of
    `linear_probe` starts at random too; fit it with `finetune.models.heads.probe`.

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
    library = library_of(conf)
    if library == Library.torchvision and conf.pool != Pool.auto:
        raise UserError(f"model.pool={conf.pool} would be ignored: {conf.name} is a model of torchvision; leave it out")
    built = BUILDERS[library](conf, classes, load=load and target.type != "meta", device=target)
    if conf.head_scale != 1:
        scale_head(built.model, conf.head_scale)
    return built


@torch.no_grad()
def scale_head(model: LayeredModel, factor: float) -> None:
    """Multiply the classifier's first values, as MAE and BEiT do (`init_scale`), so it starts close to indifferent."""
    for name, parameter in model.net.named_parameters():
        if model.layer_ids[name] == len(model.layers) - 1:
            parameter.mul_(factor)


def library_of(conf: ModelConf) -> Library:
    """The library whose model `conf.name` is.

    Raises:
        ValueError: Several know the name and `model.library` does not say which, or it contradicts the family.
    """
    library, family = Library(conf.library), Family(conf.family)
    fits = {Family.clip: (Library.open_clip,), Family.vit: (Library.timm, Library.torchvision)}[family]
    if library != Library.auto and library not in fits:
        raise UserError(
            f"model.library={library} does not go with model={family}: expected {' or '.join(fits)},"
            f" or model={'clip' if library == Library.open_clip else 'vit'}"
        )
    if family == Family.clip or conf.name == glyphs.VIT or conf.name.startswith((*from_timm.HUB, from_timm.FOLDER)):
        return fits[0]
    import timm

    known = [
        each
        for each, knows in (
            (Library.timm, timm.is_model(conf.name.partition(".")[0])),
            (Library.torchvision, conf.name in from_torchvision.names()),
        )
        if knows
    ]
    if library == Library.auto and len(known) == 2:
        raise UserError(
            f"model.name={conf.name} is known to timm and to torchvision: say model.library=timm or torchvision"
        )
    if library != Library.auto and known and library not in known:
        raise UserError(
            f"model.name={conf.name}: {library} knows no such model, {known[0]} does: leave model.library out"
        )
    return known[0] if library == Library.auto and known else library if library != Library.auto else Library.timm
