"""timm's models: where their weights come from, and our classifier in the place of theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config import ModelConf, nearest
from finetune.layers import Layer
from finetune.models import glyphs, weights
from finetune.models.built import BuiltModel, head_kind, layered, saved_preprocess, square
from finetune.models.heads import Head
from finetune.models.towers import classifier_names, layers_of
from finetune.preprocess import Preprocess

RESIZE = {"center": "crop", "border": "pad", "squash": "squash"}
HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"


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
    head_kind(conf, has_text=False)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        net, preprocess, label = _bundled(conf, load=load) if conf.name == glyphs.VIT else _upstream(conf, load=load)
        tower_layers = layers_of(net)
        names = put_head(net, len(classes), dropout=conf.head_dropout)
    chain = tower_layers[-1].run is not None and len(names) == 1
    head = Layer("head", names, partial(_run_head, name=names[0]) if chain else None)
    model = layered(net, [*tower_layers, head]).to(device)
    return BuiltModel(model.train(), preprocess, label, has_zeroshot=False)


def _run_head(net: nn.Module, h: Tensor, *, name: str) -> Tensor:
    logits: Tensor = net.get_submodule(name)(h)
    return logits


def put_head(net: nn.Module, num_classes: int, *, dropout: float) -> tuple[str, ...]:
    """Put a new random classifier in the place of upstream's; its name in the network.

    Raises:
        ValueError: `dropout` would be ignored, because this classifier is no plain linear layer.
    """
    upstream: Any = net
    upstream.reset_classifier(num_classes)
    names = classifier_names(net)
    for name in names:
        old = net.get_submodule(name)
        if type(old) is nn.Linear:
            net.set_submodule(name, Head(old.in_features, num_classes, dropout=dropout))
        elif dropout:
            raise ValueError(
                f"model.head_dropout={dropout} would be ignored: the classifier of {type(net).__name__} is no linear layer"
            )
    return names


def _bundled(conf: ModelConf, *, load: bool) -> tuple[nn.Module, Preprocess, str]:
    """The bundled ViT, its preprocessing and description."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if conf.pretrained not in ("bundled", "none") and not weights.is_path(conf.pretrained):
        raise ValueError(
            f"model.pretrained={conf.pretrained}: {glyphs.VIT} has the weights bundled, none (random), or a file's;"
            " for a timm model say its name too, such as model.name=vit_base_patch16_224 model.pretrained=augreg_in21k"
        )
    bundle = glyphs.read_bundle(glyphs.VIT)
    args = dict(bundle.config["args"])
    if conf.image_size:
        check_patches(conf.image_size, args["patch_size"])
        args["img_size"] = conf.image_size
    net = VisionTransformer(**args, drop_path_rate=conf.drop_path)
    path = (
        None
        if conf.pretrained == "none"
        else bundle.weights
        if conf.pretrained == "bundled"
        else _path(conf.pretrained)
    )
    if load and path is not None:
        state = checkpoint_filter_fn(weights.read_state_dict(path), net)
        weights.load_strictly(net, state, source=str(path), optional=("head.",))
    cfg = bundle.config["preprocess_cfg"]
    size = conf.image_size or square(args["img_size"], conf.name)
    resize = {"shortest": "crop", "longest": "pad", "squash": "squash"}[cfg["resize_mode"]]
    saved = saved_preprocess(path) if path is not None else None
    preprocess = dataclasses.replace(
        saved or Preprocess(size, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], resize), size=size
    )
    if conf.pretrained == "bundled":
        return net, preprocess, glyphs.DESCRIPTIONS[glyphs.VIT]
    return net, preprocess, f"{glyphs.VIT}: the architecture of the bundled ViT, weights {path or 'random'}"


def _upstream(conf: ModelConf, *, load: bool) -> tuple[nn.Module, Preprocess, str]:
    """A model of timm's registry, hub or folder, its preprocessing and description."""
    import timm
    from timm.layers.patch_embed import PatchEmbed

    name, tag = _name_and_tag(conf)
    args: dict[str, Any] = {"drop_path_rate": conf.drop_path} if conf.drop_path else {}
    path = (
        _path(conf.pretrained)
        if tag is None and conf.pretrained != "none" and not name.startswith((*HUB, FOLDER))
        else None
    )
    if tag is not None:
        name = f"{name}.{tag}"
    if conf.image_size:
        args |= _size_args(name, conf.image_size)
    wants_weights = load and conf.pretrained != "none"
    source = str(path or conf.pretrained if conf.pretrained != "bundled" else name)
    if wants_weights and path is not None:
        args |= _file_args(name, path)
    fetches = wants_weights and path is None
    try:
        with weights.downloads(f"weights '{source}' of {conf.name}") if fetches else weights.quiet_upstream():
            net = timm.create_model(name, pretrained=wants_weights, **args)
    except TypeError as error:
        raise ValueError(
            f"model.name={conf.name} does not take {', '.join(args)} ({error}); leave these settings out"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {conf.name}: {' '.join(str(error).split())}") from error
    for module in net.children():
        if isinstance(module, PatchEmbed) and conf.image_size:
            check_patches(conf.image_size, module.patch_size[0])
    preprocess = _preprocess(net, conf)
    saved = saved_preprocess(path) if path is not None else None
    if saved is not None:
        preprocess = dataclasses.replace(saved, size=preprocess.size)
    return net, preprocess, f"{conf.name}: a model of timm, weights {source}, images of {preprocess.size} pixels a side"


def _name_and_tag(conf: ModelConf) -> tuple[str, str | None]:
    """timm's name of the architecture, and the tag of its weights where `model.pretrained` is one.

    Raises:
        ValueError: A name or tag that timm does not know; says which it does.
    """
    import timm

    if conf.name.startswith((*HUB, FOLDER)):
        if conf.pretrained not in ("bundled", "none"):
            raise ValueError(
                f"model.pretrained={conf.pretrained} would be ignored: model.name={conf.name} brings its own weights;"
                " leave it out, or use none"
            )
        return conf.name.replace("hf_hub:", "hf-hub:"), None
    name, _, tag = conf.name.partition(".")
    if not timm.is_model(name):
        raise ValueError(_unknown_name(conf.name))
    tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    wanted = tag if conf.pretrained == "bundled" and tag else conf.pretrained
    if tag and conf.pretrained not in ("bundled", "none", tag):
        raise ValueError(
            f"model.name={conf.name} and model.pretrained={conf.pretrained} name different weights: leave one out"
        )
    if wanted == "none" or (weights.is_path(wanted) and wanted not in tags):
        return name, None
    if wanted.startswith(HUB):
        raise ValueError(f"model.pretrained={wanted}: for timm a hub id is the name itself: model.name={wanted}")
    if wanted not in tags:
        raise ValueError(_unknown_tag(conf, wanted, tags))
    return name, wanted


def _unknown_name(name: str) -> str:
    import open_clip
    import timm

    if name == glyphs.CLIP or open_clip.get_model_config(name.replace("/", "-")) is not None:
        return f"model.name={name} is a CLIP: use model=clip model.name={name}"
    names = timm.list_models()
    return (
        f"model.name={name}: timm knows no such model{nearest(name, [*names, glyphs.VIT])};"
        f" it knows {len(names)}: timm.list_models('vit*') and the like list them"
    )


def _unknown_tag(conf: ModelConf, wanted: str, tags: list[str]) -> str:
    if wanted == "bundled":
        problem = f"model.pretrained=bundled: only {glyphs.CLIP} and {glyphs.VIT} are bundled, so say which weights of {conf.name}"
    else:
        problem = f"model.pretrained={wanted}: {conf.name} has no such weights{nearest(wanted, tags)}"
    return f"{problem}; expected {', '.join([*tags, 'none (random)'])} or a path"


def _path(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.pretrained={text}: no such file")
    return path


def _size_args(name: str, image_size: int) -> dict[str, Any]:
    """What makes timm build for this image size; networks without position embeddings take any."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if config is None or config.fixed_input_size else {}


def check_patches(image_size: int, patch_size: int) -> None:
    """Refuse an image size that would leave pixels at the edge unseen.

    Raises:
        ValueError: It is no multiple of the patch size.
    """
    if image_size % patch_size:
        fitting = image_size // patch_size * patch_size or patch_size
        raise ValueError(
            f"model.image_size={image_size} must be a multiple of the patch size, {patch_size}: {fitting} is"
        )


def _file_args(name: str, path: Path) -> dict[str, Any]:
    """What makes timm read a file instead of a hub, with its own conversions and as strictly as its own weights."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if path.suffix in (".npz", ".npy"):
        return {"pretrained_cfg_overlay": {"file": str(path), "custom_load": True}}
    state = weights.read_state_dict(path)
    names = config.classifier if config is not None else None
    first = names if isinstance(names, str) or names is None else names[0]
    key = f"{first}.weight"
    num_classes = state[key].shape[0] if key in state else 0
    # A checkpoint's own number of classes, so that timm loads it strictly; ours comes after.
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
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
