"""The choice of a place for activations: by the room that they need, the time that they save and the room there is."""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config import PrefixCache, PrefixConf
from finetune.data.caches.entries import GIB, size_of
from finetune.prefix.measuring import Measured
from finetune.system.errors import UserError
from finetune.system.limits import in_bytes
from finetune.system.memory import free_memory

# Shares of the free room that prefix.cache=auto takes; training and other programs need the rest.
SHARE = {PrefixCache.device: 0.3, PrefixCache.ram: 0.5, PrefixCache.disk: 0.8}
# Bytes a second at which cached activations are read, at the least. A cache slower than computing them is of no use.
READ = {PrefixCache.device: 100e9, PrefixCache.ram: 2e9, PrefixCache.disk: 0.5e9}


@dataclass(frozen=True)
class RoomNeeded:
    """How many activations each place would have to hold if a split was cached there."""

    split: str
    views: int  # of each image
    missing: Mapping[PrefixCache, int]  # still to be computed, for this split and those planned before
    total: Mapping[PrefixCache, int]  # the same with the activations that the place already holds
    spare: Mapping[PrefixCache, int]  # bytes in each memory that earlier jobs of a sweep left, and that may be freed


def choose_place(
    conf: PrefixConf, measured: Measured, need: RoomNeeded, device: torch.device, folder: Path
) -> tuple[PrefixCache, str]:
    """Return where to cache the activations `need`, or `none`, and the reason in words.

    `conf` has the place that the user asked for, and the limit of the disk; training runs on `device`; activations on
    disk are in `folder`. Raises UserError if the place that the user asked for is too small.
    """
    computing = measured.seconds + measured.loading
    lacking, tries = [], []
    for kind in _places(device, folder) if conf.cache == PrefixCache.auto else [conf.cache]:
        wanted = need.missing[kind] * measured.bytes
        if kind == PrefixCache.disk:
            room = max(0.0, min(conf.max_gib * GIB - size_of(folder), shutil.disk_usage(_existing(folder)).free))
        else:
            room = _free_memory(kind, device) + need.spare[kind]
        if kind == conf.cache and wanted > room:
            raise UserError(_too_small(kind, wanted, room, need, measured, size_of(folder)))
        if kind == conf.cache:
            return kind, f"prefix.cache={kind}"
        reading, share = measured.bytes / READ[kind], SHARE[kind]
        if reading >= computing:
            return PrefixCache.none, "computing them is as fast as reading them"
        if wanted <= share * room:
            return kind, f"they fit, and computing takes {computing / reading:.0f} x longer"
        lacking.append(f"{kind}: {in_bytes(wanted)}, and auto takes at most {in_bytes(share * room)}")
        if wanted <= room:
            tries.append(f"prefix.cache={kind}")
        if kind == PrefixCache.disk and wanted <= share * shutil.disk_usage(_existing(folder)).free:
            tries.append(f"prefix.max_gib={math.ceil((wanted / share + size_of(folder)) / GIB)}")
    tries += _smaller(need, measured)
    would_do = f". Would do: {', '.join(tries)}" if tries else ""
    return PrefixCache.none, f"they fit nowhere ({'; '.join(lacking)}){would_do}"


def fits_beside_others(kind: PrefixCache, measured: Measured, need: RoomNeeded, device: torch.device) -> bool:
    """Whether memory holds the missing activations beside those that earlier jobs of a sweep left there.

    All of them together keep to the share of what would be free without them.
    """
    missing, total = need.missing[kind] * measured.bytes, need.total[kind] * measured.bytes
    present = need.spare[kind] + total - missing
    return missing == 0 or present + missing <= SHARE[kind] * (_free_memory(kind, device) + present)


def _places(device: torch.device, folder: Path) -> list[PrefixCache]:
    """The places that `auto` may pick, fastest first."""
    parent = _existing(folder)
    on_device = [PrefixCache.device] if device.type == "cuda" else []
    on_disk = [PrefixCache.disk] if parent.is_dir() and os.access(parent, os.W_OK) else []
    return [*on_device, PrefixCache.ram, *on_disk]


def _free_memory(kind: PrefixCache, device: torch.device) -> float:
    if kind == PrefixCache.device and device.type == "cuda":
        # Memory that torch has reserved and does not use, such as earlier jobs' blocks, can be used again.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    available = free_memory()
    return float("inf") if available is None else float(available)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))


def _too_small(kind: PrefixCache, wanted: float, room: float, need: RoomNeeded, measured: Measured, used: int) -> str:
    tries, beside = ["prefix.cache=disk"], ""
    if kind == PrefixCache.disk:
        tries = [f"prefix.max_gib={(used + wanted) / GIB + 1:.0f}", "more room on the disk"]
        if used:
            tries.insert(1, "`finetune cache clear --kind activations`")
            beside = f" beside the {in_bytes(used)} that are there"
    tries += [*_smaller(need, measured), "or prefix.cache=none"]
    images = int(room // measured.bytes) // need.views
    views = f" in {need.views} views" if need.views > 1 else ""
    return (
        f"prefix.cache={kind}: with those of {need.split} the activations need {in_bytes(wanted)}{beside} and"
        f" {in_bytes(room)} may be taken, enough for {images:,} images{views}. Try {', '.join(tries)}"
    )


def _smaller(need: RoomNeeded, measured: Measured) -> list[str]:
    """Settings that would make the activations smaller."""
    views = ["fewer augment.views"] if need.views > 1 else []
    return [*views, *(["prefix.dtype=fp16, which takes half"] if measured.dtype == torch.float32 else [])]
