"""Networks whose weights a file brings are built without drawing random ones first, which takes a second for a ViT-B.

And what remains random, a new classifier, no longer depends on how many numbers were drawn before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What initialisers draw with, and what they make of that: a truncated normal takes four passes over its numbers.
DRAWING = (
    *(Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
)
SHAPING = (Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_)


class Undrawn(TorchFunctionMode):
    """Within it parameters are filled with NaN where an initialiser would draw: what no file replaces, shows."""

    def __init__(self) -> None:
        """Nothing is filled yet."""
        super().__init__()
        self._filled: dict[int, nn.Parameter] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer one of torch's functions."""
        named = kwargs or {}
        if func in DRAWING:
            tensor = args[0] if args else named["tensor"]
            if isinstance(tensor, nn.Parameter):
                if id(tensor) not in self._filled:
                    self._filled[id(tensor)] = tensor
                    tensor.data.fill_(torch.nan)
                return tensor
        elif func in SHAPING and id(args[0]) in self._filled and bool(args[0].flatten()[:1].isnan().any()):
            return args[0]
        return func(*args, **named)


def built_from_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` gives, which makes a network and reads its weights; no random values are drawn for these.

    Where the weights leave something at random, it is built once more, as ever.
    """
    with Undrawn():
        net = build()
    left = any(bool(tensor.isnan().any()) for tensor in [*net.parameters(), *net.buffers()])
    return build() if left else net
