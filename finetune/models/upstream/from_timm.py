"""timm's models: where their weights come from, and our classifier in the place of theirs."""

from __future__ import annotations

import copy
import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from finetune.config import HeadKind, ModelConf, Pool, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.heads.head import Head
from finetune.models.heads.pooling import mean_pool_timm
from finetune.models.layering.clip import ClipClassifier, classifier_layers
from finetune.models.layering.towers import classifier_names, timm_layers
from finetune.models.upstream import glyphs, weights
from finetune.models.upstream.built import (
    BuiltModel,
    Saved,
    check_patches,
    head_kind,
    keep_head,
    layered,
    path_of,
    put_head,
    read_saved,
    square,
    unknown_tag,
)
from finetune.models.upstream.undrawn import built_from_weights
from finetune.system.errors import UserError

RESIZE = {"center": "crop", "border": "pad", "squash": "squash"}
BUNDLED_RESIZE = {"shortest": "crop", "longest": "pad", "squash": "squash"}
HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"


@dataclasses.dataclass(frozen=True)
class Upstream:
    """A timm network with its weights and its own classifier.

    Attributes:
        net: The network.
        preprocess: What its weights expect of an image.
        description: The plain line that a run starts with.
        classes: The class names that the weights were trained with, where they say them.
    """

    net: nn.Module
    preprocess: Preprocess
    description: str
    classes: Sequence[str] | None = None


def build(conf: ModelConf, classes: Sequence[str], *, load: bool, device: torch.device) -> BuiltModel:
    """A timm model with a classifier of ours.

    Args:
        conf: Which model, weights and head.
        classes: Class names in the order of the labels.
        load: Whether to read the weights; else they, and the head, stay random.
        device: Where the model ends up; `meta` gives shapes only.

    Raises:
        ValueError: A setting that does not fit this model, or weights that do not.
        FileNotFoundError: Weights that are nowhere to be found.
    """
    kind = head_kind(conf, has_text=False)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        found = _bundled(conf, load=load) if conf.name == glyphs.VIT else _from_registry(conf, load=load)
        net = found.net
        if conf.pool == Pool.mean:
            mean_pool_timm(net, conf.name)
        if kind == HeadKind.keep and load:
            names = classifier_names(net)
            if len(names) != 1:
                raise UserError(
                    f"model.head=keep: {conf.name} has {len(names)} classifiers, not one; use model.head=random"
                )
            keep_head(net, names[0], classes, dropout=conf.head_dropout, known=found.classes)
        elif isinstance(net, Classifies):
            net.reset_classifier(len(classes))
            for name in classifier_names(net):
                put_head(net, name, len(classes), dropout=conf.head_dropout)
        else:
            # An encoder of a language model: the mean of what it tells that model is classified.
            net = ClipClassifier(net, Head(_width(net, found), len(classes), dropout=conf.head_dropout))
    encoder = net.visual if isinstance(net, ClipClassifier) else None
    layers = timm_layers(net) if encoder is None else classifier_layers(timm_layers(encoder))
    model = layered(net, layers).to(device)
    return BuiltModel(model.train(), found.preprocess, found.description, has_zeroshot=False)


@runtime_checkable
class Classifies(Protocol):
    """A timm network that can be given another number of classes."""

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in the place of the old one."""


@torch.no_grad()
def _width(encoder: nn.Module, found: Upstream) -> int:
    """How many numbers an encoder says of each place: what it calls its width is not always that, so an image asks."""
    size = found.preprocess.size
    out: Tensor = copy.deepcopy(encoder).to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return out.shape[1] if out.ndim == 4 else out.shape[-1]


def _bundled(conf: ModelConf, *, load: bool) -> Upstream:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if conf.pretrained not in ("bundled", "none") and not weights.is_path(conf.pretrained):
        raise UserError(
            f"model.pretrained={conf.pretrained}: {glyphs.VIT} has the weights bundled, none (random), or a file's;"
            " for a timm model say its name too, such as model.name=vit_base_patch16_224 model.pretrained=augreg_in21k"
        )
    bundle = glyphs.read_bundle(glyphs.VIT)
    args = dict(bundle.config["args"])
    if conf.image_size:
        check_patches(conf.image_size, args["patch_size"])
        args["img_size"] = conf.image_size
    files = {"bundled": bundle.weights, "none": None}
    path = files[conf.pretrained] if conf.pretrained in files else path_of(conf.pretrained) if load else None
    state = weights.read_state_dict(path) if load and path is not None else {}
    if "head.weight" in state:
        args["num_classes"] = len(state["head.weight"])
    net = VisionTransformer(**args, drop_path_rate=conf.drop_path)
    if state:
        weights.load_strictly(net, checkpoint_filter_fn(state, net), source=str(path), optional=("head.",))
    saved = Saved(None, list(bundle.config["classes"])) if conf.pretrained == "bundled" else read_saved(path)
    cfg = bundle.config["preprocess_cfg"]
    preprocess = saved.preprocess or Preprocess(
        args["img_size"],
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cfg["interpolation"],
        BUNDLED_RESIZE[cfg["resize_mode"]],
    )
    preprocess = dataclasses.replace(preprocess, size=square(args["img_size"], conf.name))
    text = f"{glyphs.VIT}: the architecture of the bundled ViT, weights {path or 'random'}"
    return Upstream(net, preprocess, glyphs.DESCRIPTIONS[glyphs.VIT] if path == bundle.weights else text, saved.classes)


def _from_registry(conf: ModelConf, *, load: bool) -> Upstream:
    """A model of timm's registry, of a hub or of a folder."""
    import timm
    from timm.layers.patch_embed import PatchEmbed

    name, path = locate(conf, load=load)
    wants_weights = load and conf.pretrained != "none"
    source = str(path) if path else name if wants_weights else "random"
    args: dict[str, Any] = {"drop_path_rate": conf.drop_path} if conf.drop_path else {}
    if conf.image_size:
        args |= _size_args(name, conf.image_size)
    settings = ", ".join(args)
    if wants_weights and path is not None:
        args |= _file_args(name, path)
    fetches = path is None and (wants_weights or name.startswith("hf-hub:"))
    try:
        with weights.downloads(f"weights of {source}") if fetches else weights.quiet_upstream():
            create = partial(timm.create_model, name, pretrained=wants_weights, **args)
            net = built_from_weights(create) if wants_weights else create()
    except TypeError as error:
        raise UserError(f"model.name={conf.name} does not take {settings} ({error}); leave it out") from error
    except (RuntimeError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} does not fit model.name={conf.name}: {weights.misfit_of(error)}") from error
    for module in net.children():
        if isinstance(module, PatchEmbed) and conf.image_size:
            check_patches(conf.image_size, module.patch_size[0])
    saved = read_saved(path)
    preprocess = _preprocess(net, conf)
    if saved.preprocess is not None:
        preprocess = dataclasses.replace(saved.preprocess, size=preprocess.size)
    text = f"{conf.name}: a model of timm, weights {source}, images of {preprocess.size} pixels a side"
    return Upstream(net, preprocess, text + _normalisation_note(preprocess, path, saved), saved.classes)


def _normalisation_note(preprocess: Preprocess, path: Path | None, saved: Saved) -> str:
    """A foreign file says nothing of its preprocessing: tell what is assumed."""
    if path is None or saved.preprocess is not None:
        return ""
    mean = ", ".join(f"{value:g}" for value in preprocess.mean)
    return f"; the file does not say its preprocessing, so that of the architecture's own weights is used (mean {mean})"


def locate(conf: ModelConf, *, load: bool) -> tuple[str, Path | None]:
    """The model as timm names it, with the tag of its weights where there is one, and the file where one is named.

    Raises:
        ValueError: A name or tag that timm does not know; says which it does.
        FileNotFoundError: No such file.
    """
    import timm

    if conf.name.startswith((*HUB, FOLDER)):
        if conf.pretrained not in ("bundled", "none"):
            raise UserError(
                f"model.pretrained={conf.pretrained} would be ignored: model.name={conf.name} brings its own weights;"
                " leave it out, or use none"
            )
        return conf.name.replace("hf_hub:", "hf-hub:"), None
    name, _, tag = conf.name.partition(".")
    if not timm.is_model(name):
        raise UserError(_unknown_name(conf.name))
    tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(unknown_tag(dataclasses.replace(conf, name=name), tag, tags))
    wanted = tag if conf.pretrained == "bundled" and tag else conf.pretrained
    if wanted == "none":
        return conf.name, None
    if wanted not in tags and weights.is_path(wanted):
        return conf.name, path_of(wanted) if load else None
    if tag not in ("", wanted):
        raise UserError(f"model.name={conf.name} and model.pretrained={wanted} name different weights: leave one out")
    if wanted.startswith(HUB):
        raise UserError(f"model.pretrained={wanted}: for timm a hub id is the name itself: model.name={wanted}")
    if wanted not in tags:
        raise UserError(unknown_tag(conf, wanted, tags))
    return f"{name}.{wanted}", None


def _unknown_name(name: str) -> str:
    import open_clip
    import timm

    if name == glyphs.CLIP or open_clip.get_model_config(name.replace("/", "-")) is not None:
        return f"model.name={name} is a CLIP: use model=clip model.name={name}"
    names = timm.list_models()
    return (
        f"model.name={name}: neither timm nor torchvision knows such a model{nearest(name, [*names, glyphs.VIT])};"
        f" timm knows {len(names)}, which timm.list_models('vit*') and the like list"
    )


def _size_args(name: str, image_size: int) -> dict[str, Any]:
    """What makes timm build for this image size; networks without position embeddings take any."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if config is None or config.fixed_input_size else {}


def _file_args(name: str, path: Path) -> dict[str, Any]:
    """What makes timm read a file instead of a hub, with its own conversions and as strictly as its own weights."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if path.suffix in (".npz", ".npy"):
        weights.check_npz(path)
        return {"pretrained_cfg_overlay": {"file": str(path), "custom_load": True}}
    state = weights.read_state_dict(path)
    named = config.classifier if config is not None else None
    first = named if isinstance(named, str) or named is None else named[0]
    # A checkpoint's own number of classes, so that timm loads it strictly; ours comes after.
    key = f"{first}.weight"
    num_classes = len(state[key]) if key in state else 0
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0, "custom_load": False}
    return {"pretrained_cfg_overlay": overlay, "num_classes": num_classes}


def _preprocess(net: nn.Module, conf: ModelConf) -> Preprocess:
    from timm.data import config as data_config

    resolve: Callable[[nn.Module], dict[str, Any]] = data_config.resolve_model_data_config
    config = resolve(net)
    size = conf.image_size or square(config["input_size"][1:], conf.name)
    interpolation = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    resize = RESIZE[config["crop_mode"]]
    crop_fraction = float(config["crop_pct"]) if resize == "crop" else 1.0
    return Preprocess(size, tuple(config["mean"]), tuple(config["std"]), interpolation, resize, crop_fraction)
