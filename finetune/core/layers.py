"""A model is an ordered list of layers: freezing, rate decay, caching and sharding are arithmetic on that list's index.

    layers = [stem, block 1, ..., block L, readout, head]
              id 0    id 1        id L     id L+1   id L+2

This file and `loop.py` are the whole of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.ownership import assign_layers
from finetune.core.recompute import run_recomputed
from finetune.system.errors import UserError


@dataclass(frozen=True)
class Layer:
    """One step of the forward pass, and the parts of the network that belong to it."""

    name: str  # `stem`, `block.1` to `block.L`, `readout` or `head`
    owns: tuple[str, ...]  # names of modules and parameters; a module's name includes everything inside the module
    # `run(net, h) -> h`, a function of the network and the activations so far, so that a copied network takes its
    # layers along. None where the architecture is no plain chain: such a model runs only whole.
    run: Callable[[Any, Tensor], Tensor] | None
    # Parameter name to its distance from the output as timm counts it, where that differs from the layer's own
    # distance. Only `optim.layer_rule=timm` reads it.
    timm_steps: Mapping[str, int] = field(default_factory=dict)
    # A cheaper `run` for the last block of a network that reads out class tokens only. It may return those tokens
    # alone, (batch, 1 or 2, width); they equal `run`'s but for rounding.
    run_class_token: Callable[[Any, Tensor], Tensor] | None = None


class LayeredModel(nn.Module):
    """An upstream network with its classifier, seen as an ordered list of layers: stem, blocks, readout, head."""

    def __init__(
        self, net: nn.Module, layers: Sequence[Layer], *, no_weight_decay: frozenset[str] = frozenset()
    ) -> None:
        """Take `net` as it is, without a copy; see `assign_layers` for the errors."""
        super().__init__()
        self.net = net  # the only child: `model.net.state_dict()` has upstream's keys
        self.layers = tuple(layers)  # the index is the layer id: freezing and rates count on this order
        self.no_weight_decay = no_weight_decay  # parameter names that upstream spares from weight decay
        self.channels = 3  # of the images
        self.num_frozen = 0  # layers, counted from the stem, that do not learn; `freezing.freeze` sets it
        self.frozen_modules: frozenset[str] = frozenset()  # frozen modules (and tensors) in and above the others
        self.recompute = False  # gradient checkpointing: saves memory and costs about a third more time
        self.class_token_only = False  # True: the last block runs by `run_class_token`; False: bit-equal to upstream
        # The id of the layer that owns each parameter and buffer, by its name in `net`. Refuse an unknown name here: in
        # a default layer it would silently learn at a wrong rate.
        self.layer_ids = assign_layers(net, self.layers)

    @property
    def num_blocks(self) -> int:
        """L, the number of blocks between the stem and the readout."""
        return len(self.layers) - 3  # all but stem, readout and head

    @property
    def is_chain(self) -> bool:
        """Whether `forward` can run a slice of the layers."""
        return all(layer.run is not None for layer in self.layers)

    @property
    def boundary(self) -> int:
        """Id of the first layer that learns, where the frozen layers can run apart; 0 where a model runs only whole."""
        return self.num_frozen if self.is_chain else 0

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The output of layer `stop - 1`: activations, or logits (batch, classes) where the head ran.

        Args:
            x: Normalised images (batch, 3, height, width) where `start` is 0, else the output of layer `start - 1`.
            start: Id of the first layer to run.
            stop: Id after the last layer to run; None runs through the head.

        Raises:
            UserError: A slice of an architecture that is no plain chain.
        """
        if not self.is_chain:
            if start != 0 or stop not in (None, len(self.layers)):
                raise UserError(
                    f"{type(self.net).__name__} is no plain chain of layers, so it runs only whole:"
                    " freezing and layer decay work on it, slices and the activation cache do not"
                )
            return self.net(x)  # type: ignore[no-any-return]
        for index in range(start, len(self.layers) if stop is None else stop):
            layer = self.layers[index]
            run = (layer.run_class_token if self.class_token_only else None) or layer.run
            assert run is not None
            # A frozen layer keeps no activations, so recomputing it would cost time and save nothing.
            if self.recompute and index >= self.num_frozen and torch.is_grad_enabled():
                x = run_recomputed(run, self.net, x, self._statistics(index))
            else:
                x = run(self.net, x)  # the network is an argument: a copied model runs its own weights
        return x

    def _statistics(self, index: int) -> list[Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")  # buffers of BatchNorm
        return [b for name, b in self.net.named_buffers() if self.layer_ids[name] == index and name.endswith(names)]

    def train(self, mode: bool = True) -> LayeredModel:
        """As `nn.Module.train`, but frozen layers stay in eval mode: no dropout, drop path or BatchNorm drift."""
        super().train(mode)  # reaches all layers, so the frozen ones are put back after it
        frozen = {name for layer in self.layers[: self.num_frozen] for name in layer.owns} | self.frozen_modules
        for name, module in self.net.named_modules():
            if name in frozen:
                module.eval()  # reaches everything inside the module
        return self
