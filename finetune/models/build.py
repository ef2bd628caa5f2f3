"""Build the model of a run: find its library, read its weights, put a classifier on it, cut it into layers."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from finetune.config import Family, HeadKind, Library, ModelConf, Pool
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess, with_channels
from finetune.models.heads.head import Head, TowerWithHead, head_kind, keep_head, put_head, scale_head
from finetune.models.heads.imagenet import imagenet_names
from finetune.models.heads.pooling import mean_pool_open_clip, mean_pool_timm
from finetune.models.heads.zeroshot import read_class_names, zeroshot_head, zeroshot_weight
from finetune.models.layering import towers
from finetune.models.upstream import clip_source, from_open_clip, from_timm, from_torchvision, glyphs
from finetune.models.upstream.jax_archives import is_archive
from finetune.models.upstream.layouts import shown
from finetune.models.upstream.network import FOLDER, HUB, Upstream
from finetune.models.upstream.weight_files import is_path
from finetune.system.errors import UserError

LIBRARIES = {Family.clip: (Library.open_clip,), Family.vit: (Library.timm, Library.torchvision)}
READERS = {Library.timm: from_timm.read, Library.torchvision: from_torchvision.read}
LAYERS = {
    Library.open_clip: towers.open_clip_layers,
    Library.timm: towers.timm_layers,
    Library.torchvision: towers.torchvision_layers,
}


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to fine-tune."""

    model: LayeredModel  # in training mode, nothing frozen
    preprocess: Preprocess  # how its weights expect their images
    description: str  # the line about the model with which a run starts
    has_zeroshot: bool  # whether the head was made from class names, and so classifies before any training
    changes: dict[str, str | float]  # where the network differs from the library's of this name; mostly empty


def build_model(
    conf: ModelConf,
    classes: Sequence[str],
    *,
    load: bool = True,
    reads_names: bool = True,
    device: torch.device | str = "cpu",
) -> BuiltModel:
    """The model of a run, in training mode, with a classifier for `classes`, the names in the order of the labels.

    Random values, the head's above all, come from torch's global generator: seed it first. A head of `linear_probe`
    starts at random too; fit it with `finetune.models.heads.probe`. Without `load` weights and head stay random and no
    file is read: for a checkpoint that is loaded later. Without `reads_names` only the values of a zero-shot head are
    random, since a checkpoint brings them. The device `meta` builds without memory or weights.

    A name, tag or setting that does not exist or does not fit, and weights of another model, are a UserError; a file
    that does not exist or cannot be downloaded is a FileNotFoundError.
    """
    target = torch.device(device)
    library = library_of(conf)
    if library == Library.torchvision and conf.pool != Pool.auto:
        raise UserError(f"model.pool={conf.pool} would be ignored: {conf.name} is a model of torchvision; leave it out")
    if conf.pretrained_key is not None and (not is_path(conf.pretrained) or is_archive(Path(conf.pretrained))):
        why = f"model.pretrained={conf.pretrained} is {'a JAX archive' if is_path(conf.pretrained) else 'no file'}"
        raise UserError(f"model.pretrained_key={conf.pretrained_key} would be ignored: {why}; leave it out")
    kind = head_kind(conf, has_text=library == Library.open_clip)
    load = load and target.type != "meta"
    has_zeroshot = kind == HeadKind.zeroshot and load
    net: nn.Module
    with torch.device("meta" if target.type == "meta" else "cpu"):
        if has_zeroshot:
            upstream, net = _zeroshot_clip(conf, classes, target if reads_names else None)
        elif library == Library.open_clip:
            upstream, net = _plain_clip(conf, len(classes), normalize=kind == HeadKind.zeroshot, load=load)
        else:
            upstream = READERS[library](conf, load=load)
            net, note = _with_classifier(upstream, conf, classes, keep=kind == HeadKind.keep and load)
            upstream = replace(upstream, description=upstream.description + note)
    find = LAYERS[library]
    layers = towers.tower_with_head_layers(find(net.visual)) if isinstance(net, TowerWithHead) else find(net)
    model = towers.layered(net, layers).to(target)
    model.channels = conf.in_channels
    preprocess = with_channels(upstream.preprocess, conf.in_channels)
    if conf.head_scale != 1:
        scale_head(model, conf.head_scale)
    return BuiltModel(model.train(), preprocess, upstream.description, has_zeroshot, upstream.changes.as_dict())


def library_of(conf: ModelConf) -> Library:
    """The library whose model `conf.name` is; a UserError where it is unclear, or contradicts `library` or `family`."""
    library, family = Library(conf.library), Family(conf.family)
    fits = LIBRARIES[family]
    if library not in (Library.auto, *fits):
        words = f"{' or '.join(fits)}, or model={'clip' if library == Library.open_clip else 'vit'}"
        raise UserError(f"model.library={library} does not go with model={family}: expected {words}")
    if family == Family.clip or conf.name == glyphs.VIT or conf.name.startswith((*HUB, FOLDER)):
        return fits[0]
    import timm

    known = [Library.timm] if timm.is_model(conf.name.partition(".")[0]) else []
    known += [Library.torchvision] if conf.name in from_torchvision.names() else []
    if library == Library.torchvision or not known:
        from_torchvision.check_name(conf.name)
    if library == Library.auto:
        if len(known) == 2:
            words = "model.library=timm or torchvision"
            raise UserError(f"model.name={conf.name} is known to timm and to torchvision: say {words}")
        return known[0] if known else Library.timm  # whose error lists the nearest names
    if known and library not in known:
        problem = f"{library} knows no such model, {known[0]} does"
        raise UserError(f"model.name={conf.name}: {problem}: leave model.library out")
    return library


def _zeroshot_clip(
    conf: ModelConf, classes: Sequence[str], device: torch.device | None
) -> tuple[Upstream, TowerWithHead]:
    """The image tower of a CLIP under a head that its text tower makes on `device`; the text tower itself is dropped.

    Without a device it reads no names, and the head of the same form is random.
    """
    source = clip_source.locate(conf, load=True)
    known = imagenet_names(classes)
    names = read_class_names(Path(conf.class_names).expanduser() if conf.class_names else None, classes, known)
    tokenizer = source.tokenizer() if device else None  # ahead of the weights, which take long: it may be missing
    # With the text tower in any case, so that the same part of a file is taken for the network.
    upstream = from_open_clip.read(conf, source, load=True, with_text=True)
    if tokenizer is None:
        width, bias = source.model_cfg["embed_dim"], conf.head_bias
        head = Head(width, len(names), bias=bias, normalize=True, dropout=conf.head_dropout)
    else:
        twice = [name for name, count in Counter(known.values()).items() if count > 1]  # by ImageNet's own list
        weight = zeroshot_weight(upstream.net.to(device), tokenizer, names, conf.templates, may_repeat=twice)
        head = zeroshot_head(weight, dropout=conf.head_dropout, bias=conf.head_bias)
    if used := sum(known.get(wnid) == name for wnid, name in zip(classes, names, strict=True)):
        text = f"{upstream.description}; prompts have ImageNet's names for {used:,} classes that are WordNet ids"
        upstream = dataclasses.replace(upstream, description=text)
    return upstream, TowerWithHead(upstream.net.get_submodule("visual"), head)


def _plain_clip(conf: ModelConf, num_classes: int, *, normalize: bool, load: bool) -> tuple[Upstream, TowerWithHead]:
    """The image tower of a CLIP under a random head; `normalize` gives it the form of a zero-shot head."""
    source = clip_source.locate(conf, load=load)
    upstream = from_open_clip.read(conf, source, load=load, with_text=False)
    visual = upstream.net.get_submodule("visual")
    width = source.model_cfg["embed_dim"]
    if conf.pool == Pool.mean:
        width = mean_pool_open_clip(visual, conf.name)
    bias = conf.head_bias or not normalize
    head = Head(width, num_classes, bias=bias, normalize=normalize, dropout=conf.head_dropout)
    return upstream, TowerWithHead(visual, head)


def _with_classifier(
    upstream: Upstream, conf: ModelConf, classes: Sequence[str], *, keep: bool
) -> tuple[nn.Module, str]:
    """A network of timm or torchvision with our classifier in the place of its own, or with its own as a `Head`.

    Also a note about the classes that its own does not know.
    """
    net = upstream.net
    if conf.pool == Pool.mean:
        mean_pool_timm(net, conf.name)
    if keep:
        names = upstream.classifiers(net)
        if len(names) != 1:
            found = f"{conf.name} has {len(names)} classifiers, not one"
            raise UserError(f"model.head=keep: {found}; use model.head=random")
        new = keep_head(net, names[0], classes, dropout=conf.head_dropout, named=upstream.named)
        if not upstream.named:
            return net, f"; nothing names the {len(classes)} classes of its classifier: taken for yours, in your order"
        kept = f"; {len(classes) - len(new)} of {len(classes)} classes keep their classifier, new are: {shown(new)}"
        return net, kept if new else ""
    if isinstance(net, Resettable):
        # timm's own change of the number of classes knows every place that depends on it; the modules are ours.
        net.reset_classifier(len(classes))
    elif not upstream.classifiers(net):
        # An encoder of a language model: the head classifies the mean of the encoder's output.
        return TowerWithHead(net, Head(_width(upstream, conf.in_channels), len(classes), dropout=conf.head_dropout)), ""
    for name in upstream.classifiers(net):
        put_head(net, name, len(classes), dropout=conf.head_dropout)
    return net, ""


@runtime_checkable
class Resettable(Protocol):
    """A timm network whose number of classes can be changed."""

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by one for `num_classes` classes."""


@torch.no_grad()
def _width(encoder: Upstream, channels: int) -> int:
    """The length of an encoder's features, found by a forward pass; `num_features` is not always right."""
    size = encoder.preprocess.size
    out: Tensor = copy.deepcopy(encoder.net).to("meta")(torch.empty(1, channels, size, size, device="meta"))
    return out.shape[1] if out.ndim == 4 else out.shape[-1]
