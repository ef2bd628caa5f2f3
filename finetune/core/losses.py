"""Training losses: one number for each image, so that every image weighs the same in a batch of any size.

Targets are class indices, int64 (batch,), or shares of every class, float (batch, classes): several labels an image
(each 0 or 1), or the mixtures of MixUp and CutMix. Each loss is computed in fp32.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config import Loss, TrainConf
from finetune.system.errors import UserError

# (logits (batch, classes), targets, label smoothing in [0, 1)) -> (batch,)
Criterion = Callable[[Tensor, Tensor, float], Tensor]


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, *, class_weights: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the right class. (batch, classes), targets -> (batch,).

    Of each target the share `label_smoothing` is spread evenly over all classes (Szegedy et al., arXiv:1512.00567).
    `class_weights`, (classes,), multiply each class's part of the loss. Torch's mean would divide by their sum over the
    batch; here the loss of an image does not depend on the other images.
    """
    logits = logits.float()
    return F.cross_entropy(logits, targets, class_weights, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, *, class_weights: Tensor | None = None
) -> Tensor:
    """Binary cross entropy of each class, averaged over classes. (batch, classes), targets -> (batch,).

    Shares lie in [0, 1] and need not add up to 1. Smoothing and `class_weights` are those of `cross_entropy`.
    """
    shares = _shares(targets, logits.shape[1], label_smoothing)
    return F.binary_cross_entropy_with_logits(logits.float(), shares, class_weights, reduction="none").mean(dim=1)


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    *,
    gamma_pos: float,
    gamma_neg: float,
    shift: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy that weighs easy absent labels down. (batch, classes), targets -> (batch,).

    Ridnik et al., arXiv:2009.14119: with p the sigmoid of a logit and q = max(p - shift, 0), a present label
    costs -(1 - p)^gamma_pos log p, an absent one -q^gamma_neg log(1 - q). Averaged over classes, where the paper sums:
    the factor changes gradient clipping and no step of AdamW. A share y in [0, 1] costs y times the first term plus
    1 - y times the second. Smoothing and `class_weights` are those of `cross_entropy`.
    """
    logits = logits.float()
    shares = _shares(targets, logits.shape[1], label_smoothing)
    present = torch.sigmoid(-logits).clamp(min=1e-30).pow(gamma_pos) * F.logsigmoid(logits)
    shifted = (torch.sigmoid(logits) - shift).clamp(min=0)
    # Without a shift the logarithm comes from the logit itself: 1 - p rounds to 0 in fp32 from a logit of 17 on.
    log_absent = torch.log1p(-shifted) if shift > 0 else F.logsigmoid(-logits)
    # `0 ** gamma` has an infinite slope for gamma below 1, so the power of a probability at 0 is set and not computed.
    focus = torch.where(shifted > 0, shifted, 1.0).pow(gamma_neg).where(shifted > 0, float(gamma_neg == 0))
    terms = -(shares * present + (1 - shares) * focus * log_absent)
    return (terms if class_weights is None else terms * class_weights).mean(dim=1)


def _shares(targets: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Targets as float32 (batch, classes), smoothed as in `cross_entropy`: each row keeps its sum."""
    shares = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets.float()
    return shares if label_smoothing == 0 else torch.lerp(shares, shares.mean(dim=1, keepdim=True), label_smoothing)


def loss_of(conf: TrainConf, *, is_multilabel: bool = False) -> Loss:
    """The loss that `train.loss` names; `auto` is `bce` where an image may have several labels or none, else `ce`.

    Raises:
        UserError: Cross entropy, which needs exactly one label an image, for several.
    """
    kind = conf.loss
    if kind == Loss.auto:
        return Loss.bce if is_multilabel else Loss.ce
    if kind == Loss.ce and is_multilabel:
        raise UserError("train.loss=ce needs exactly one label an image, these have several: use train.loss=bce or asl")
    return kind


def build_criterion(conf: TrainConf, *, is_multilabel: bool = False, class_weights: Tensor | None = None) -> Criterion:
    """The loss that `loss_of` finds, as a function; see there for errors."""
    kind = loss_of(conf, is_multilabel=is_multilabel)
    if kind == Loss.asl:
        loss = partial(asymmetric_loss, gamma_pos=conf.asl_gamma_pos, gamma_neg=conf.asl_gamma_neg)
        return partial(loss, shift=conf.asl_shift, class_weights=class_weights)
    return partial(cross_entropy if kind == Loss.ce else binary_cross_entropy, class_weights=class_weights)
