"""Where the activations of one split are cached: in memory, which the jobs of a sweep share, or on disk."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config import PrefixCache
from finetune.prefix.store import ActivationBlock, Fill, build_in_memory, is_whole, open_on_disk
from finetune.prefix.sweep_memory import BlockKey, SweepMemory


@dataclass(frozen=True)
class ActivationCache:
    """The cached activations of one split, a block for each view."""

    kind: PrefixCache  # ram, device or disk
    name: str  # changes with everything that the activations depend on, except the view
    slots: int  # how many activations a block holds
    is_required: bool  # whether the user named the place; else activations that do not fit are computed in every epoch
    memory: SweepMemory  # the blocks of kinds ram and device
    device: torch.device  # the memory that such a block takes
    folder: Path  # the blocks of kind disk, which every run with the same cache folder shares

    def has(self, view: int) -> bool:
        """Whether the block of a view is there, and not damaged as far as its size and description say."""
        if self.kind == PrefixCache.disk:
            return os.path.isdir(self._path(view)) and is_whole(self._path(view), self.slots)
        return self._key(view) in self.memory.blocks

    def open(self, view: int, fill: Fill, check: Callable[[], None]) -> tuple[ActivationBlock, bool]:
        """The block of a view, and whether `fill` computed it just now. A block on disk is read row by row.

        `check` is called while another run computes the same block; an exception from it ends the wait.
        """
        if self.kind == PrefixCache.disk:
            return open_on_disk(self._path(view), self.slots, fill, check)
        key, is_new = self._key(view), not self.has(view)
        if is_new:
            self.memory.blocks[key] = build_in_memory(self.slots, fill, self.device)
        return self.memory.blocks[key], is_new

    def _path(self, view: int) -> Path:
        return self.folder / f"{self.name}-{view}"

    def _key(self, view: int) -> BlockKey:
        return BlockKey(self.kind, self.device, self.name, view)
