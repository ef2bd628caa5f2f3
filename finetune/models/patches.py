"""Patch embeddings as matrix products: in bfloat16 on a CPU much faster than the convolution, with the same result.

A convolution whose kernel is as wide as its stride cuts an image into patches and multiplies each patch by one matrix.
On 2 cores its gradient in bfloat16 takes 5 to 18 times as long as that of the product (patches of 16 and 32 pixels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.core.layers import LayeredModel


class PatchProduct(nn.Conv2d):
    """A convolution without overlap, computed as a matrix product; parameters and their names are those of Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, features, height / kernel, width / kernel)."""
        high, wide = self.kernel_size
        batch, channels, height, width = input.shape
        rows, columns = height // high, width // wide
        cut = input[:, :, : rows * high, : columns * wide]  # like a convolution, ignore incomplete patches
        patches = cut.reshape(batch, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def patches_as_products(net: nn.Module) -> None:
    """Turn every convolution of `net` without overlap, padding and groups into a `PatchProduct`, in place."""
    for module in net.modules():
        if type(module) is not nn.Conv2d or module.dilation != (1, 1) or module.groups != 1:
            continue
        if module.kernel_size == module.stride and module.kernel_size[0] > 1 and module.padding in ((0, 0), "valid"):
            module.__class__ = PatchProduct


def place(model: LayeredModel, device: torch.device, dtype: torch.dtype) -> LayeredModel:
    """Move the model to its device, with the kernels that suit `dtype` there."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        patches_as_products(model.net)
    return model.to(device)


def products_dominate(net: nn.Module, width: int) -> bool:
    """Whether matrices, not kernels, hold most parameters, and the median matrix is at least `width` wide.

    Tables of embeddings do not count. bfloat16 pays on a CPU for such networks only.
    """
    tables = ("_embed", "_embedding", "_table")
    matrices = [p for name, p in net.named_parameters() if p.ndim == 2 and not name.endswith(tables)]
    kernels = sum(p.numel() for p in net.parameters() if p.ndim > 2)
    if not matrices or sum(p.numel() for p in matrices) <= kernels:
        return False
    return bool(torch.tensor([min(p.shape) for p in matrices]).median() >= width)
