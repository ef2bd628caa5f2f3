"""Whether the right class is among the highest logits, image by image."""

import torch
from torch import Tensor


def top1(logits: Tensor, targets: Tensor) -> Tensor:
    """1.0 where the class with the highest score is right, of equal scores the first. (batch, classes) -> (batch,).

    Targets are class indices, int64 (batch,), or shares, (batch, classes). Of shares the classes with the largest one
    are right: any of several labels, and the larger part of two mixed images. No label: no class is right.
    """
    best = logits.argmax(dim=1)
    if targets.ndim == 1:
        return (best == targets).float()
    share, largest = targets.gather(1, best[:, None])[:, 0], targets.amax(dim=1)
    return ((share == largest) & (largest > 0)).float()


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the right class is among the five highest. (batch, classes), (batch,) -> (batch,).

    Of equal scores the class that comes first counts as higher, as `argmax` has it: `topk` leaves their order open, and
    in bfloat16 equal scores are common. A score that is NaN is never among them.
    """
    score = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead = (logits > score) | ((logits == score) & earlier)
    return ((ahead.sum(dim=1) < 5) & ~score[:, 0].isnan()).float()
