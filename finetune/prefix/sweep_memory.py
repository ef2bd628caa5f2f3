"""What the jobs of one sweep share in the memory of their process: activations, and how long they took to compute."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from finetune.config import PrefixCache
from finetune.prefix.measuring import Measured
from finetune.prefix.store import ActivationBlock


class BlockKey(NamedTuple):
    """Names an activation block in memory."""

    kind: PrefixCache  # ram or device
    device: torch.device
    name: str  # of the split's `ActivationCache`
    view: int


class SweepMemory:
    """Activation blocks and measurements that outlive a run."""

    def __init__(self) -> None:
        """Start empty."""
        self.blocks: dict[BlockKey, ActivationBlock] = {}
        self.measured: dict[str, Measured] = {}  # by a name that changes with layers, images and settings

    def num_bytes(self, kind: PrefixCache, *, without: Collection[str] = ()) -> int:
        """Bytes of all blocks in one kind of memory, except those whose cache is named in `without`."""
        found = [block for key, block in self.blocks.items() if key.kind == kind and key.name not in without]
        return sum(block.values.nbytes for block in found)

    def drop_all_but(self, names: Collection[str]) -> None:
        """Free every block whose cache is not in `names`."""
        self.blocks = {key: block for key, block in self.blocks.items() if key.name in names}

    def drop_other_layers(self, layers: str) -> None:
        """Free the blocks on a device that hold the output of other frozen layers: training needs that memory."""
        for key in list(self.blocks):
            if key.kind == PrefixCache.device and not key.name.startswith(layers):
                del self.blocks[key]


_open: list[SweepMemory] = []


@contextmanager
def shared_between_runs() -> Iterator[None]:
    """Let the runs inside it share activations, where frozen layers, images and views are the same."""
    memory = SweepMemory()
    _open.append(memory)
    try:
        yield
    finally:
        _open.remove(memory)


def sweep_memory() -> SweepMemory:
    """Return the memory of the sweep around this run; without a sweep, an empty one for this run alone."""
    return _open[-1] if _open else SweepMemory()


def is_shared() -> bool:
    """Whether later runs of this process may read the activations of this one."""
    return bool(_open)
