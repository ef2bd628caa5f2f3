"""Whether the output of the frozen layers is kept, and where: by what it takes, what it saves, and what is free."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config import Conf, PrefixCache, PrefixDtype
from finetune.data import Loader
from finetune.data.caches.entries import size_of
from finetune.data.streams import num_views
from finetune.prefix.feed import first_batch
from finetune.prefix.frozen import FrozenPrefix, overflow_safe
from finetune.system.errors import UserError
from finetune.system.memory import free_memory

GIB = 2**30
# Shares of what is free that are taken unasked: the rest is for training, and for others on the machine.
SHARE = {PrefixCache.device: 0.3, PrefixCache.ram: 0.5, PrefixCache.disk: 0.8}
# Bytes a second at which kept activations come back, at the least; slower than computing them, keeping is no use.
READ = {PrefixCache.device: 100e9, PrefixCache.ram: 2e9, PrefixCache.disk: 0.5e9}
READ_ONCE = "each would be read once"
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
        split: Its name.
        views: How many views of it.
        passes: How often each activation would be read.
        missing: Activations that a place has to find room for, of this split and of those that were settled before.
        total: The same with those that are there already.
        spare: Bytes that earlier runs of a sweep left at a place in memory, and that would go for these.
    """

    split: str
    views: int
    passes: float
    missing: Mapping[PrefixCache, int]
    total: Mapping[PrefixCache, int]
    spare: Mapping[PrefixCache, int]


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
        torch.cuda.synchronize(images.device)
    began = time.perf_counter()
    h = prefix.first(images)
    if on_gpu:
        torch.cuda.synchronize(images.device)
    seconds = (time.perf_counter() - began) / len(images)
    if wanted != PrefixDtype.auto:
        prefix.kept_as = DTYPES[wanted]
        if wanted == PrefixDtype.fp16 and not torch.isfinite(h.to(torch.float16)).all():
            raise UserError(
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
        views = "" if num_views(augment) else " augment.views=K"
        return f"MixUp and CutMix mix whole images; with augment.mixup=0 augment.cutmix=0{views} they could be kept"
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
        for wanted, room in _wanted_and_room(kind, size, need, device, folder, max_gib):
            if wanted > room:
                raise UserError(_too_small(kind, wanted, room, need, measured))
        return kind, f"prefix.cache={kind}"
    if read_once(conf, need.passes, shared=shared):
        return PrefixCache.none, READ_ONCE
    kinds = [PrefixCache.device] if device.type == "cuda" else []
    on_disk = [PrefixCache.disk] if _is_writable(_existing(folder)) else []
    computing = measured.seconds + measured.loading
    tried: dict[PrefixCache, list[tuple[float, float]]] = {}
    for kind in [*kinds, PrefixCache.ram, *on_disk]:
        reading = size / READ[kind]
        if reading >= computing:
            return PrefixCache.none, "computing them is as fast as reading them"
        pairs = _wanted_and_room(kind, size, need, device, folder, max_gib)
        if all(wanted <= SHARE[kind] * room for wanted, room in pairs):
            return kind, f"they fit, and computing takes {computing / reading:.0f} x longer"
        tried[kind] = pairs
    return PrefixCache.none, _fits_nowhere(tried, need, measured)


def read_once(conf: Conf, passes: float, *, shared: bool) -> bool:
    """Whether nobody asked to keep what is read once and never again."""
    return conf.prefix.cache == PrefixCache.auto and passes <= 1 and not shared


def is_roomy(kind: PrefixCache, measured: Measured, need: Need, device: torch.device) -> bool:
    """Whether a place in memory has room for what is missing beside what earlier runs left there.

    However many they are, they and this run together keep to the share of what would be free without them.
    """
    missing, total = need.missing[kind] * measured.bytes, need.total[kind] * measured.bytes
    left = need.spare[kind] + total - missing
    return missing == 0 or left + missing <= SHARE[kind] * (_free_memory(kind, device) + left)


def _wanted_and_room(
    kind: PrefixCache, size: int, need: Need, device: torch.device, folder: Path, max_gib: float
) -> list[tuple[float, float]]:
    """Bytes that are wanted of a place, and bytes that it has; on disk also of all entries there, and their limit."""
    missing, total = need.missing[kind] * size, need.total[kind] * size
    if kind != PrefixCache.disk:
        return [(missing, _free_memory(kind, device) + need.spare[kind])]
    if not missing:
        return []  # nothing will be written
    others = max(0, size_of(folder) - (total - missing))  # activations of other runs
    return [(total + others, max_gib * GIB), (missing, float(shutil.disk_usage(_existing(folder)).free))]


def _free_memory(kind: PrefixCache, device: torch.device) -> float:
    if kind == PrefixCache.device and device.type == "cuda":
        # What torch holds without using it, such as earlier runs' blocks, is there for new ones.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    available = free_memory()
    return float("inf") if available is None else float(available)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _fits_nowhere(tried: Mapping[PrefixCache, list[tuple[float, float]]], need: Need, measured: Measured) -> str:
    """Why `auto` keeps nothing: what each place lacks, and what would do."""
    lacks = []
    for kind, pairs in tried.items():
        wanted, room = next((wanted, room) for wanted, room in pairs if wanted > SHARE[kind] * room)
        lacks.append(f"{kind}: {wanted / GIB:.2f} GiB, of {SHARE[kind] * room / GIB:.2f} that may be taken unasked")
    tries = [f"prefix.cache={kind}" for kind, pairs in tried.items() if all(wanted <= room for wanted, room in pairs)]
    if PrefixCache.disk in tried:
        (wanted, bound), (missing, free) = tried[PrefixCache.disk]
        share = SHARE[PrefixCache.disk]
        if wanted > share * bound and missing <= share * free:
            tries.append(f"prefix.max_gib={math.ceil(wanted / share / GIB)}")
    tries += _smaller(need, measured)
    return f"they fit nowhere ({'; '.join(lacks)})" + (f". Would do: {', '.join(tries)}" if tries else "")


def _too_small(kind: PrefixCache, wanted: float, room: float, need: Need, measured: Measured) -> str:
    """What to say where activations do not fit: how much they need, and what would."""
    others = max(0.0, wanted - need.total[kind] * measured.bytes)
    images = max(0, int((room - others) // measured.bytes)) // need.views
    tries, beside = [], ""
    if kind == PrefixCache.disk:
        tries.append(f"prefix.max_gib={wanted / GIB + 1:.0f}, or more room on the disk")
    if others:
        tries.append("`finetune cache clear --kind activations`")
        beside = f" and the {others / GIB:.2f} GiB of other runs"
    else:
        tries.append("prefix.cache=disk")
    tries += [*_smaller(need, measured), "or prefix.cache=none"]
    shown = f" in {need.views} views" if need.views > 1 else ""
    return (
        f"prefix.cache={kind}: with those of {need.split}{beside} the activations need {wanted / GIB:.2f} GiB and"
        f" {room / GIB:.2f} may be taken, enough for {images:,} images{shown}. Try {', '.join(tries)}"
    )


def _smaller(need: Need, measured: Measured) -> list[str]:
    """What would make activations smaller."""
    views = ["fewer augment.views"] if need.views > 1 else []
    return [*views, *(["prefix.dtype=fp16, which takes half"] if measured.dtype == torch.float32 else [])]
