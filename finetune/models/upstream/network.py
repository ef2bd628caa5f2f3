"""What every library's module returns, and the checks that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from finetune.config import ModelConf, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.upstream import glyphs
from finetune.system.errors import UserError

# How the names of models on the Hugging Face hub and in a local folder begin.
HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"


@dataclass(frozen=True)
class Upstream:
    """A network of one of the libraries with its weights and its own classifier.

    Attributes:
        net: The network. From open_clip it is the whole CLIP, or a module whose `visual` is the image tower.
        preprocess: How the weights expect their images.
        description: The line about the model with which a run starts.
        classifiers: `classifiers(net)` gives the names of the modules that give logits.
        classes: The class names that the weights were trained with; None where they are not known.
    """

    net: nn.Module
    preprocess: Preprocess
    description: str
    classifiers: Callable[[nn.Module], Sequence[str]] = lambda net: ()
    classes: Sequence[str] | None = None


def describe(name: str, kind: str, weights: object, preprocess: Preprocess) -> str:
    """The line about a model with which a run starts."""
    return f"{name}: {kind}, weights {weights}, images of {preprocess.size} pixels a side"


def unknown_tag(conf: ModelConf, wanted: str, options: Sequence[str]) -> str:
    """The error text for weights that a model does not have."""
    if wanted == "bundled":
        bundled = f"{glyphs.CLIP} and {glyphs.VIT}"
        problem = f"model.pretrained=bundled: only {bundled} are bundled, so say which weights of {conf.name}"
    else:
        problem = f"model.pretrained={wanted}: {conf.name} has no such weights{nearest(wanted, options)}"
    return f"{problem}; expected {', '.join([*options, 'none (random)'])} or a path"


def check_patches(image_size: int, patch_size: int) -> None:
    """Check that patches cover the whole image.

    Raises:
        UserError: `image_size` is not a multiple of `patch_size`, so pixels at the edges would be ignored.
    """
    if image_size % patch_size:
        fitting = image_size // patch_size * patch_size or patch_size
        raise UserError(
            f"model.image_size={image_size} must be a multiple of the patch size, {patch_size}: {fitting} is"
        )


def side_of(size: Sequence[int] | int, name: str) -> int:
    """Pixels a side of square images.

    Raises:
        UserError: The model takes images whose height and width differ.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(
            f"{name} takes images of {tuple(sides)} pixels; finetune feeds square images, so set model.image_size"
        )
    return sides.pop()


def interpolation_of(word: str) -> str:
    """The interpolation for a library's word; bicubic in the place of those that finetune does not have."""
    return word if word in ("bilinear", "bicubic") else "bicubic"
