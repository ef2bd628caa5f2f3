"""The frozen layers as a function of a batch: no gradients, weights cast once, rounded at the boundary.

An image's activations have the same bits in every batch of one size, whatever its neighbours and its place among them;
another size may take other kernels (both measured on CPUs). So a short batch is filled up here, and what is computed
once and kept equals what would be computed in every epoch.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from finetune.core.layers import LayeredModel

# Kept values stay this many times below what a float16 can hold: images to come may reach further than those seen.
HEADROOM = 4.0
LARGEST = torch.finfo(torch.float16).max
# What autocast would cast anew in every forward pass: the weights of these alone.
CAST = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


class FrozenPrefix:
    """Layers 0 to `model.boundary - 1`.

    Attributes:
        boundary: How many layers it runs.
        kept_as: The dtype at the boundary, in which activations can be kept; None: as they come. Set it before the
            first batch.
        native: The dtype that the layers above take; known after the first batch, or from a cache.
        batch_size: Images of every pass; a shorter batch is filled up.
    """

    def __init__(
        self,
        model: LayeredModel,
        *,
        batch_size: int,
        autocast: AbstractContextManager[object],
        dtype: torch.dtype,
    ) -> None:
        """Share the frozen layers of `model`, which stays as it is.

        Args:
            model: Frozen, on its device, and of one kind with all whose activations are exchanged.
            batch_size: Images of every pass.
            autocast: Context of the forward pass, reusable.
            dtype: What it computes in.
        """
        assert model.boundary > 0
        self.boundary = model.boundary
        self.kept_as: torch.dtype | None = None
        self.native = torch.float32
        self.batch_size = batch_size
        self._autocast = autocast
        self._first: tuple[Tensor, Tensor] | None = None
        frozen = [p for name, p in model.net.named_parameters() if model.layer_ids[name] < self.boundary]
        assert not any(p.requires_grad for p in frozen), "freeze the model first"
        self._model = model if dtype == torch.float32 else _cast_once(model, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Activations at the boundary, rounded, as they can be kept. (batch, 3, size, size) -> (batch, ...).

        What lies beyond float16, where that was chosen by other images, becomes its largest number: infinities would
        end the run, and an image's few largest values are not what it is known by.
        """
        h = self._run(images)
        self.native = h.dtype
        if self.kept_as == torch.float16 != h.dtype:
            h = h.float().clamp(-LARGEST, LARGEST)  # NaN stays what it is
        return h.to(self.kept_as or h.dtype)

    def first(self, images: Tensor) -> Tensor:
        """Activations as they are, unrounded; remembered, so that the pass that begins with these has them already."""
        h = self._run(images)
        self._first = (images, h)
        return h

    def forget(self) -> None:
        """Let go of the first batch, wanted or not."""
        self._first = None

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        if self._first is not None:
            known, kept = self._first
            if torch.equal(known, images):
                self._first = None
                return kept
        count = len(images)
        assert 0 < count <= self.batch_size, f"{count} images, made for {self.batch_size}"
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        with self._autocast:  # frozen layers are in eval mode whatever the model is in
            h: Tensor = self._model(images, stop=self.boundary)
        return h[:count]

    def restore(self, kept: Tensor) -> Tensor:
        """Kept activations as the layers above take them."""
        return kept.to(self.native)


def overflow_safe(h: Tensor) -> bool:
    """Whether float16 holds these activations, with room for those of other images."""
    return bool(h.abs().amax() * HEADROOM < LARGEST)


def _cast_once(model: LayeredModel, dtype: torch.dtype) -> LayeredModel:
    """A model that shares every tensor with `model`, but for frozen weights that autocast would cast in every pass."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, dict(shared))
    for path, module in twin.net.named_modules():
        if not isinstance(module, CAST):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if twin.layer_ids[f"{path}.{name}"] < twin.boundary and parameter.dtype == torch.float32:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return twin
