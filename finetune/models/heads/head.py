"""Classifiers on top of an image tower, and how they start: from class names, at random, or from upstream.

A random head draws its first values from torch's global generator. `app.run` seeds that with `seed` just before
`build_model`, so the same seed gives the same head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import TemplateSet, nearest
from finetune.system.errors import UserError

# The prompts that `model.templates` is without a word from the user.
DEFAULT_TEMPLATES = ("{}", "a photo of a {}.", "a photo of the {}.")
# How many prompts the text tower reads at once; bounds memory, changes nothing else.
PROMPTS_AT_ONCE = 256

Tokenizer = Callable[[list[str]], Tensor]


class Head(nn.Linear):
    """A linear classifier over image features; its tensors are `weight` and, where it has one, `bias`.

    Attributes:
        normalize: Whether features are scaled to length 1 first, as CLIP scores them.
        dropout: Probability of dropping a feature while training.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = True, normalize: bool = False, dropout: float = 0.0
    ) -> None:
        """A random head: weights from a normal of standard deviation 0.02 cut at 2 (ViT's own), bias 0.

        Args:
            in_features: Length of a feature vector.
            num_classes: Number of logits.
            bias: Whether each class has an offset; a zero-shot head has none.
            normalize: See the class.
            dropout: See the class; in [0, 1).
        """
        super().__init__(in_features, num_classes, bias=bias)
        self.normalize = normalize
        self.dropout = dropout
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits. (batch, in_features) -> (batch, classes).

        Towers that do not pool (open_clip's `pool_type='none'`, its cascaded and parallel attentional pools, timm's
        encoders) give (batch, tokens, in_features) or (batch, in_features, height, width): places are averaged.
        """
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        if features.ndim == 3:
            features = features.mean(dim=1)
        if self.normalize:
            features = F.normalize(features, dim=-1)
        # After the normalisation, which would undo dropout's rescaling.
        features = F.dropout(features, self.dropout, self.training)
        return super().forward(features)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take over a classifier's tensors. (classes, in_features), (classes) or None.

        Raises:
            ValueError: Shapes differ, or there is a bias on one side only.
        """
        theirs = (tuple(weight.shape), None if bias is None else tuple(bias.shape))
        ours = (tuple(self.weight.shape), None if self.bias is None else tuple(self.bias.shape))
        if theirs != ours:
            raise UserError(f"a classifier of weight and bias {theirs} does not fit a head of {ours}")
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself, with what this head adds."""
        return f"{super().extra_repr()}, normalize={self.normalize}, dropout={self.dropout}"


def expand_templates(templates: Sequence[str]) -> list[str]:
    """Prompts, with the names of sets replaced by what they stand for.

    `imagenet` are the 80 prompts that OpenAI published with CLIP, `simple` the 7 of them that do almost as well.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    sets: dict[str, Sequence[str]] = {
        TemplateSet.default: DEFAULT_TEMPLATES,
        TemplateSet.simple: [fill("{}") for fill in SIMPLE_IMAGENET_TEMPLATES],
        TemplateSet.imagenet: [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES],
    }
    return list(dict.fromkeys(prompt for template in templates for prompt in sets.get(template, [template])))


def read_class_names(path: Path | None, classes: Sequence[str]) -> list[str]:
    """What prompts call the classes: their own names, or those of a file.

    Args:
        path: A text file, UTF-8: a name a line in the order of the classes, or `CLASS<tab>NAME` in any order, where a
            class without a line keeps its own name. None for no file.
        classes: The data's own names in the order of the labels.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another number of names than classes, or a class that the data lacks.
    """
    if path is None:
        return list(classes)
    if not path.is_file():
        raise FileNotFoundError(f"model.class_names={path}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines and all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        unknown = [name for name in named if name not in classes]
        if unknown:
            raise UserError(
                f"model.class_names={path} names {unknown[0]!r}, no class of the data{nearest(unknown[0], classes)}"
            )
        return [named.get(name, name) for name in classes]
    if len(lines) != len(classes):
        raise UserError(
            f"model.class_names={path} holds {len(lines)} names and the data has {len(classes)} classes:"
            " give one name a line in class order, or CLASS<tab>NAME for some"
        )
    return lines


def class_prompts(classes: Sequence[str]) -> list[str]:
    """Class names as a sentence holds them: underscores of folder names become spaces.

    Raises:
        ValueError: Two classes would read the same, or one is empty; a text tower cannot tell them apart.
    """
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UserError(f"class names must differ for a zero-shot head; used twice: {', '.join(map(repr, repeated))}")
    if "" in names:
        raise UserError(f"class {names.index('')} has an empty name, which a zero-shot head cannot read")
    return names


@torch.no_grad()
def zeroshot_weight(clip: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The classifier that CLIP's text tower describes. -> (classes, embedding), float32.

    For each class the mean over templates of normalised text features, normalised again, times the logit scale
    (Radford et al., arXiv:2103.00020, section 3.1.4). The scale is folded in here, once: without it the logits of a
    normalised image would be about 100 times too small to train.

    Args:
        clip: A whole open_clip model, with `encode_text` and `logit_scale`.
        tokenizer: Its own tokenizer.
        classes: Class names in the order of the labels.
        templates: Prompts, each with `{}` where the class name goes, or names of sets of them.

    Raises:
        ValueError: Class names that a text tower cannot tell apart.
    """
    templates = expand_templates(templates)
    prompts = [template.replace("{}", name) for name in class_prompts(classes) for template in templates]
    device = next(clip.parameters()).device
    clip.eval()
    features = [
        clip.encode_text(tokenizer(prompts[i : i + PROMPTS_AT_ONCE]).to(device), normalize=True)  # type: ignore[operator]
        for i in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    means = torch.cat(features).float().reshape(len(classes), len(templates), -1).mean(dim=1)
    scale = clip.logit_scale.float().exp()  # type: ignore[operator]
    weight: Tensor = F.normalize(means, dim=-1) * scale
    return weight.cpu()


def zeroshot_head(
    clip: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    dropout: float = 0.0,
    bias: bool = False,
) -> Head:
    """A head that scores images as CLIP does, ready to be trained on: normalised features, no bias unless asked for.

    Args:
        clip: See `zeroshot_weight`, as for the next three.
        tokenizer: Its own tokenizer.
        classes: Class names in the order of the labels.
        templates: Prompts.
        dropout: Probability of dropping a feature while training.
        bias: Whether each class has an offset that learns, 0 at first.

    Raises:
        ValueError: Class names that a text tower cannot tell apart.
    """
    weight = zeroshot_weight(clip, tokenizer, classes, templates)
    head = Head(weight.shape[1], weight.shape[0], bias=bias, normalize=True, dropout=dropout)
    head.set(weight, torch.zeros(len(weight)) if bias else None)
    return head


def find_head(net: nn.Module) -> Head:
    """The one head of a network.

    Raises:
        ValueError: Its classifier is no linear layer, or it has two (a distilled ViT).
    """
    heads = [module for module in net.modules() if isinstance(module, Head)]
    if len(heads) != 1:
        raise UserError(
            f"{type(net).__name__} has {len(heads) or 'no'} linear classifier{'s' * (len(heads) != 1)}, not one:"
            " model.head=linear_probe needs exactly one; use model.head=random"
        )
    return heads[0]
