"""Gradient checkpointing of one layer: the backward pass computes the layer's activations a second time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_recomputed(
    run: Callable[[Any, Tensor], Tensor], net: nn.Module, h: Tensor, statistics: Sequence[Tensor]
) -> Tensor:
    """`run(net, h)`, a layer's forward pass, that keeps only `h`; the backward pass runs the layer again.

    `statistics` are the running statistics of the layer's BatchNorm modules, which the second run leaves unchanged.
    """
    options: dict[str, Any] = {"context_fn": lambda: (nullcontext(), _unchanged(statistics))} if statistics else {}
    # Non-reentrant: the reentrant kind loses every gradient when its input needs none, as behind frozen layers.
    return checkpoint(run, net, h, use_reentrant=False, **options)


@contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Puts the values of `buffers` back at the end: BatchNorm has counted this batch in the first forward pass."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            # `.data`, because autograd has saved these buffers and would refuse the backward pass after a change.
            buffer.data.copy_(value)
