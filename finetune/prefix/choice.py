"""Whether the output of the frozen layers is kept, and where: by what it takes, what it saves, and what is free."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config import Conf, Precision, PrefixCache, PrefixDtype
from finetune.data import Loader
from finetune.data.memory import free_memory
from finetune.data.streams import num_views
from finetune.prefix.feed import first_batch
from finetune.prefix.frozen import FrozenPrefix, overflow_safe

GIB = 2**30
# Shares of what is free that are taken unasked: the rest is for training, and for others on the machine.
SHARE = {PrefixCache.device: 0.3, PrefixCache.ram: 0.5, PrefixCache.disk: 0.8}
# Bytes a second at which kept activations come back, at the least; slower than computing them, keeping is no use.
READ = {PrefixCache.device: 100e9, PrefixCache.ram: 2e9, PrefixCache.disk: 0.5e9}
DTYPES = {PrefixDtype.fp32: torch.float32, PrefixDtype.fp16: torch.float16, PrefixDtype.bf16: torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """What the frozen layers cost here.

    Attributes:
        seconds: Of one image, loading included.
        bytes: Of one image's activations, as they are kept.
    """

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Need:
    """What keeping a split would take.

    Attributes:
        images: Activations to keep, of all views.
        passes: How often each would be read.
    """

    images: int
    passes: float


def measure(prefix: FrozenPrefix, loader: Loader, wanted: PrefixDtype, dtype: torch.dtype) -> Measured:
    """Run the frozen layers on one batch, which is remembered, and settle what they are rounded to.

    Args:
        prefix: Its `kept_as` is set.
        loader: Of validation images.
        wanted: `prefix.dtype`.
        dtype: What the run computes in.

    Raises:
        ValueError: The values overflow the dtype that was asked for.
    """
    began = time.perf_counter()
    images, _, _ = first_batch(loader)
    h = prefix.first(images)
    seconds = (time.perf_counter() - began) / len(images)
    if wanted != PrefixDtype.auto:
        prefix.kept_as = DTYPES[wanted]
        if wanted == PrefixDtype.fp16 and not torch.isfinite(h.to(torch.float16)).all():
            raise ValueError(
                f"prefix.dtype=fp16: the frozen layers give values up to {h.abs().amax():.3g}, and fp16 ends at 65,504;"
                " use prefix.dtype=bf16, fp32 or auto"
            )
    elif dtype != torch.float32:
        prefix.kept_as = torch.float16 if overflow_safe(h) else torch.bfloat16
    return Measured(seconds, h[0].numel() * prefix.kept_dtype(h.dtype).itemsize)


def why_not_in_training(conf: Conf) -> str | None:
    """Why the frozen layers see other images in every epoch, and what would change that; None where they do not."""
    augment = conf.augment
    if augment.mixup or augment.cutmix:
        return "MixUp and CutMix mix whole images; with augment.mixup=0 augment.cutmix=0 they could be kept"
    if conf.data.epoch_images:
        return "data.epoch_images draws images with replacement, so there is no telling how often an epoch shows one"
    if num_views(augment) == 0:
        return "every epoch shows fresh views; augment.views=K recycles K of them, which can be kept"
    return None


def choose(
    conf: Conf, measured: Measured, need: Need, device: torch.device, folder: Path, *, shared: bool
) -> tuple[PrefixCache, str]:
    """Where to keep activations, and why, in words.

    Args:
        conf: `prefix.cache` and its bound.
        measured: What the layers cost.
        need: What would be kept.
        device: Where training runs.
        folder: Of activations on disk.
        shared: Whether other runs will read them, too.

    Raises:
        ValueError: The place that was asked for is too small.
    """
    kind, size = conf.prefix.cache, need.images * measured.bytes
    if kind == PrefixCache.none:
        return kind, "prefix.cache=none"
    if kind != PrefixCache.auto:
        room = free(kind, device, folder, conf.prefix.max_gib)
        if size > room:
            raise ValueError(_too_small(conf, kind, size, room, measured))
        return kind, f"prefix.cache={kind}"
    if need.passes <= 1 and not shared:
        return PrefixCache.none, "each would be read once"
    kinds = [PrefixCache.device] if device.type == "cuda" else []
    on_disk = [PrefixCache.disk] if _is_writable(_existing(folder)) else []
    for kind in [*kinds, PrefixCache.ram, *on_disk]:
        room = SHARE[kind] * free(kind, device, folder, conf.prefix.max_gib)
        if size <= room and measured.bytes / READ[kind] < measured.seconds:
            return (
                kind,
                f"they fit, and computing takes {measured.seconds / (measured.bytes / READ[kind]):.0f} x longer",
            )
        if measured.bytes / READ[kind] >= measured.seconds:
            return PrefixCache.none, "computing them is as fast as reading them"
    return (
        PrefixCache.none,
        f"{size / GIB:.1f} GiB fit nowhere unasked: see prefix.cache, prefix.max_gib, augment.views",
    )


def free(kind: PrefixCache, device: torch.device, folder: Path, max_gib: float) -> float:
    """Bytes that a cache of this kind may take."""
    if kind == PrefixCache.device and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if kind in (PrefixCache.ram, PrefixCache.device):
        available = free_memory()
        return float("inf") if available is None else float(available)
    return min(max_gib * GIB, float(shutil.disk_usage(_existing(folder)).free))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _too_small(conf: Conf, kind: PrefixCache, size: int, room: float, measured: Measured) -> str:
    """What to say where activations do not fit: how much they need, and what would."""
    images = int(room // measured.bytes)
    tries = []
    if kind != PrefixCache.disk:
        tries.append("prefix.cache=disk")
    elif conf.prefix.max_gib * GIB < size:
        tries.append(f"prefix.max_gib={size / GIB + 1:.0f}")
    if num_views(conf.augment) > 1:
        tries.append("fewer augment.views")
    if conf.precision == Precision.fp32 or conf.prefix.dtype == PrefixDtype.fp32:
        tries.append("prefix.dtype=fp16, which takes half")
    tries.append("or prefix.cache=none")
    return (
        f"prefix.cache={kind}: the activations need {size / GIB:.2f} GiB and {room / GIB:.2f} may be taken, enough for"
        f" {images:,} images. Try {', '.join(tries)}"
    )
