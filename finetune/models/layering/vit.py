"""timm's Vision Transformer as an ordered list of layers: the network is timm's own, the classifier is ours."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from finetune.core.layers import Layer

# All that can stand ahead of the first block and behind the last one, in timm's VisionTransformer.
STEM = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
READOUT = ("norm", "attn_pool", "fc_norm", "head_drop")


def layers_of(tower: nn.Module) -> list[Layer]:
    """Stem, blocks and readout of timm's `VisionTransformer`; the classifier `head` is left to the caller."""
    net: Any = tower
    # Tokens, position embeddings and pools that a variant does without are None, and so in neither list.
    there = {name for name, _ in net.named_children()} | {name for name, _ in net.named_parameters(recurse=False)}
    blocks = [
        Layer(f"block.{index + 1}", (f"blocks.{index}",), partial(_run_block, index=index))
        for index in range(len(net.blocks))
    ]
    return [
        Layer("stem", tuple(name for name in STEM if name in there), _run_stem),
        *blocks,
        Layer("readout", tuple(name for name in READOUT if name in there), _run_readout),
    ]


def _run_stem(net: Any, h: Tensor) -> Tensor:
    tokens: Tensor = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(h))))
    return tokens


def _run_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    tokens: Tensor = net.blocks[index](h)
    return tokens


def _run_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.norm(h), pre_logits=True)
    return features


def run_head(net: Any, h: Tensor) -> Tensor:
    """The classifier, where a timm network keeps it as `head`. (batch, features) -> (batch, classes)."""
    logits: Tensor = net.head(h)
    return logits
