"""What a network needs of a file of weights, and the names under which a file has it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Old files lack this counter of BatchNorm, and torch then starts it at 0.
COUNTER = ".num_batches_tracked"
# Training programs of DINOv2 put the blocks in groups: `blocks.1.7.` is block 7.
GROUPED = re.compile(r"\.\d+\.(\d+)(?=\.)")
# An error lists at most this many names of each kind, each of them up to this length.
NAMES_SHOWN = 5
NAME_SHOWN = 100
MAX_NESTING = 8  # dictionaries around a tensor or a list of names; training programs nest them less deep


@dataclass(frozen=True)
class Wanted:
    """What a network needs of a file."""

    shapes: Mapping[str, torch.Size]  # of all tensors of its state dict
    optional: tuple[str, ...] = ()  # how the names of its classifier begin: they may be missing or of another shape
    # First parts of names that mean a part of the network, which it may have or not, such as `reg_token`; others
    # (`decoder`, `queue`) are foreign.
    known: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()  # names of the tensors of real numbers; indices are whole ones
    kernels: frozenset[str] = frozenset()  # names of the weights of convolutions

    @classmethod
    def by(cls, net: nn.Module, optional: tuple[str, ...] = ()) -> "Wanted":
        """What `net` needs; it may be on the device `meta`."""
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        attributes = {*vars(net), *vars(net)["_parameters"], *vars(net)["_buffers"], *vars(net)["_modules"]}
        numbers = frozenset(name for name, tensor in net.state_dict().items() if tensor.is_floating_point())
        known = frozenset(attributes | {name.partition(".")[0] for name in shapes})
        kernels = (f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
        return cls(shapes, optional, known, numbers, frozenset(kernels))

    def under(self, start: str) -> "Wanted":
        """The same for a network that has this one under the prefix `start`, which ends with a dot."""
        numbers, kernels = (frozenset(start + name for name in names) for names in (self.numbers, self.kernels))
        shapes = {start + name: shape for name, shape in self.shapes.items()}
        return Wanted(shapes, tuple(start + name for name in self.optional), self.known, numbers, kernels)

    def needs(self, name: str) -> bool:
        """Whether a file must have the network's tensor `name`."""
        return not name.startswith(self.optional) and not name.endswith(COUNTER)


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


@dataclass(frozen=True)
class Source:
    """Where a file of one layout has a tensor of the network."""

    names: tuple[str, ...]  # without prefix
    make: Callable[..., Tensor] = same  # the tensors under these names -> the network's


@dataclass(frozen=True)
class Layout:
    """How a file names the tensors of a network: as the network does, or as another program."""

    sources: Mapping[str, Source]  # the network's name -> its source
    program: str = ""  # the other program; empty for the network's own names
    ignored: re.Pattern[str] = re.compile(r"(?!)")  # the other program's names that the network has no use for

    @classmethod
    def own(cls, wanted: Wanted, rename: Callable[[str], str] = lambda name: name) -> "Layout":
        """The network's own names, each changed by `rename`."""
        return cls({name: Source((rename(name),)) for name in wanted.shapes})

    @cached_property
    def names(self) -> frozenset[str]:
        """All names in a file of this layout."""
        return frozenset(name for source in self.sources.values() for name in source.names)

    @cached_property
    def has_groups(self) -> bool:
        """Whether its own names have two numbers side by side."""
        return any(GROUPED.search(name) for name in self.names)


def shown(names: Sequence[str], at_most: int = NAMES_SHOWN) -> str:
    """A list of names for a message, cut at `at_most` names."""
    cut = [name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}..." for name in names[:at_most]]
    return (", ".join(cut) or "nothing") + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def walk(content: Mapping[Any, Any], take: Callable[[str, str, Any], bool]) -> None:
    """Call `take(name, key, value)` for each entry of a checkpoint whose key is a text.

    `name` is the key behind those of the dictionaries around it, with dots. `take` says whether it took the entry; a
    dictionary that it did not take is opened in turn, and only once where it stands in many places or holds itself.
    """
    waiting: list[tuple[str, Mapping[Any, Any], int]] = [("", content, 0)]
    walked: set[int] = set()
    for start, inner, depth in waiting:  # which grows meanwhile
        if id(inner) in walked:
            continue
        walked.add(id(inner))
        for key, value in inner.items():
            name = f"{start}{key}" if isinstance(key, str) else ""
            if name and not take(name, key, value) and isinstance(value, Mapping) and depth < MAX_NESTING:
                waiting.append((f"{name}.", value, depth + 1))
