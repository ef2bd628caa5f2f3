"""A LayeredModel small enough to compute by hand with: stem, two blocks, readout, head."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from finetune.core.layers import Layer, LayeredModel


class TinyNet(nn.Module):
    """A stack of named parts; dropout and BatchNorm make train and eval mode differ."""

    def __init__(self, classes: int = 3, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 8) * 0.02)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.BatchNorm1d(8) if batch_norm else nn.Dropout(dropout))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)) + self.pos_embed
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def _stem(net: TinyNet, x: Tensor) -> Tensor:
    return net.stem(x.flatten(1)) + net.pos_embed


def _block(net: TinyNet, x: Tensor, index: int) -> Tensor:
    return x + net.blocks[index](x)


def _norm(net: TinyNet, x: Tensor) -> Tensor:
    return net.norm(x)


def _head(net: TinyNet, x: Tensor) -> Tensor:
    return net.head(x)


def tiny_layers() -> list[Layer]:
    return [
        Layer("stem", ("stem", "pos_embed"), _stem),
        Layer("block.1", ("blocks.0",), functools.partial(_block, index=0)),
        Layer("block.2", ("blocks.1",), functools.partial(_block, index=1)),
        Layer("readout", ("norm",), _norm),
        Layer("head", ("head",), _head),
    ]


def tiny_model(seed: int = 0, **kwargs: object) -> LayeredModel:
    torch.manual_seed(seed)
    return LayeredModel(TinyNet(**kwargs), tiny_layers())  # type: ignore[arg-type]


def tiny_batches(sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches, start = [], 0
    for size in sizes:
        images = torch.randn(size, 3, 4, 4, generator=generator)
        labels = torch.randint(0, 3, (size,), generator=generator)
        batches.append((images, labels, torch.arange(start, start + size)))
        start += size
    return batches
