"""The first bias of a classifier that gives several labels an image: each class is then a yes-or-no question.

A zero-shot head gives logits of 15 to 30 for every image, so every sigmoid is 1, and the first gradients would spoil
the network only to lower the logits. A bias for each class prevents that: the mean sigmoid of a class starts at the
share of training images with its label. The order of images within a class, so average precision, stays as it is.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from finetune.config import Family, HeadKind, ModelConf
from finetune.core.layers import LayeredModel
from finetune.models.heads.head import Head

# How many images the bias is fitted on. The shares of labels are counted over all training images.
IMAGES = 2048


def with_head_bias(conf: ModelConf, *, is_multilabel: bool) -> ModelConf:
    """The same settings, with a bias in a zero-shot head where images have several labels."""
    may_read_names = conf.family == Family.clip and conf.head in (HeadKind.auto, HeadKind.zeroshot)
    return replace(conf, head_bias=True) if is_multilabel and may_read_names else conf


@torch.no_grad()
def set_offsets(
    model: LayeredModel,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    labels: Tensor,
    autocast: AbstractContextManager[object],
    start: int = 0,
) -> None:
    """Set the head's bias so that each class's mean sigmoid equals its share of the training labels.

    Does nothing where the model has no `Head` with a bias, or two. `labels` are all training labels, 0 or 1, (images,
    classes). Of `batches`, which hold the activations of the layers below `start`, the inputs of `IMAGES` images or all
    are read. Leaves the model in training mode.
    """
    heads = [module for module in model.net.modules() if isinstance(module, Head) and module.bias is not None]
    if len(heads) != 1:
        return
    model.eval()
    found: list[Tensor] = []
    for inputs, _, _ in batches:
        with autocast:
            logits = model(inputs, start=start)
        found.append(logits.double().cpu())
        if sum(map(len, found)) >= IMAGES:
            break
    model.train()
    heads[0].bias.add_(offsets(torch.cat(found), labels).to(heads[0].bias))


def offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """The number to add to each class's logits so that their mean sigmoid is the class's share. float64 (classes,).

    `logits` are float64 (n, classes), `labels` 0 or 1, (m, classes). The share is (images with the label + 1) /
    (images + 2), so it is never 0 or 1.
    """
    wanted = (labels.double().sum(dim=0) + 1) / (len(labels) + 2)
    low, high = -logits.amax(dim=0) - 50, -logits.amin(dim=0) + 50
    # The mean sigmoid rises with the offset, so bisection finds it.
    for _ in range(60):
        middle = (low + high) / 2
        is_low = torch.sigmoid(logits + middle).mean(dim=0) < wanted
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (low + high) / 2
