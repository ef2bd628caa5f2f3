"""How many loader processes: as many as keep the device fed, by measurement."""

from __future__ import annotations

import math
import time

import torch

from finetune.system.processors import cores

MAX_WORKERS = 16
SAMPLE_S = 0.3  # how long is measured
# Images a second that a fast device takes of a small model; more would not be waited for.
DEVICE_RATE = 4000.0
# Shares of one core below which a process of its own costs more than it gives.
WORTH = 0.25


def choose_workers(cost_s: float, device: torch.device) -> int:
    """Loader processes for images that take `cost_s` seconds of one core each.

    On the CPU the model uses all cores itself: a few processes take what it leaves at the ends of its operations.
    """
    if device.type == "cpu":
        return 0 if cost_s < 1e-3 else min(2, cores() // 4)
    needed = cost_s * DEVICE_RATE
    return 0 if needed < WORTH else min(math.ceil(needed), cores(), MAX_WORKERS)


class Stopwatch:
    """Seconds an image, of as many images as fit into SAMPLE_S."""

    def __init__(self) -> None:
        """Start now."""
        self._began = time.perf_counter()
        self._images = 0

    def lap(self, images: int) -> bool:
        """So many more were made; True: that is enough."""
        self._images += images
        return time.perf_counter() - self._began > SAMPLE_S

    @property
    def cost_s(self) -> float:
        """Of one image."""
        return (time.perf_counter() - self._began) / max(1, self._images)
