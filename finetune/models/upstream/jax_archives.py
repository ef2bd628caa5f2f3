"""JAX archives (`.npz`), in which Google publishes networks: read by name, and by both sides whole.

The readers of timm and open_clip ask for the arrays of the blocks that their network has. They would take the first
blocks of a deeper network, and leave tensors that the archive lacks as they are.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from numpy.lib.npyio import NpzFile
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finetune.models.upstream.layouts import shown
from finetune.models.upstream.weight_files import check_npz
from finetune.system.errors import UserError

STACKED = re.compile(r"/encoderblock/")  # a name with it is an array of one parameter of all blocks, stacked


class WholeCopies(TorchFunctionMode):
    """While active, `copy_` takes exactly as many numbers as it fills: torch would repeat those of a small array."""

    def __init__(self) -> None:
        """Start with nothing filled."""
        super().__init__()
        self.filled: dict[int, Any] = {}  # by id, which stays theirs as long as they are kept here

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one call of a torch function."""
        if func is Tensor.copy_:
            if args[0].numel() != args[1].numel():
                raise ValueError(f"an array of shape {tuple(args[1].shape)} stands for one of {tuple(args[0].shape)}")
            self.filled[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))


class ArchiveReading:
    """What a library has read of an archive, and which tensors it has filled; `whole_archive` makes it."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], copies: WholeCopies) -> None:
        """Take the archive's arrays, and the mode that is active."""
        self._path, self._shapes, self._copies = path, shapes, copies
        self.reads: Counter[str] = Counter()
        self._file: NpzFile | None = None

    def note(self, file: NpzFile, name: str) -> None:
        """Count that an array was read. A network that is built a second time opens the file again: that counts."""
        if file is not self._file:
            self._file, self.reads = file, Counter()
        self.reads[name] += 1

    def check(self, net: nn.Module, optional: tuple[str, ...] = ()) -> None:
        """Raise a UserError where the archive has more blocks than `net`, or lacks a parameter of it.

        Names of parameters that begin with one of `optional` (the classifier's) may be missing.
        """
        families = {_family(name) for name in self.reads}
        over = [name for name in self._shapes if name not in self.reads and _family(name) in families]
        # A stacked array is read once for each block of the network.
        over += [
            name for name, times in self.reads.items() if STACKED.search(name) and self._shapes[name][:1] != (times,)
        ]
        lost = [
            name
            for name, parameter in net.named_parameters()
            if id(parameter) not in self._copies.filled and not name.startswith(optional)
        ]
        listed = [
            f"{len(names)} {word}: {shown(sorted(names))}"
            for word, names in (("arrays too many", over), ("parameters missing", lost))
            if names
        ]
        if listed:
            problem = f"holds the weights of another model than {type(net).__name__} built here"
            raise UserError(f"{self._path} {problem} ({'; '.join(listed)}); check model.name")


def is_archive(path: Path) -> bool:
    """Whether a file of weights is a JAX archive, by its name."""
    return path.suffix in (".npz", ".npy")


@contextlib.contextmanager
def whole_archive(path: Path) -> Iterator[ArchiveReading]:
    """While active, what a library reads of the archive `path`, and what it fills, is noted.

    A UserError where the archive is damaged or holds no plain arrays.
    """
    shapes, copies = check_npz(path), WholeCopies()
    reading, get = ArchiveReading(path, shapes, copies), NpzFile.__getitem__

    def noted(file: NpzFile, key: str) -> Any:
        reading.note(file, key)
        return get(file, key)

    with mock.patch.object(NpzFile, "__getitem__", noted), copies:
        yield reading


def _family(name: str) -> str:
    """The name without its numbers: arrays of one family differ in the block that they belong to."""
    return re.sub(r"\d+", "#", name)
