"""Metrics per example and their exact means: an uneven last batch, or none, changes nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of the right class in fp32. (batch, classes), (batch,) -> (batch,)"""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the arg-max class is right. (batch, classes), (batch,) -> (batch,)"""
    return (logits.argmax(dim=1) == labels).float()


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the right class is among the five highest. (batch, classes), (batch,) -> (batch,)"""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).float()


class Sums:
    """Sums over examples, kept on the device so that a step never waits for it; `means` reads them."""

    def __init__(self, device: torch.device) -> None:
        """Start empty on `device`."""
        self.device = device
        # float64 holds a sum of ImageNet's losses exactly enough; MPS has no float64.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals: dict[str, Tensor] = {}
        self.count = 0

    def add(self, **values: Tensor) -> None:
        """Add per-example values, each (batch,), of one batch."""
        for name, value in values.items():
            total = value.detach().to(self.dtype).sum()
            self.totals[name] = self.totals[name] + total if name in self.totals else total
        self.count += len(next(iter(values.values())))

    def means(self) -> dict[str, float]:
        """Mean of each value over all examples so far. Waits for the device."""
        return {name: (total / self.count).item() for name, total in self.totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint in the middle of an epoch."""
        return {"count": self.count, "totals": {name: total.cpu() for name, total in self.totals.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.count = state["count"]
        self.totals = {name: total.to(self.device) for name, total in state["totals"].items()}
