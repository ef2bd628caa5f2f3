"""Build networks without drawing random weights, where a file replaces all of them: that saves a second for a ViT-B.

It also keeps the random values of a new classifier independent of how many weights the network has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The functions with which initialisers draw, and those that they apply to the drawn numbers. A truncated normal makes
# four passes over its numbers.
DRAWING = (
    *(Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
)
SHAPING = (Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_)


class SkipInit(TorchFunctionMode):
    """While active, initialisers fill parameters with NaN and draw nothing. A NaN shows that no file set a value."""

    def __init__(self) -> None:
        """Start without filled parameters."""
        super().__init__()
        self._filled: dict[int, nn.Parameter] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept one call of a torch function."""
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
    """The network that `build` makes and loads with weights, without drawing random values first.

    If the weights leave a parameter without a value, `build` runs a second time, with random values.
    """
    with SkipInit():
        net = build()
    is_complete = not any(bool(tensor.isnan().any()) for tensor in [*net.parameters(), *net.buffers()])
    return net if is_complete else build()
