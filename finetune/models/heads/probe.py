"""A linear probe: a regularised logistic regression on frozen features. Fine-tuning can start from it (LP-FT).

A random head's first gradients distort good features, a fitted head's do not: Kumar et al., arXiv:2202.10054.
"""

from collections.abc import Iterable
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


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier; it takes features as the model gives them, not standardised."""

    weight: Tensor  # (classes, features)
    bias: Tensor  # (classes,)
    strength: float  # the penalty on squared weights with the best validation accuracy
    val_top1: float  # share of validation images that the classifier labels correctly


def linear_probe(features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor, num_classes: int) -> Probe:
    """Multinomial logistic regression with a squared penalty, fitted by L-BFGS.

    Features are (images, features), labels int64 (images,). Minimises mean cross-entropy + strength / 2 * |W|^2 over
    features standardised by the training set, for each strength in `STRENGTHS`; the bias has no penalty. Returns the
    fit with the best validation accuracy, and of equal accuracies the one with the lowest validation loss. No features,
    or some that are not finite, are a UserError.
    """
    if not len(features) or not len(val_features):
        sizes = f"{len(features)} to train on and {len(val_features)} to validate"
        raise UserError(f"a linear probe needs images: got {sizes}")
    if not (features.isfinite().all() and val_features.isfinite().all()):
        raise UserError("a linear probe needs finite features: the frozen model gives NaN or infinity")
    features, val_features = features.float(), val_features.float()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    x, val_x = (features - mean) / deviation, (val_features - mean) / deviation
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    found: list[tuple[float, float, float, Tensor, Tensor]] = []
    for strength in STRENGTHS:
        weight, bias = _fit(x, labels, weight, bias, strength)
        logits = F.linear(val_x, weight, bias)
        top1 = (logits.argmax(dim=1) == val_labels).double().mean().item()
        found.append((top1, -F.cross_entropy(logits, val_labels).item(), strength, weight, bias))
    top1, _, strength, weight, bias = max(found, key=lambda fit: fit[:2])
    weight = weight / deviation
    return Probe(weight, bias - weight @ mean, strength, top1)


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
