"""Several labels an image: where each class's yes-or-no question starts.

A zero-shot head gives scale times cosine, for CLIP 15 to 30 whatever the image: the sigmoid of that is 1 everywhere,
and binary cross entropy would tear at every weight to bring it down. So the head gets an offset for each class, under
which the model begins by answering yes as often as the training labels do. Ranking images by one class, and so average
precision, is untouched by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from finetune.config import Family, HeadKind, ModelConf
from finetune.core.layers import LayeredModel
from finetune.models.heads.head import Head

# Images that the offsets are fitted on; how many labels there are is counted over all.
IMAGES = 2048


def model_settings(conf: ModelConf, *, is_multilabel: bool) -> ModelConf:
    """The settings to build the model with: several labels an image need a head with offsets."""
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
    """Set the bias of the head so that the mean sigmoid of each class is its share of the training labels.

    Nothing happens to a model without a head of ours, or one without a bias.

    Args:
        model: Changed in place; left in training mode.
        batches: Training images; the first `IMAGES` of them are looked at.
        labels: All training labels, (n, classes), 0 or 1.
        autocast: Context of the forward pass.
        start: Id of the first layer to run; the batches hold what those below give.
    """
    heads = [module for module in model.net.modules() if isinstance(module, Head) and module.bias is not None]
    if len(heads) != 1:
        return
    model.eval()
    seen: list[Tensor] = []
    for inputs, _, _ in batches:
        with autocast:
            logits = model(inputs, start=start)
        seen.append(logits.double().cpu())
        if sum(map(len, seen)) >= IMAGES:
            break
    model.train()
    heads[0].bias.add_(offsets(torch.cat(seen), labels).to(heads[0].bias))


def offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """What to add to each class's scores for their mean sigmoid to be the class's share. float64 (classes,).

    The share is (images with the label + 1) / (images + 2), so that no class begins at never or always.

    Args:
        logits: float64 (n, classes).
        labels: (m, classes), 0 or 1.
    """
    wanted = (labels.double().sum(dim=0) + 1) / (len(labels) + 2)
    low, high = -logits.amax(dim=0) - 50, -logits.amin(dim=0) + 50
    for _ in range(60):  # the mean sigmoid rises with the offset: halve the interval
        middle = (low + high) / 2
        is_low = torch.sigmoid(logits + middle).mean(dim=0) < wanted
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (low + high) / 2
