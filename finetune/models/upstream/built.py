"""What a builder hands over, and what builders share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from finetune.config import HeadKind, ModelConf, Pool, nearest
from finetune.core.layers import Layer, LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.models.heads.head import Head
from finetune.models.upstream import glyphs
from finetune.system.errors import UserError


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
    """A `LayeredModel` that spares from weight decay what upstream spares, and holds fixed what it holds fixed."""
    for module in list(net.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                # Sine position embeddings, above all. As a buffer they keep their name, and no thawing reaches them.
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return LayeredModel(net, layers, no_weight_decay=spared_names(net))


def head_kind(conf: ModelConf, *, has_text: bool) -> HeadKind:
    """The head that `auto` stands for.

    Raises:
        ValueError: A zero-shot head without a text tower, or a kept one where weights never have one.
    """
    if conf.head == HeadKind.auto:
        # Random weights have nothing to say about class names, and another pooling speaks another language.
        reads_names = has_text and conf.pretrained != "none" and conf.pool == Pool.auto
        return HeadKind.zeroshot if reads_names else HeadKind.random
    if conf.head == HeadKind.zeroshot and not has_text:
        raise UserError(
            f"model.head=zeroshot needs a text tower, and {conf.name} has none:"
            " use model.head=random, or a CLIP (model=clip)"
        )
    if conf.head == HeadKind.keep and (has_text or conf.pretrained == "none"):
        why = "a CLIP" if has_text else "a model without weights"
        raise UserError(
            f"model.head=keep: {why} has no classifier to keep; use model.head=random{' or zeroshot' * has_text}"
        )
    return HeadKind(conf.head)


def put_head(net: nn.Module, name: str, num_classes: int, *, dropout: float) -> None:
    """Put a new random classifier in the place of the layer `name`, which gives the logits.

    Raises:
        ValueError: That layer is neither linear nor a 1 x 1 convolution, or `dropout` would be ignored.
    """
    old = net.get_submodule(name)
    if isinstance(old, nn.Linear):
        net.set_submodule(name, Head(old.in_features, num_classes, dropout=dropout))
        return
    if dropout or not isinstance(old, nn.Conv2d):
        what = f"model.head_dropout={dropout} would be ignored" if dropout else "it cannot be replaced"
        raise UserError(f"the classifier of {type(net).__name__} ({name}) is a {type(old).__name__}: {what}")
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    nn.init.trunc_normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)  # type: ignore[arg-type]
    net.set_submodule(name, new)


def keep_head(
    net: nn.Module, name: str, classes: Sequence[str], *, dropout: float, known: Sequence[str] | None
) -> None:
    """Let the layer `name` go on classifying, as a `Head`.

    Args:
        net: With its weights.
        name: The layer that gives the logits.
        classes: Class names in the order of the labels.
        dropout: Probability of dropping a feature while training.
        known: The class names that the weights were trained with, where they say them.

    Raises:
        ValueError: Other classes, or another number of them, than the classifier has.
    """
    old = net.get_submodule(name)
    if type(old) is nn.Identity:
        raise UserError("model.head=keep: the weights have no classifier to keep; use model.head=random")
    if type(old) is not nn.Linear:
        raise UserError(
            f"model.head=keep: the classifier of {type(net).__name__} is a {type(old).__name__}, not a linear layer"
        )
    if old.out_features != len(classes):
        raise UserError(
            f"model.head=keep: the weights classify into {old.out_features} classes and the data has {len(classes)};"
            " use model.head=random"
        )
    if known is not None and list(known) != list(classes):
        theirs, ours = next(pair for pair in zip(known, classes, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"model.head=keep: the weights know other classes than the data, such as '{theirs}' for '{ours}';"
            " use model.head=random"
        )
    head = Head(old.in_features, len(classes), bias=old.bias is not None, dropout=dropout)
    head.set(old.weight, old.bias)
    net.set_submodule(name, head)


def path_of(text: str) -> Path:
    """`model.pretrained` as the file that it names.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.pretrained={text}: no such file")
    return path


def unknown_tag(conf: ModelConf, wanted: str, options: Sequence[str]) -> str:
    """What to say of weights that a model does not have."""
    if wanted == "bundled":
        bundled = f"{glyphs.CLIP} and {glyphs.VIT}"
        problem = f"model.pretrained=bundled: only {bundled} are bundled, so say which weights of {conf.name}"
    else:
        problem = f"model.pretrained={wanted}: {conf.name} has no such weights{nearest(wanted, options)}"
    return f"{problem}; expected {', '.join([*options, 'none (random)'])} or a path"


def check_patches(image_size: int, patch_size: int) -> None:
    """Refuse an image size that would leave pixels at the edge unseen.

    Raises:
        ValueError: It is no multiple of the patch size.
    """
    if image_size % patch_size:
        fitting = image_size // patch_size * patch_size or patch_size
        raise UserError(
            f"model.image_size={image_size} must be a multiple of the patch size, {patch_size}: {fitting} is"
        )


def square(size: Sequence[int] | int, name: str) -> int:
    """Pixels a side.

    Raises:
        ValueError: Height and width differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(
            f"{name} takes images of {tuple(sides)} pixels; finetune feeds square images, so set model.image_size"
        )
    return sides.pop()


@dataclass(frozen=True)
class Saved:
    """What a weights file that finetune wrote says of itself.

    Attributes:
        preprocess: What its model expects of an image.
        classes: Its class names in the order of the logits.
    """

    preprocess: Preprocess | None = None
    classes: list[str] | None = None


def read_saved(path: Path | None) -> Saved:
    """The metadata of a file of ours; empty for other people's files, and for none."""
    if path is None or path.suffix != ".safetensors":
        return Saved()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = {
            key: json.loads(value) for key, value in (file.metadata() or {}).items() if key in ("preprocess", "classes")
        }
    preprocess = None
    if "preprocess" in metadata:
        values = metadata["preprocess"]
        preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    return Saved(preprocess, metadata.get("classes"))
