"""Whether the output of the frozen layers is kept, and where: by what it takes, what it saves, and what is free."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune.config import Conf, PrefixCache, PrefixDtype
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
        seconds: Of one image in the frozen layers.
        loading: Seconds until it is there, with the others of a batch.
        bytes: Of one image's activations, as they are kept.
        dtype: As they are kept.
    """

    seconds: float
    loading: float
    bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Need:
    """What keeping a split would take.

    Attributes:
        images: Activations to keep, of all views.
        passes: How often each would be read.
        there: How many of them are kept already, by place: they need no room.
        beside: How many of another split are still to come, by place: they need room, too.
        spare: Bytes in memory, by place, that earlier runs of a sweep left, and that would go for these.
    """

    images: int
    passes: float
    there: Mapping[PrefixCache, int] = field(default_factory=dict)
    beside: Mapping[PrefixCache, int] = field(default_factory=dict)
    spare: Mapping[PrefixCache, int] = field(default_factory=dict)

    def missing(self, kind: PrefixCache) -> int:
        """Activations that a place still has to find room for."""
        return self.images - self.there.get(kind, 0) + self.beside.get(kind, 0)


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
    images, _, _ = first_batch(loader)
    on_gpu = images.device.type == "cuda"
    if on_gpu:  # the first pass also loads kernels
        prefix.first(images)
        prefix.forget()
        torch.cuda.synchronize()
    began = time.perf_counter()
    h = prefix.first(images)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / len(images)
    if wanted != PrefixDtype.auto:
        prefix.kept_as = DTYPES[wanted]
        if wanted == PrefixDtype.fp16 and not torch.isfinite(h.to(torch.float16)).all():
            raise ValueError(
                f"prefix.dtype=fp16: the frozen layers give values up to {h.abs().amax():.3g}, and fp16 ends at 65,504;"
                " use prefix.dtype=bf16, fp32 or auto"
            )
    elif dtype != torch.float32 and h.dtype == torch.float32:
        prefix.kept_as = torch.float16 if overflow_safe(h) else torch.bfloat16
    kept_as = prefix.kept_as or h.dtype
    return Measured(seconds, loader.seconds_per_image(), h[0].numel() * kept_as.itemsize, kept_as)


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
    kind, size, max_gib = conf.prefix.cache, measured.bytes, conf.prefix.max_gib
    if kind != PrefixCache.auto:
        wanted, room = need.missing(kind) * size, _room(kind, measured, need, device, folder, max_gib)
        if wanted > room:
            kept = need.there.get(kind, 0) * size
            raise ValueError(_too_small(conf, kind, wanted + kept, room + kept, measured))
        return kind, f"prefix.cache={kind}"
    if need.passes <= 1 and not shared:
        return PrefixCache.none, "each would be read once"
    kinds = [PrefixCache.device] if device.type == "cuda" else []
    on_disk = [PrefixCache.disk] if _is_writable(_existing(folder)) else []
    computing = measured.seconds + measured.loading
    for kind in [*kinds, PrefixCache.ram, *on_disk]:
        reading = size / READ[kind]
        if reading >= computing:
            return PrefixCache.none, "computing them is as fast as reading them"
        if need.missing(kind) * size <= SHARE[kind] * _room(kind, measured, need, device, folder, max_gib):
            return kind, f"they fit, and computing takes {computing / reading:.0f} x longer"
    return (
        PrefixCache.none,
        f"{need.images * size / GIB:.1f} GiB fit nowhere unasked: see prefix.cache, prefix.max_gib, augment.views",
    )


def is_roomy(kind: PrefixCache, measured: Measured, need: Need, device: torch.device) -> bool:
    """Whether a place in memory has room for what is missing beside what earlier runs left there."""
    return need.missing(kind) * measured.bytes <= SHARE[kind] * _free_memory(kind, device)


def _room(
    kind: PrefixCache, measured: Measured, need: Need, device: torch.device, folder: Path, max_gib: float
) -> float:
    """Bytes that a place may take beyond those that it has of `need` already."""
    if kind != PrefixCache.disk:
        return _free_memory(kind, device) + need.spare.get(kind, 0)
    bound = max_gib * GIB - need.there.get(kind, 0) * measured.bytes
    return min(bound, float(shutil.disk_usage(_existing(folder)).free))


def _free_memory(kind: PrefixCache, device: torch.device) -> float:
    if kind == PrefixCache.device and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = free_memory()
    return float("inf") if available is None else float(available)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _too_small(conf: Conf, kind: PrefixCache, size: int, room: float, measured: Measured) -> str:
    """What to say where activations do not fit: how much they need, and what would."""
    views = max(1, num_views(conf.augment))
    images = int(room // measured.bytes) // views
    tries = []
    if kind != PrefixCache.disk:
        tries.append("prefix.cache=disk")
    elif conf.prefix.max_gib * GIB < size:
        tries.append(f"prefix.max_gib={size / GIB + 1:.0f}")
    if views > 1:
        tries.append("fewer augment.views")
    if measured.dtype == torch.float32:
        tries.append("prefix.dtype=fp16, which takes half")
    tries.append("or prefix.cache=none")
    return (
        f"prefix.cache={kind}: the activations need {size / GIB:.2f} GiB and {room / GIB:.2f} may be taken, enough for"
        f" {images:,} images{f' in {views} views' if views > 1 else ''}. Try {', '.join(tries)}"
    )
