"""A model is an ordered list of layers: freezing, rate decay, caching and sharding are arithmetic on that list's index.

    layers = [stem, block 1, ..., block L, readout, head]
              id 0    id 1        id L     id L+1   id L+2

Read this file and `loop.py`, and you have read a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.system.errors import UserError


@dataclass(frozen=True)
class Layer:
    """One step of the forward pass, and the parts of the network that belong to it.

    Attributes:
        name: `stem`, `block.1` to `block.L`, `readout` or `head`.
        owns: Names of modules and parameters of the network; a module's name stands for everything inside it.
        run: `run(net, h) -> h`, a pure function of the network and the activations so far, so that a copied network
            takes its layers along. None where the architecture is no plain chain: such a model runs only whole.
        timm_steps: Parameter name to its distance from the output as timm counts it, where that differs from the
            layer's own; read by `optim.layer_rule=timm` only.
        run_class_token: On the last block of a network that reads out class tokens only: as `run`, but it may give
            those alone, (batch, 1 or 2, width) for `run`'s (batch, tokens, width), in the place of all. The same but
            for rounding. None on all other layers.
    """

    name: str
    owns: tuple[str, ...]
    run: Callable[[Any, Tensor], Tensor] | None
    timm_steps: Mapping[str, int] = field(default_factory=dict)
    run_class_token: Callable[[Any, Tensor], Tensor] | None = None


class LayeredModel(nn.Module):
    """An upstream network seen as an ordered list of layers.

    `net` is the only child, so `model.net.state_dict()` has upstream's own keys.

    Attributes:
        net: The upstream network with its classifier.
        layers: Stem, blocks, readout, head; the index is the layer id.
        no_weight_decay: Parameter names that upstream spares from weight decay.
        num_frozen: How many layers, counted from the stem, do not learn. Set by `freeze`.
        recompute: Gradient checkpointing: trade a second forward pass for the memory of activations.
        class_token_only: Whether the last block runs by its `run_class_token`, where it has one: less work, other
            rounding, and behind that block only the class token. False: bit-equal to upstream.
    """

    def __init__(
        self, net: nn.Module, layers: Sequence[Layer], *, no_weight_decay: frozenset[str] = frozenset()
    ) -> None:
        """Take ownership of `net`.

        Raises:
            ValueError: A parameter, buffer or leaf module belongs to no layer or to two.
        """
        super().__init__()
        self.net = net
        self.layers = tuple(layers)
        self.no_weight_decay = no_weight_decay
        self.num_frozen = 0
        self.recompute = False
        self.class_token_only = False
        # Nothing falls silently into the head: an unknown name is an error here, not a wrong rate later.
        self.layer_ids = assign_layers(net, self.layers)

    @property
    def num_blocks(self) -> int:
        """L, the number of blocks between the stem and the readout."""
        return len(self.layers) - 3

    @property
    def is_chain(self) -> bool:
        """Whether slices `start`, `stop` are available."""
        return all(layer.run is not None for layer in self.layers)

    @property
    def boundary(self) -> int:
        """Id of the first layer that learns, where those below can run apart; 0 where a model runs only whole."""
        return self.num_frozen if self.is_chain else 0

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run layers `start` to `stop - 1`.

        Args:
            x: Normalised images (batch, 3, height, width) where `start` is 0, else what layer `start - 1` gave.
            start: Id of the first layer to run.
            stop: Id of the first layer not to run; None runs through the head.

        Returns:
            What layer `stop - 1` gives: logits (batch, classes) after the head.

        Raises:
            ValueError: A slice of an architecture that is no plain chain.
        """
        if not self.is_chain:
            if start != 0 or stop not in (None, len(self.layers)):
                raise UserError(
                    f"{type(self.net).__name__} is no plain chain of layers, so it runs only whole:"
                    " freezing and layer decay work on it, slices and the activation cache do not"
                )
            return self.net(x)  # type: ignore[no-any-return]
        stop = len(self.layers) if stop is None else stop
        for index in range(start, stop):
            layer = self.layers[index]
            run = (layer.run_class_token if self.class_token_only else None) or layer.run
            assert run is not None
            if self.recompute and index >= self.num_frozen and torch.is_grad_enabled():
                # Non-reentrant: the reentrant kind loses every gradient when its input needs none, as after a
                # frozen prefix.
                x = checkpoint(run, self.net, x, use_reentrant=False, **self._recompute_options(index))
            else:
                x = run(self.net, x)
        return x

    def _recompute_options(self, index: int) -> dict[str, Any]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        owned = [b for name, b in self.net.named_buffers() if self.layer_ids[name] == index and name.endswith(names)]
        return {"context_fn": lambda: (nullcontext(), _held(owned))} if owned else {}

    def train(self, mode: bool = True) -> LayeredModel:
        """As `nn.Module.train`, but frozen layers stay in eval mode: no dropout, no drop path, no BatchNorm drift."""
        super().train(mode)
        frozen = {name for layer in self.layers[: self.num_frozen] for name in layer.owns}
        for name, module in self.net.named_modules():
            if name in frozen:
                module.eval()
        return self


@contextmanager
def _held(buffers: Sequence[Tensor]) -> Iterator[None]:
    """While a forward pass is computed again for its gradients: BatchNorm has counted this batch already."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            # Past autograd, which has saved these for the backward pass to come and would call this a change of them.
            buffer.data.copy_(value)


def assign_layers(net: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """The layer id of every parameter and buffer of `net`, by its name.

    Raises:
        ValueError: A name that no layer owns, that two layers own, or that a layer owns and the network lacks.
    """
    owner: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name in layer.owns:
            if name in owner:
                raise UserError(f"{name} belongs to two layers: {layers[owner[name]].name} and {layer.name}")
            owner[name] = index

    def find(name: str) -> int:
        parts = name.split(".")
        found = {owner[p] for end in range(1, len(parts) + 1) if (p := ".".join(parts[:end])) in owner}
        if len(found) != 1:
            names = " and ".join(layers[index].name for index in sorted(found)) or "no layer"
            raise UserError(f"{type(net).__name__}: {name} belongs to {names}; every name must belong to exactly one")
        return found.pop()

    tensors = [name for name, _ in net.named_parameters()] + [name for name, _ in net.named_buffers()]
    leaves = [name for name, module in net.named_modules() if name and not any(True for _ in module.children())]
    known = {*tensors, *(name for name, _ in net.named_modules())}
    for name in owner:
        if name not in known:
            raise UserError(f"layer {layers[owner[name]].name} owns {name}, which {type(net).__name__} lacks")
    for name in leaves:
        find(name)  # a dropout that no layer owns would stay active in a frozen prefix
    return {name: find(name) for name in tensors}


def freeze(model: LayeredModel, fix_layer: int) -> None:
    """Freeze the layers with id <= `fix_layer`; -1 freezes nothing. Repeatable: layers above learn again.

    Freeze first, then build the optimizer, then wrap (compile, DDP): a parameter that enters the optimizer must stay
    in it, or resume breaks, and a wrapper that comes first changes the names.

    Raises:
        ValueError: `fix_layer` leaves nothing to learn, or is below -1.
    """
    head = len(model.layers) - 1
    if not -1 <= fix_layer < head:
        what = "freezes everything" if fix_layer >= head else "is out of range"
        raise UserError(
            f"optim.fix_layer={fix_layer} {what}: {type(model.net).__name__} has layers 0 (stem) to {head} (head),"
            f" so use -1 (nothing frozen) to {head - 1} (only the head learns)"
        )
    model.num_frozen = fix_layer + 1
    for name, parameter in model.net.named_parameters():
        parameter.requires_grad_(model.layer_ids[name] > fix_layer)
    model.train(model.training)
