"""What every library's module returns, and the checks that they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from finetune.config import ModelConf, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.upstream import glyphs
from finetune.models.upstream.class_names import Named
from finetune.models.upstream.transformers_config import Network
from finetune.system.errors import UserError

# How the names of models on the Hugging Face hub and in a local folder begin.
HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"
# The libraries' words for a resize (open_clip's, then timm's) as `Preprocess` has them.
RESIZE = {"shortest": "crop", "longest": "pad", "squash": "squash", "center": "crop", "border": "pad"}


@dataclass(frozen=True)
class Upstream:
    """A network of one of the libraries with its weights and its own classifier."""

    net: nn.Module  # from open_clip the whole CLIP, or a module whose `visual` is the image tower
    preprocess: Preprocess  # how the weights expect their images
    description: str  # the line about the model with which a run starts
    # `classifiers(net)` gives the names of the modules that give logits.
    classifiers: Callable[[nn.Module], Sequence[str]] = lambda net: ()
    named: Named = field(default_factory=dict)  # the class names that the weights were trained with, where known
    changes: Network = Network()  # where the network differs from the library's of this name


def describe(name: str, kind: str, weights: object, preprocess: Preprocess) -> str:
    """The line about a model with which a run starts."""
    return f"{name}: {kind}, weights {weights}, images of {preprocess.size} pixels a side"


def unknown_tag(conf: ModelConf, wanted: str, options: Sequence[str]) -> str:
    """The error text for weights that a model does not have."""
    problem = f"model.pretrained={wanted}: {conf.name} has no such weights{nearest(wanted, options)}"
    if wanted == "bundled":
        bundled = f"only {glyphs.CLIP} and {glyphs.VIT} are bundled, so say which weights of {conf.name}"
        problem = f"model.pretrained=bundled: {bundled}"
    return f"{problem}; expected {', '.join([*options, 'none (random)'])} or a path"


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise a UserError if `image_size` is no multiple of `patch_size`: pixels at the edges would be ignored."""
    if image_size % patch_size:
        given = f"model.image_size={image_size} must be a multiple of the patch size, {patch_size}"
        raise UserError(f"{given}: {image_size // patch_size * patch_size or patch_size} is")


def side_of(size: Sequence[int] | int, name: str) -> int:
    """Pixels a side of square images; a UserError where height and width differ."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        mend = "finetune feeds square images, so set model.image_size"
        raise UserError(f"{name} takes images of {tuple(sides)} pixels; {mend}")
    return sides.pop()


def interpolation_of(word: str) -> str:
    """The interpolation for a library's word; bicubic in the place of those that finetune does not have."""
    return word if word in ("bilinear", "bicubic") else "bicubic"
