"""torchvision's classification models, with their weights or a file's, and our classifier in the place of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from finetune.config import HeadKind, ModelConf
from finetune.core.preprocess import Preprocess
from finetune.models.layering.torchvision_chains import RULES
from finetune.models.layering.towers import torchvision_layers
from finetune.models.upstream import weights
from finetune.models.upstream.built import (
    BuiltModel,
    check_patches,
    head_kind,
    keep_head,
    layered,
    path_of,
    put_head,
    read_saved,
    unknown_tag,
)
from finetune.models.upstream.undrawn import Undrawn
from finetune.system.errors import UserError

# Classifiers half-way up, which help training from scratch and turn the output into a tuple.
AUXILIARY = ("aux1", "aux2", "AuxLogits")
# MaxViT's last stage has 1/32 of the resolution, cut into windows of 7 x 7.
MAXVIT_GRID = 32 * 7


def names() -> list[str]:
    """All of torchvision's classification models."""
    from torchvision import models

    found: list[str] = models.list_models(module=models)
    return found


def build(conf: ModelConf, classes: Sequence[str], *, load: bool, device: torch.device) -> BuiltModel:
    """A torchvision model with a classifier of ours.

    Args:
        conf: Which model, weights and head.
        classes: Class names in the order of the labels.
        load: Whether to read the weights; else they, and the head, stay random.
        device: Where the model ends up; `meta` gives shapes only.

    Raises:
        ValueError: A setting that does not fit this model, or weights that do not.
        FileNotFoundError: Weights that are nowhere to be found.
    """
    from torchvision.models import get_model_weights

    if conf.drop_path:
        raise UserError(
            f"model.drop_path={conf.drop_path} would be ignored: torchvision's {conf.name} sets its own; use timm's"
        )
    kind = head_kind(conf, has_text=False)
    options = get_model_weights(conf.name)
    tags = [*(member.name for member in options), "DEFAULT"]
    path = None
    if conf.pretrained not in (*tags, "none"):
        if not weights.is_path(conf.pretrained):
            raise UserError(unknown_tag(conf, conf.pretrained, tags))
        path = path_of(conf.pretrained) if load else None
    chosen = options[conf.pretrained] if conf.pretrained in tags else None
    with torch.device("meta" if device.type == "meta" else "cpu"), _RealNumbers():
        net = _construct(conf, chosen, path, load=load)
        name = _classifier_name(net)
        saved = read_saved(path)
        if kind == HeadKind.keep and load:
            known = saved.classes if chosen is None else None  # torchvision's are ImageNet's in words, not folder names
            keep_head(net, name, classes, dropout=conf.head_dropout, known=known)
        else:
            put_head(net, name, len(classes), dropout=conf.head_dropout)
    _drop_auxiliary(net)
    model = layered(net, torchvision_layers(net)).to(device)
    preprocess = saved.preprocess or _preprocess(chosen or options["DEFAULT"])
    preprocess = dataclasses.replace(preprocess, size=conf.image_size or preprocess.size)
    label = path or (chosen.name if chosen else "random")
    text = f"{conf.name}: a model of torchvision, weights {label}, images of {preprocess.size} pixels a side"
    return BuiltModel(model.train(), preprocess, text, has_zeroshot=False)


class _RealNumbers(TorchFunctionMode):
    """Tensors made of known numbers are real on the meta device too: RegNet computes its widths with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _construct(conf: ModelConf, chosen: Any, path: Path | None, *, load: bool) -> nn.Module:
    """The network with its weights and its own classifier."""
    from torchvision.models import MaxVit, VisionTransformer, get_model
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = weights.read_state_dict(path) if load and path is not None else None
    if load and chosen is not None:
        with weights.downloads(f"weights {chosen.name} of {conf.name}", url=chosen.url):
            state = dict(chosen.get_state_dict(progress=True, check_hash=True))
    args: dict[str, Any] = {}
    if conf.name in ("inception_v3", "googlenet"):
        args["init_weights"] = False  # seconds of work, all of it overwritten or, without weights, torch's own will do
    if conf.name in ("inception_v3", "googlenet") and chosen is not None:
        args["transform_input"] = True  # their weights were trained on another normalisation
    with torch.device("meta"), _RealNumbers():
        probe = get_model(conf.name, **args)
    if state is None:
        num_classes = None
    else:
        weight = state.get(f"{_classifier_name(probe)}.weight")
        num_classes = None if weight is None else len(weight)
    if isinstance(probe, VisionTransformer):
        size = conf.image_size or (chosen.meta["min_size"][0] if chosen else probe.image_size)
        check_patches(size, probe.patch_size)
        args["image_size"] = size
        # A file of another model has no such table, or a flat one: the strict load below says so, with the names.
        if state is not None and state.get("encoder.pos_embedding", torch.empty(0)).ndim == 3:
            state = dict(interpolate_embeddings(size, probe.patch_size, state))
    if isinstance(probe, MaxVit) and conf.image_size:
        if conf.image_size % MAXVIT_GRID:
            raise UserError(f"model.image_size={conf.image_size}: {conf.name} takes multiples of {MAXVIT_GRID} pixels")
        args["input_size"] = (conf.image_size, conf.image_size)
    args |= {"num_classes": num_classes} if num_classes else {}
    # Where the file has a classifier of its own, it replaces every value.
    with Undrawn() if num_classes else contextlib.nullcontext():
        net: nn.Module = get_model(conf.name, **args)
    if state is not None:
        head = _classifier_name(net) + "."
        weights.load_strictly(
            net, state, source=str(path or chosen.name), optional=(head,) if num_classes is None else ()
        )
    return net


def _classifier_name(net: nn.Module) -> str:
    """The layer that gives the logits."""
    rule = RULES[type(net).__name__]
    modules: dict[str, nn.Module] = dict(net.named_modules())
    (name,) = (
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.fullmatch(rule.head, name)
    )
    return name


def _drop_auxiliary(net: nn.Module) -> None:
    """GoogLeNet and Inception: with one output, in training too."""
    if type(net).__name__ in ("GoogLeNet", "Inception3"):
        for name in AUXILIARY:
            if name in dict(net.named_children()):
                setattr(net, name, None)
        net.aux_logits = False  # type: ignore[assignment]


def _preprocess(chosen: Any) -> Preprocess:
    transform = chosen.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    interpolation = transform.interpolation.value
    return Preprocess(
        crop,
        tuple(transform.mean),
        tuple(transform.std),
        interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        "crop",
        crop / resize,
    )
