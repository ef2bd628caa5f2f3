"""What the frozen layers cost on this machine, measured on one batch."""

import time
from dataclasses import dataclass

import torch

from finetune.config import PrefixDtype
from finetune.data import Loader
from finetune.prefix.frozen import FrozenPrefix, overflow_safe
from finetune.system.errors import UserError

DTYPES = {PrefixDtype.fp32: torch.float32, PrefixDtype.fp16: torch.float16, PrefixDtype.bf16: torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """The cost of the frozen layers."""

    seconds: float  # that one image takes in the frozen layers
    loading: float  # seconds to load and decode one image
    bytes: int  # of one image's activations at the boundary
    dtype: torch.dtype  # in which activations at the boundary are stored


def measure(prefix: FrozenPrefix, loader: Loader, wanted: PrefixDtype, dtype: torch.dtype) -> Measured:
    """Time the frozen layers on the first batch of `loader`, and pick the precision of their activations.

    `wanted` is the setting `prefix.dtype`; the run computes in `dtype`. Raises UserError if the activations overflow
    the precision that was asked for.
    """
    images, _, _ = next(loader.epoch(0))
    loader.close()
    on_gpu = images.device.type == "cuda"
    if on_gpu:  # the first pass also loads kernels
        prefix.compute(images)
        torch.cuda.synchronize(images.device)
    began = time.perf_counter()
    h = prefix.compute(images)
    if on_gpu:
        torch.cuda.synchronize(images.device)
    seconds = (time.perf_counter() - began) / len(images)
    stored_as = h.dtype
    if wanted != PrefixDtype.auto:
        stored_as = DTYPES[wanted]
        if stored_as == torch.float16 and not torch.isfinite(h.to(torch.float16)).all():
            largest = f"the frozen layers give values up to {h.abs().amax():.3g}, and fp16 ends at 65,504"
            raise UserError(f"prefix.dtype=fp16: {largest}; use prefix.dtype=bf16, fp32 or auto")
    elif dtype != torch.float32 and h.dtype == torch.float32:
        stored_as = torch.float16 if overflow_safe(h) else torch.bfloat16
    return Measured(seconds, loader.seconds_per_image(), h[0].numel() * stored_as.itemsize, stored_as)
