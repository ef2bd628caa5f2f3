"""torchvision's classification models: load their weights or a file's.

torchvision has ten older families of convolutional networks too, from AlexNet to MobileNetV3. Those are left to timm.
"""

import contextlib
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finetune.config import ModelConf, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.layering.torchvision_networks import RULES
from finetune.models.upstream import weight_files
from finetune.models.upstream.beside import Beside, check_not_timms, read_beside
from finetune.models.upstream.candidates import Found, find_weights
from finetune.models.upstream.class_names import Named
from finetune.models.upstream.downloads import downloads
from finetune.models.upstream.layouts import Layout, Wanted
from finetune.models.upstream.network import Upstream, check_patches, describe, interpolation_of, unknown_tag
from finetune.models.upstream.skip_init import SkipInit
from finetune.models.upstream.stems import fit_stem, set_channels
from finetune.system.errors import UserError

# The modules of torchvision.models whose networks have a rule in `RULES`.
MODULES = ("convnext", "efficientnet", "maxvit", "regnet", "resnet", "swin_transformer", "vision_transformer")
# MaxViT's last stage has 1/32 of the resolution, cut into windows of 7 x 7.
MAXVIT_GRID = 32 * 7


def names() -> list[str]:
    """The names of torchvision's classification models that finetune builds."""
    from torchvision import models

    homes = {name: models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    return [name for name, home in homes.items() if home.rpartition(".")[2] in MODULES]


def check_name(name: str) -> None:
    """Raise a UserError for the name of a model that is left to timm; it names timm's nearest model."""
    import timm
    from torchvision import models

    if name in models.list_models(module=models) and name not in names():
        problem = "finetune has no layers for this older model of torchvision"
        mend = f"use one of timm's with model.library=timm{nearest(name, timm.list_models())}"
        raise UserError(f"model.name={name}: {problem}; {mend}")


def read(conf: ModelConf, *, load: bool) -> Upstream:
    """Torchvision's model with its own classifier, random weights unless `load`; see `build_model` for the errors."""
    from timm.data.imagenet_info import ImageNetInfo
    from torchvision.models import get_model_weights

    if conf.drop_path:
        problem = f"torchvision's {conf.name} sets its own; use timm's"
        raise UserError(f"model.drop_path={conf.drop_path} would be ignored: {problem}")
    options = get_model_weights(conf.name)
    tags = [*(member.name for member in options), "DEFAULT"]
    path = None
    if conf.pretrained not in (*tags, "none"):
        if not weight_files.is_path(conf.pretrained):
            raise UserError(unknown_tag(conf, conf.pretrained, tags))
        path = weight_files.path_of(conf.pretrained) if load else None
    chosen = options[conf.pretrained] if conf.pretrained in tags else None
    with _NumbersOnCpu(), weight_files.fitting(path, conf.name) if path else contextlib.nullcontext():
        net, found = _construct(conf, chosen, path, load=load)
    if load and conf.pretrained != "none":
        weight_files.check_finite(net, path or conf.pretrained)
    saved = weight_files.read_metadata(path)
    beside = Beside(named=saved.named)
    if path is not None and saved.preprocess is None:
        check_not_timms(path, conf.name)
        beside = read_beside(path, "", net, beside)
    own = _preprocess(chosen or options["DEFAULT"])
    preprocess = saved.preprocess or beside.preprocess(own, conf.image_size)
    preprocess = dataclasses.replace(preprocess, size=conf.image_size or preprocess.size)
    source = path or (chosen.name if chosen else "random")
    text = describe(conf.name, "a model of torchvision", source, preprocess) + found.note + beside.note
    named: Named = {**found.named, **beside.named}
    if chosen is not None:  # ImageNet's names in the order of its ids; a folder may have either
        info: Any = ImageNetInfo()
        ids = info.label_names()
        names = [f"{wnid}, {name}" for wnid, name in zip(ids, chosen.meta["categories"], strict=True)]
        named = {f"torchvision ({chosen.name})": names}
    return Upstream(net, preprocess, text, lambda net: [_classifier_name(net)], named)


class _NumbersOnCpu(TorchFunctionMode):
    """While active, `torch.arange` and `torch.tensor` work on the meta device too: RegNet reads widths from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _construct(conf: ModelConf, chosen: Any, path: Path | None, *, load: bool) -> tuple[nn.Module, Found]:
    """The network with its own classifier and, if `load`, torchvision's own weights `chosen` or those of a file.

    Also what was found in the file; nothing without one.
    """
    from torchvision.models import MaxVit, VisionTransformer, get_model
    from torchvision.models.vision_transformer import interpolate_embeddings

    state, found = _fetch(chosen, conf.name) if load and chosen is not None else None, Found({})
    args: dict[str, Any] = {}
    with torch.device("meta"), _NumbersOnCpu():
        empty = get_model(conf.name)  # costs no memory; shows patch size and classifier
    if load and path is not None:
        wanted = Wanted.by(empty, (f"{_classifier_name(empty)}.",))
        read = weight_files.read_weights(path)
        found = find_weights(read.tensors, wanted, [Layout.own(wanted)], key=conf.pretrained_key, source=str(path))
        state = found.state
        found = dataclasses.replace(found, named=read.named)
    weight = None if state is None else state.get(f"{_classifier_name(empty)}.weight")
    if isinstance(empty, VisionTransformer):
        size = conf.image_size or (chosen.meta["min_size"][0] if chosen else empty.image_size)
        check_patches(size, empty.patch_size)
        args["image_size"] = size
        # A file of another model has no such table, or a flat one: the strict load below reports it with the names.
        if state is not None and state.get("encoder.pos_embedding", torch.empty(0)).ndim == 3:
            state = dict(interpolate_embeddings(size, empty.patch_size, state))
    if isinstance(empty, MaxVit) and conf.image_size:
        if conf.image_size % MAXVIT_GRID:
            raise UserError(f"model.image_size={conf.image_size}: {conf.name} takes multiples of {MAXVIT_GRID} pixels")
        args["input_size"] = (conf.image_size, conf.image_size)
    if weight is not None:
        args["num_classes"] = len(weight)
    # Weights with a classifier replace every value of the network.
    with contextlib.nullcontext() if weight is None else SkipInit():
        net: nn.Module = get_model(conf.name, **args)
        set_channels(net, conf.in_channels)
    if state is not None:
        optional = (f"{_classifier_name(net)}.",) if weight is None else ()
        found = dataclasses.replace(found, stem=fit_stem(state, net))
        weight_files.load_strictly(net, state, source=str(path or chosen.name), optional=optional)
    return net, found


def _fetch(chosen: Any, name: str) -> dict[str, Tensor]:
    """Torchvision's own weights, from torch's cache or the network."""
    what = f"weights {chosen.name} of {name}"
    try:
        with downloads(what, url=chosen.url):
            # The hash is checked for a download only, and not for a file that already lies in the cache.
            return dict(chosen.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        place = f"{torch.hub.get_dir()} (TORCH_HOME)"
        raise UserError(f"{what} are damaged in {place}: remove the file there, so that it is fetched again") from error


def _classifier_name(net: nn.Module) -> str:
    head = RULES[type(net).__name__].head
    linear: list[str] = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if re.fullmatch(head, name)]
    assert len(found) == 1, found
    return found[0]


def _preprocess(chosen: Any) -> Preprocess:
    transform = chosen.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    interpolation = interpolation_of(transform.interpolation.value)
    return Preprocess(crop, tuple(transform.mean), tuple(transform.std), interpolation, "crop", crop / resize)
