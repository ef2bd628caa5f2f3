"""The frozen layers as a function of a batch: no gradients, weights cast once, activations rounded at the boundary.

The boundary is where the frozen layers end and the layers that learn begin. An image's activations have the same bits
in every batch of one size, whatever the other images and their order; a batch of another size may run other kernels
(both measured on CPUs). So a short batch is filled up here, and cached activations equal recomputed ones.
"""

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from finetune.core.layers import LayeredModel

# fp16 is picked only if the first activations stay this many times below its largest number: later ones may be larger.
HEADROOM = 4.0
LARGEST = torch.finfo(torch.float16).max
CAST = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)  # autocast would cast their weights in every forward pass


class FrozenPrefix:
    """The frozen layers, 0 to `model.boundary - 1`, as a function of a batch of images."""

    def __init__(
        self, model: LayeredModel, *, batch_size: int, autocast: AbstractContextManager[object], dtype: torch.dtype
    ) -> None:
        """Share the frozen layers of `model`, which is on its device and stays as it is.

        The forward pass computes in `dtype`, inside the reusable context `autocast`.
        """
        assert model.boundary > 0
        self.boundary = model.boundary  # how many layers it runs
        # Precision of the activations; None: as the layers give them. Set it before the first batch.
        self.stored_as: torch.dtype | None = None
        self.native = torch.float32  # in which the layers above take them; known after the first batch, or from a cache
        self.batch_size = batch_size  # images of every pass; a shorter batch is filled up
        self._autocast = autocast
        frozen = [p for name, p in model.net.named_parameters() if model.layer_ids[name] < self.boundary]
        assert not any(p.requires_grad for p in frozen), "freeze the model first"
        self._model = model if dtype == torch.float32 else _cast_once(model, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Activations at the boundary, rounded to `stored_as`. (batch, 3, size, size) -> (batch, ...).

        Numbers beyond the range of float16 become its largest number, since infinities would end the run. Only images
        after the first batch can have any: float16 was picked because the first batch fits into it.
        """
        h = self.compute(images)
        self.native = h.dtype
        if self.stored_as == torch.float16 != h.dtype:
            h = h.float().clamp(-LARGEST, LARGEST)  # NaN stays NaN
        return h.to(self.stored_as or h.dtype)

    @torch.no_grad()
    def compute(self, images: Tensor) -> Tensor:
        """Activations at the boundary, not rounded. (batch, 3, size, size) -> (batch, ...)."""
        count = len(images)
        assert 0 < count <= self.batch_size, f"{count} images, made for {self.batch_size}"
        if count < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        with self._autocast:  # frozen layers are in eval mode, whatever mode the model is in
            h: Tensor = self._model(images, stop=self.boundary)
        return h[:count]

    def restore(self, activations: Tensor) -> Tensor:
        """Stored activations in the dtype that the layers above take."""
        return activations.to(self.native)


def overflow_safe(h: Tensor) -> bool:
    """Whether float16 holds these activations with room for larger ones of other images."""
    return bool(h.abs().amax() * HEADROOM < LARGEST)


def _cast_once(model: LayeredModel, dtype: torch.dtype) -> LayeredModel:
    """A copy that shares every tensor with `model` except the frozen weights that autocast would cast in every pass."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, dict(shared))
    for path, module in twin.net.named_modules():
        if not isinstance(module, CAST):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if twin.layer_ids[f"{path}.{name}"] < twin.boundary and parameter.dtype == torch.float32:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return twin
