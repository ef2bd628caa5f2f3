"""How much of a GPU training uses: the work that its images need, divided by the work that the GPU can do.

Model FLOP utilisation (MFU) as PaLM defines it (Chowdhery et al., arXiv:2204.02311, appendix B), except that the peak
is measured here instead of taken from a data sheet.
"""

import time
from dataclasses import dataclass

import torch

from finetune.core.cost import count_flops
from finetune.core.layers import LayeredModel

REPEATS = 10


@dataclass(frozen=True)
class Utilisation:
    """The work of one image, and the speed of the device."""

    training: float  # FLOP of one training image, if all layers run
    frozen: float  # the part of them in the frozen layers, which cached activations save
    peak: float  # FLOP/s of the device

    def share(self, images_per_s: float, hits: float) -> float:
        """The share of the peak in use; `hits` is the share of images whose activations were cached."""
        return (self.training - hits * self.frozen) * images_per_s / self.peak


def measure_utilisation(model: LayeredModel, size: int, *, device: torch.device, dtype: torch.dtype) -> Utilisation:
    """Count the work of one image, and time a matrix product on `device`.

    Layers that `train.recompute` runs twice count once, since images do not need the second time. The `model` is on
    the meta device, with the layers frozen that the run freezes, and is changed to not recompute; images have
    `size` pixels a side; the forward pass computes in `dtype`.
    """
    model.recompute = False
    flops = count_flops(model, size)
    return Utilisation(flops.training, flops.frozen, peak(device, dtype))


def peak(device: torch.device, dtype: torch.dtype, *, side: int = 4096) -> float:
    """FLOP/s of the product of two square matrices with `side` rows, the fastest of `REPEATS`."""
    own = torch.Generator().manual_seed(0)  # the random numbers of the run stay as they would be without this
    left, right = (torch.randn(side, side, generator=own).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        began = _now(device)
        left @ right
        best = min(best, _now(device) - began)
    return 2 * side**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
