"""timm's models: find their weights and load them."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from finetune.config import HeadKind, ModelConf, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.layering.timm_networks import classifier_names
from finetune.models.upstream import glyphs, network, weight_files
from finetune.models.upstream.beside import (
    Beside,
    check_architecture,
    check_timm_folder,
    names_of_folder,
    names_of_hub,
    read_beside,
)
from finetune.models.upstream.candidates import Converted, Found, find_weights
from finetune.models.upstream.class_names import Named
from finetune.models.upstream.downloads import downloads, quiet_upstream
from finetune.models.upstream.jax_archives import is_archive, whole_archive
from finetune.models.upstream.layouts import Layout, StateDict, Wanted
from finetune.models.upstream.network import FOLDER, HUB, Upstream, interpolation_of
from finetune.models.upstream.skip_init import built_from_weights
from finetune.models.upstream.stems import check_archive_stem, check_stem, fit_stem, has_stem
from finetune.models.upstream.tracing import traced
from finetune.models.upstream.transformers_tables import transformers_layouts
from finetune.system.errors import UserError

# What timm's conversions and its strict loading raise on tensors of another model.
UNFIT = (RuntimeError, LookupError, AssertionError, ValueError, TypeError, AttributeError)

PROJECTION = re.compile(r"(^|\.)attnpool\.c_proj\.(weight|bias)$")  # of CLIP's ResNets
SIZES = ("img_size", "in_chans", "num_classes")  # arguments that make no other network of a ViT


def read(conf: ModelConf, *, load: bool) -> Upstream:
    """A timm model with its own classifier, and random weights unless `load`; see `build_model` for the errors."""
    return _bundled(conf, load=load) if conf.name == glyphs.VIT else _from_registry(conf, load=load)


@runtime_checkable
class ReadsJax(Protocol):
    """A timm network that reads the JAX archives (.npz) of its authors."""

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Read an archive."""


def _bundled(conf: ModelConf, *, load: bool) -> Upstream:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    bundle = glyphs.read_bundle(glyphs.VIT)
    path = bundle.weights_for(conf, load=load)
    args = {**bundle.config["args"], "in_chans": conf.in_channels}
    if conf.image_size:
        network.check_patches(conf.image_size, args["patch_size"])
        args["img_size"] = conf.image_size
    found = Found({})
    if load and path is not None:
        read = weight_files.read_weights(path)
        with torch.device("meta"):
            wanted = Wanted.by(VisionTransformer(**args), ("head.",))
        found = find_weights(read.tensors, wanted, [Layout.own(wanted)], key=conf.pretrained_key, source=str(path))
        found = dataclasses.replace(found, named=read.named)
    state = found.state
    if "head.weight" in state:
        args["num_classes"] = len(state["head.weight"])
    net = VisionTransformer(**args, drop_path_rate=conf.drop_path)
    stem = fit_stem(state, net)
    if state:
        with weight_files.fitting(path, conf.name):
            weight_files.load_strictly(net, checkpoint_filter_fn(state, net), source=str(path), optional=("head.",))
        weight_files.check_finite(net, path)
    saved = weight_files.read_metadata(path)
    if conf.pretrained == "bundled":
        saved = weight_files.SavedWeights(None, {str(bundle.weights): list(bundle.config["classes"])})
    cfg = bundle.config["preprocess_cfg"]
    resize = network.RESIZE[cfg["resize_mode"]]
    own = Preprocess(args["img_size"], tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], resize)
    beside = Beside(named=saved.named)
    if load and path is not None and path != bundle.weights and saved.preprocess is None:
        check_architecture(path, glyphs.VIT, {key: args[key] for key in SIZES}, net)
        beside = read_beside(path, found.program, net, beside)
    own = beside.preprocess(own, conf.image_size)
    preprocess = dataclasses.replace(saved.preprocess or own, size=args["img_size"])
    text = f"{glyphs.VIT}: the architecture of the bundled ViT, weights {path or 'random'}"
    text = bundle.description if path == bundle.weights else text + found.note
    text += stem + beside.note
    return Upstream(net, preprocess, text, classifier_names, {**found.named, **beside.named})


def _from_registry(conf: ModelConf, *, load: bool) -> Upstream:
    """A model of timm's registry, of a hub or of a folder."""
    import timm
    from timm.layers.patch_embed import PatchEmbed

    name, path = _locate(conf, load=load)
    wants_weights = load and conf.pretrained != "none"
    source = str(path) if path else name if wants_weights else "random"
    config = timm.get_pretrained_cfg(name)
    args: dict[str, Any] = {"drop_path_rate": conf.drop_path} if conf.drop_path else {}
    if conf.image_size and (config is None or config.fixed_input_size):  # others have no position embeddings
        args["img_size"] = conf.image_size
    if conf.in_channels != 3:
        args["in_chans"] = conf.in_channels
    fetches = path is None and (wants_weights or name.startswith("hf-hub:"))
    found = Found({})
    with (
        weight_files.fitting(source if wants_weights else name, conf.name),
        _taken(conf.name, args),
        downloads(f"weights of {source}") if fetches else quiet_upstream(),
    ):
        if wants_weights and path is not None:
            args, found = _file_args(name, args, path, conf.pretrained_key)
        create = partial(timm.create_model, name, pretrained=wants_weights, **args)
        with whole_archive(path) if path is not None and is_archive(path) else contextlib.nullcontext() as reading:
            net = built_from_weights(create) if wants_weights else create()
        if reading is not None:
            reading.check(net, tuple(f"{classifier}." for classifier in classifier_names(net)))
    if wants_weights:
        check_stem(net, conf.in_channels)
        weight_files.check_finite(net, source)
    for module in net.children():
        if isinstance(module, PatchEmbed) and conf.image_size:
            network.check_patches(conf.image_size, module.patch_size[0])
    saved = weight_files.read_metadata(path)
    beside = Beside(saved.changes, saved.named)
    beside.network.put_into(net)
    if path is not None and saved.preprocess is None:
        beside = read_beside(path, found.program, net, beside)
    preprocess = beside.preprocess(_preprocess(net, conf), conf.image_size)
    text = network.describe(conf.name, "a model of timm", source, preprocess) + found.note + beside.note
    if saved.preprocess is not None:
        preprocess = dataclasses.replace(saved.preprocess, size=preprocess.size)
    elif path is not None and not beside.images:
        mean = ", ".join(f"{value:g}" for value in preprocess.mean)
        own = f"that of the architecture's own weights is used (mean {mean})"
        text += f"; the file does not say its preprocessing, so {own}"
    is_tag = path is None and conf.head == HeadKind.keep
    named = _tag_classes(net, conf) if is_tag else {**found.named, **beside.named}
    return Upstream(net, preprocess, text, classifier_names, named, beside.network)


@contextlib.contextmanager
def _taken(name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Turn the TypeError of a network that does not take `settings` into a UserError."""
    try:
        yield
    except TypeError as error:
        if not settings:
            raise
        raise UserError(f"model.name={name} does not take {', '.join(settings)} ({error}); leave it out") from error


def _tag_classes(net: Any, conf: ModelConf) -> Named:
    """The names of the classes of timm's own weights, or of a hub's where its configuration says them."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    if conf.name.startswith(FOLDER):
        return names_of_folder(Path(conf.name.removeprefix(FOLDER)).expanduser())
    named = names_of_hub(net.pretrained_cfg, conf.name)
    subset = None if named or conf.name.startswith(HUB) else infer_imagenet_subset(net)
    if subset is None:
        return named
    info: Any = ImageNetInfo(subset)
    # The id first: `n01440764, tench, Tinca tinca`; a folder may have any of these names.
    return {f"timm ({subset})": [f"{wnid}, {info.label_name_to_description(wnid)}" for wnid in info.label_names()]}


def _locate(conf: ModelConf, *, load: bool) -> tuple[str, Path | None]:
    """Timm's name of the model, with the tag of its weights where it has one, and the file where a file is named."""
    import timm

    if conf.name.startswith(FOLDER):
        check_timm_folder(Path(conf.name.removeprefix(FOLDER)).expanduser())
    if conf.name.startswith((*HUB, FOLDER)):
        if conf.pretrained not in ("bundled", "none"):
            problem = f"model.pretrained={conf.pretrained} would be ignored"
            raise UserError(f"{problem}: model.name={conf.name} brings its own weights; leave it out, or use none")
        return conf.name.replace("hf_hub:", "hf-hub:"), None
    name, _, tag = conf.name.partition(".")
    if not timm.is_model(name):
        raise UserError(_unknown_name(conf.name))
    tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(network.unknown_tag(dataclasses.replace(conf, name=name), tag, tags))
    wanted = tag if conf.pretrained == "bundled" and tag else conf.pretrained
    if wanted == "none":
        return conf.name, None
    if wanted not in tags and weight_files.is_path(wanted):
        return conf.name, weight_files.path_of(wanted) if load else None
    if tag not in ("", wanted):
        raise UserError(f"model.name={conf.name} and model.pretrained={wanted} name different weights: leave one out")
    if wanted.startswith(HUB):
        raise UserError(f"model.pretrained={wanted}: for timm a hub id is the name itself: model.name={wanted}")
    if wanted not in tags:
        raise UserError(network.unknown_tag(conf, wanted, tags))
    return f"{name}.{wanted}", None


def _unknown_name(name: str) -> str:
    import open_clip
    import timm

    if name == glyphs.CLIP or open_clip.get_model_config(name.replace("/", "-")) is not None:
        return f"model.name={name} is a CLIP: use model=clip model.name={name}"
    names = timm.list_models()
    problem = f"neither timm nor torchvision knows such a model{nearest(name, [*names, glyphs.VIT])}"
    return f"model.name={name}: {problem}; timm knows {len(names)}, which timm.list_models('vit*') and the like list"


def _file_args(name: str, args: dict[str, Any], path: Path, key: str | None) -> tuple[dict[str, Any], Found]:
    """`args` with which timm loads a file instead of a hub's, with its own conversions and as strictly."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, num_classes=1, **args)
    if is_archive(path):
        if not isinstance(net, ReadsJax):
            expected = ".safetensors, .pt, .pth, .bin or .ckpt"
            raise UserError(
                f"{path} is a JAX archive, which timm reads for other models than {name}; expected {expected}"
            )
        check_archive_stem(weight_files.check_npz(path), net, path)
        return {**args, "pretrained_cfg_overlay": {"file": str(path), "custom_load": True}}, Found({})
    wanted = Wanted.by(net, tuple(f"{classifier}." for classifier in classifier_names(net)))
    first = classifier_names(net)[:1]

    def with_state(state: StateDict) -> dict[str, Any]:
        # With the file's own number of classes timm loads it strictly; our classifier replaces the file's later.
        heads = [state[f"{name}.weight"] for name in first if f"{name}.weight" in state]
        num_classes = len(heads[0]) if heads else 0
        overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0, "custom_load": False}
        return {**args, "pretrained_cfg_overlay": overlay, "num_classes": num_classes}

    def convert(group: StateDict) -> Converted | None:
        """The tensors of a layout that timm reads by itself, such as those of the authors of a model."""
        if not has_stem(group, net):
            return None
        # Timm takes CLIP's projection for a classifier, whose number of classes this file does not have.
        for part in (group, {name: tensor for name, tensor in group.items() if not PROJECTION.search(name)}):
            shapes = {name: tensor.to("meta") for name, tensor in part.items()}
            create = partial(timm.create_model, name, pretrained=True, **with_state(dict(shapes)))
            with contextlib.suppress(*UNFIT), torch.device("meta"):
                _, used = traced(shapes, create, lambda net: chain(net.parameters(), net.buffers()))
                return Converted(part, used)
        return None

    layouts, read = [Layout.own(wanted), *transformers_layouts(wanted)], weight_files.read_weights(path)
    found = find_weights(read.tensors, wanted, layouts, key=key, source=str(path), convert=convert)
    check_architecture(path, name, {**args, "num_classes": 1}, net)
    found = dataclasses.replace(found, stem=fit_stem(found.state, net), named=read.named)
    return with_state(found.state), found


def _preprocess(net: nn.Module, conf: ModelConf) -> Preprocess:
    from timm.data import config as data_config

    resolve: Callable[[nn.Module], dict[str, Any]] = data_config.resolve_model_data_config
    config = resolve(net)
    size = conf.image_size or network.side_of(config["input_size"][1:], conf.name)
    resize = network.RESIZE[config["crop_mode"]]
    crop_fraction = float(config["crop_pct"]) if resize == "crop" else 1.0
    interpolation = interpolation_of(config["interpolation"])
    return Preprocess(size, tuple(config["mean"]), tuple(config["std"]), interpolation, resize, crop_fraction)
