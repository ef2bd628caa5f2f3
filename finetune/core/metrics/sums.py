"""Exact means over examples, whatever the sizes of the batches."""

from typing import Any

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums: float64, which loses no digit of a sum over ImageNet; MPS has only float32."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sums:
    """Sums over examples, on the device, so that a training step does not wait for it; `means` reads them."""

    def __init__(self, device: torch.device) -> None:
        """Start empty on `device`."""
        self.device = device
        self.dtype = sum_dtype(device)
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
