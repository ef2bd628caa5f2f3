"""Decides, split by split, whether the activations of the frozen layers are cached, and where."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from finetune.config import AugmentConf, PrefixCache, PrefixConf
from finetune.data.streams import num_views
from finetune.prefix.cache import ActivationCache
from finetune.prefix.choice import RoomNeeded, choose_place, fits_beside_others
from finetune.prefix.measuring import Measured
from finetune.prefix.sweep_memory import SweepMemory, is_shared

IN_MEMORY = (PrefixCache.device, PrefixCache.ram)


def why_not_cacheable(augment: AugmentConf, epoch_images: int) -> str | None:
    """Why the frozen layers see other training images in every epoch, and what to change; None if they see the same."""
    if augment.mixup or augment.cutmix:
        views = "" if num_views(augment) else " augment.views=K"
        return f"MixUp and CutMix mix whole images; augment.mixup=0 augment.cutmix=0{views} would make caching possible"
    if epoch_images:
        return "data.epoch_images draws images with replacement, so an epoch can show an image any number of times"
    if num_views(augment) == 0:
        return "every epoch shows fresh views; augment.views=K recycles K views, which can be cached"
    return None


def is_read_once(kind: PrefixCache, passes: float) -> bool:
    """Whether `prefix.cache=auto` should not cache activations that this run reads `passes` times, and no other run."""
    return kind == PrefixCache.auto and passes <= 1 and not is_shared()


@dataclass
class CachePlanner:
    """Picks the caches of a run's splits. Each split gets the room that the splits before it have left."""

    conf: PrefixConf  # the place that the user asked for, and the limit of the disk
    measured: Measured  # cost of the frozen layers
    layers: str  # name of the frozen layers' activations, see `prefix_digest`
    memory: SweepMemory  # blocks of earlier jobs of a sweep; those of other layers are dropped from the device
    device: torch.device  # where training runs
    folder: Path  # cached activations on disk
    _planned: list[tuple[ActivationCache, int]] = field(default_factory=list)  # caches so far, and their views

    def __post_init__(self) -> None:
        """Make room on the device."""
        self.memory.drop_other_layers(self.layers)

    def plan(self, split: str, digest: str, *, slots: int, views: int) -> tuple[ActivationCache | None, str]:
        """The cache of a split, or None where its activations are computed in every epoch; and the reason in words.

        `digest` is from `split_digest`; a view has `slots` activations, and the run will show `views` views. Raises
        UserError if the place that the user asked for is too small.
        """
        name = f"{self.layers}-{digest}"
        is_required = self.conf.cache != PrefixCache.auto and split != "test"
        devices = {kind: torch.device("cpu") for kind in (*IN_MEMORY, PrefixCache.disk)}
        devices[PrefixCache.device] = self.device
        caches = {
            kind: ActivationCache(kind, name, slots, is_required, self.memory, device, self.folder)
            for kind, device in devices.items()
        }
        own_names = {name, *(cache.name for cache, _ in self._planned)}
        missing, total = {}, {}
        for kind, cache in caches.items():
            planned = [(cache, views), *((other, count) for other, count in self._planned if other.kind == kind)]
            total[kind] = sum(each.slots * count for each, count in planned)
            missing[kind] = sum(each.slots for each, count in planned for view in range(count) if not each.has(view))
        spare = {kind: self.memory.num_bytes(kind, without=own_names) for kind in IN_MEMORY}
        need = RoomNeeded(split, views, missing, total, spare)
        kind, why = choose_place(self.conf, self.measured, need, self.device, self.folder)
        if kind == PrefixCache.none:
            return None, why
        if kind in IN_MEMORY and not fits_beside_others(kind, self.measured, need, self.device):
            self.memory.drop_all_but(own_names)
        self._planned.append((caches[kind], views))
        return caches[kind], why
