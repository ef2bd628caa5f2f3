"""Which tensors of a file reach a network where a library's own reader renames, joins and drops them.

Such a reader takes the blocks that its network has, and some leave those of a deeper network without a word.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from finetune.models.upstream.layouts import StateDict

R = TypeVar("R")


def traced(group: StateDict, make: Callable[[], R], parts: Callable[[R], Iterable[Tensor]]) -> tuple[R, frozenset[str]]:
    """What `make` returns, and the names of those tensors of `group` from which the `parts` of it were computed."""
    with _Traced(group) as reading:
        made = make()
    return made, reading.behind(parts(made))


class _Traced(TorchFunctionMode):
    """While active, each tensor that torch computes from others is known with the names of those."""

    def __init__(self, group: StateDict) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}  # by id, which stays that tensor's as long as it is kept in `_kept`
        self._kept: list[Any] = []
        for name, tensor in group.items():
            self._add(tensor, {name})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = self.behind(_pytree.tree_leaves((args, kwargs)))
        if names:
            # A call that returns nothing, such as `table[0] = row`, fills its first argument.
            for each in _pytree.tree_leaves(args[0] if result is None else result):
                if isinstance(each, Tensor):
                    self._add(each, names)
        return result

    def _add(self, tensor: Tensor, names: Iterable[str]) -> None:
        if id(tensor) not in self._names:
            self._kept.append(tensor)
        self._names.setdefault(id(tensor), set()).update(names)

    def behind(self, tensors: Iterable[Any]) -> frozenset[str]:
        """The names of the group that went into any of some tensors."""
        return frozenset(name for each in tensors for name in self._names.get(id(each), ()))
