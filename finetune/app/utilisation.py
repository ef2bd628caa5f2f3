"""How much of a GPU training uses: the work that its images need, over the work that the GPU can do.

Model FLOP utilisation as PaLM defines it (Chowdhery et al., arXiv:2204.02311, appendix B), over a peak measured here
and not the one of a data sheet.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from finetune.app.build import Run
from finetune.core.cost import count_flops
from finetune.core.freezing import set_up_layers
from finetune.models import build_model

SIDE = 4096  # of the matrices whose product is the peak
REPEATS = 10


@dataclass(frozen=True)
class Utilisation:
    """What an image needs, and what the device can do.

    Attributes:
        training: FLOP of one training image, all layers run.
        frozen: Of these, what kept activations save.
        peak: FLOP/s.
    """

    training: float
    frozen: float
    peak: float

    def share(self, images_per_s: float, hits: float) -> float:
        """Of the peak, at this speed, where `hits` is the share of images whose frozen layers did not run."""
        return (self.training - hits * self.frozen) * images_per_s / self.peak


def measure(run: Run) -> Utilisation:
    """Count the work on a model of the run's kind without memory, and time a product on its device.

    What `train.recompute` computes twice counts once: it is no work that an image needs.
    """
    meta = build_model(run.model_conf, run.source.classes, device="meta").model
    set_up_layers(meta, run.conf.optim, train=run.conf.train)
    meta.recompute = False
    flops = count_flops(meta, run.built.preprocess.size)
    return Utilisation(flops.training, flops.frozen, peak(run.device, run.dtype))


def peak(device: torch.device, dtype: torch.dtype, *, side: int = SIDE) -> float:
    """FLOP/s of a product of two square matrices, the best of some."""
    own = torch.Generator().manual_seed(0)  # the run's own draws go on as if nothing had been measured
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
