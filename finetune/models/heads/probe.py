"""A linear probe: a regularised logistic regression on frozen features. Fine-tuning can start from it (LP-FT).

A random head's first gradients distort good features, a fitted head's do not: Kumar et al., arXiv:2202.10054.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.core.layers import LayeredModel
from finetune.models.heads.head import find_head, mean_over_positions, read_by
from finetune.system.errors import UserError

# The strengths of the penalty, strongest first: each fit starts from the result of the one before, which saves steps.
STRENGTHS = tuple(10.0**exponent for exponent in range(1, -7, -1))
FEW, FOLDS = 100, 5  # below so many validation images, folds of the training images pick the penalty


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier; it takes features as the model gives them, not standardised."""

    weight: Tensor  # (classes, features)
    bias: Tensor  # (classes,)
    strength: float  # the penalty on squared weights with the lowest loss on images that the fit left out
    val_top1: float  # share of validation images that it labels correctly; without any, of the folds left out


def linear_probe(
    features: Tensor, labels: Tensor, val: tuple[Tensor, Tensor] | None = None, *, num_classes: int
) -> Probe:
    """Multinomial logistic regression with a squared penalty, fitted by L-BFGS.

    Features are (images, features), labels int64 (images,), and `val` has the same of the validation images. Minimises
    mean cross-entropy + strength / 2 * |W|^2 over features standardised by the training set; the bias has no penalty.
    Of `STRENGTHS` it takes the one with the lowest validation loss, since the most accurate one may be sure of much
    that is wrong, and fine-tuning from it has that to unlearn first. With fewer than `FEW` validation images, the loss
    is that of `FOLDS` folds of the training images. No features, or some that are not finite, are a UserError.
    """
    if not len(features) or (len(features) < FOLDS if val is None else not len(val[0])):
        sizes = f"{len(features)} to train on" + (f" and {len(val[0])} to validate" if val is not None else "")
        raise UserError(f"a linear probe needs images: got {sizes}")
    if not (features.isfinite().all() and (val is None or val[0].isfinite().all())):
        raise UserError("a linear probe needs finite features: the frozen model gives NaN or infinity")
    features = features.float()
    fits = list(_fits(features, labels, num_classes))
    use_folds = len(features) >= FOLDS and (val is None or len(val[0]) < FEW)
    of_val = None if val is None else _scores(fits, val[0].float(), val[1])
    losses, right = _in_folds(features, labels, num_classes) if use_folds or of_val is None else of_val
    best = int(losses.mean(dim=0).argmin())
    right = right if of_val is None else of_val[1]
    return Probe(*fits[best], STRENGTHS[best], right.mean(dim=0)[best].item())


def _fits(features: Tensor, labels: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and bias of each strength, for features as they are."""
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    x = (features - mean) / deviation
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    for strength in STRENGTHS:
        weight, bias = _fit(x, labels, weight, bias, strength)
        plain = weight / deviation
        yield plain, bias - plain @ mean


def _scores(fits: Iterable[tuple[Tensor, Tensor]], features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image under each fit, and whether its label is right, 0 or 1; both (images, fits)."""
    losses, right = [], []
    for weight, bias in fits:
        logits = F.linear(features, weight, bias)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        right.append((logits.argmax(dim=1) == labels).float())
    return torch.stack(losses, dim=1), torch.stack(right, dim=1)


def _in_folds(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """`_scores` of each image under fits to the other folds, which are cut class by class."""
    order = labels.argsort(stable=True)  # neighbours have the same class, and go to different folds
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % FOLDS
    parts = []
    for number in range(FOLDS):
        out = fold == number
        fits = _fits(features[~out], labels[~out], num_classes)
        parts.append(_scores(fits, features[out], labels[out]))
    losses, right = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, right


def _fit(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    weight, bias = (tensor.clone().requires_grad_(True) for tensor in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + strength / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


@torch.no_grad()
def features_of(model: LayeredModel, images: Tensor) -> Tensor:
    """Features that the only head of a model in eval mode reads. (batch, 3, height, width) -> (batch, n), float32."""
    head = find_head(model.net)
    features = mean_over_positions(read_by(head, lambda: model(images)).float())
    return F.normalize(features, dim=-1) if head.normalize else features


def features_of_split(
    model: LayeredModel, batches: Iterable[tuple[Tensor, Tensor, Tensor]], autocast: AbstractContextManager[object]
) -> tuple[Tensor, Tensor]:
    """(images, features) and (images,) labels of all `batches`, on the CPU; leaves the model in eval mode."""
    model.eval()
    features, labels = [], []
    for images, targets, _ in batches:
        with autocast, torch.no_grad():
            features.append(features_of(model, images).cpu())
        labels.append(targets.cpu())
    return torch.cat(features), torch.cat(labels)
