"""One layer at a time through timm's sequential networks: the `run` of each layer that `layering.timm_layers` lists.

Each function calls upstream's own modules and methods in upstream's own order, so that a network gives the same bits
whole and in slices, in eval mode and, from one generator state, in train mode. Between layers stands one tensor. What
upstream computes once for all blocks (a rotary embedding, a shared table of relative positions) is computed here in
each block again: it depends on the grid alone, costs little beside the block, and a cache of activations needs no more
than the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.models.layering import vit
from finetune.system.errors import UserError

Run = Callable[[Any, Tensor], Tensor]


def runs(net: nn.Module, layers: Sequence[Layer]) -> list[Run] | None:
    """The functions of `layers` in order; None where this network is no plain chain, or none that is known here.

    Args:
        net: A timm network. A subclass of a known class may have another forward pass, so it gets None.
        layers: Its stem, blocks, readout and, where it has a classifier, head.
    """
    kind = type(net)
    build = CHAINS.get(f"{kind.__module__}.{kind.__qualname__}")
    found = None if build is None else build(net, layers[-1].name == "head")
    assert found is None or len(found) == len(layers), f"{kind.__name__}: {len(found)} runs for {len(layers)} layers"
    return found


def _vit(net: Any, with_head: bool) -> list[Run] | None:
    stem, *blocks, readout = (layer.run for layer in vit.layers_of(net))
    assert stem is not None and readout is not None
    tail: list[Run] = [readout, vit.run_head] if with_head else [_norm_and_head]
    return [stem, *(run for run in blocks if run is not None), *tail]


def _norm_and_head(net: Any, h: Tensor) -> Tensor:
    """The end of a bare tower: its classifier is an Identity, and all else is readout."""
    features: Tensor = net.forward_head(net.norm(h))
    return features


def _norm_and_pool(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.norm(h), pre_logits=True)
    return features


def _tokens(net: Any, h: Tensor) -> Tensor:
    tokens: Tensor = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(h))))
    return tokens


# Distilled ViT (DeiT): two tokens are read out, each by a classifier of its own, and the logits averaged.


def _distilled(net: Any, with_head: bool) -> list[Run] | None:
    blocks = [partial(_run_block, index=index) for index in range(len(net.blocks))]
    return [_tokens, *blocks, *([_two_tokens, _two_heads] if with_head else [_norm_and_head])]


def _run_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    tokens: Tensor = net.blocks[index](h)
    return tokens


def _two_tokens(net: Any, h: Tensor) -> Tensor:
    """(batch, tokens, width) -> (batch, 2, width): class and distillation token."""
    h = net.norm(h)
    return torch.stack([net.head_drop(h[:, 0]), net.head_drop(h[:, 1])], dim=1)


def _two_heads(net: Any, h: Tensor) -> Tensor:
    # As upstream outside its own distillation training, where it returns both.
    logits: Tensor = (net.head(h[:, 0]) + net.head_dist(h[:, 1])) / 2
    return logits


# EVA and its kin, DINOv3 among them: absolute and rotary position embeddings.


def _eva(net: Any, with_head: bool) -> list[Run] | None:
    if net.rope is not None and (net.patch_drop is not None or net.rope.aug_active):
        # The stem draws at random which patches stay, or how positions are shaken, and each block must know: no single
        # tensor between layers says it.
        return None
    blocks = [partial(_eva_block, index=index) for index in range(len(net.blocks))]
    return [_eva_stem, *blocks, *([_norm_and_pool, vit.run_head] if with_head else [_norm_and_head])]


def _eva_stem(net: Any, h: Tensor) -> Tensor:
    if net.rope is not None and net.dynamic_img_size and h.shape[-1] != h.shape[-2]:
        raise UserError(
            f"images of {h.shape[-1]} x {h.shape[-2]} pixels: with rotary positions and a free image size, layers run"
            " one by one see only the number of tokens, so images must be square"
        )
    tokens: Tensor = net.norm_pre(net._pos_embed(net.patch_embed(h))[0])
    return tokens


def _eva_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    tokens: Tensor = net.blocks[index](h, rope=rotary(net, h, index))
    return tokens


def rotary(net: Any, h: Tensor, index: int) -> Tensor | None:
    """The rotary embedding that block `index` of an Eva gets, as its `_pos_embed` computes it for all blocks."""
    if net.rope is None:
        return None
    if net.dynamic_img_size:
        side = math.isqrt(h.shape[1] - net.num_prefix_tokens)
        embed = net.rope.get_embed(shape=(side, side))
    elif type(net.rope).__name__ == "RotaryEmbeddingMRope":  # the one that keeps no grid of its own
        embed = net.rope.get_embed(shape=net.patch_embed.grid_size)
    else:
        embed = net.rope.get_embed()
    found: Tensor = embed[index] if net.rope_mixed else embed
    return found


# BEiT: relative positions, in a table of each block's own or in one for all.


def _beit(net: Any, with_head: bool) -> list[Run] | None:
    blocks = [partial(_beit_block, index=index) for index in range(len(net.blocks))]
    return [_beit_stem, *blocks, *([_norm_and_pool, vit.run_head] if with_head else [_norm_and_head])]


def _beit_stem(net: Any, h: Tensor) -> Tensor:
    h = net.patch_embed(h)
    h = torch.cat((net.cls_token.expand(h.shape[0], -1, -1), h), dim=1)
    if net.pos_embed is not None:
        h = h + net.pos_embed
    tokens: Tensor = net.pos_drop(h)
    return tokens


def _beit_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    shared = None if net.rel_pos_bias is None else net.rel_pos_bias()
    tokens: Tensor = net.blocks[index](h, shared_rel_pos_bias=shared)
    return tokens


# Convolutional networks.


def _convnext(net: Any, with_head: bool) -> list[Run] | None:
    if with_head and not isinstance(net.head.fc, nn.Linear):
        return None  # unpooled: a classifier at every position
    places = [(stage, index) for stage, part in enumerate(net.stages) for index in range(len(part.blocks))]
    blocks = [partial(_convnext_block, stage=stage, index=index) for stage, index in places]
    return [_convnext_stem, *blocks, *([_convnext_readout, _convnext_head] if with_head else [_convnext_end])]


def _convnext_stem(net: Any, h: Tensor) -> Tensor:
    out: Tensor = net.stem(h)
    return out


def _convnext_block(net: Any, h: Tensor, *, stage: int, index: int) -> Tensor:
    part = net.stages[stage]
    out: Tensor = part.blocks[index](part.downsample(h) if index == 0 else h)
    return out


def _convnext_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.norm_pre(h), pre_logits=True)
    return features


def _convnext_end(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.norm_pre(h))
    return features


def _convnext_head(net: Any, h: Tensor) -> Tensor:
    logits: Tensor = net.head.fc(h)
    return logits


def _resnet(net: Any, with_head: bool) -> list[Run] | None:
    if with_head and not isinstance(net.fc, nn.Linear):
        return None  # unpooled: a classifier at every position
    blocks = [
        partial(_resnet_block, stage=stage, index=index)
        for stage, part in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1)
        for index in range(len(part))
    ]
    return [_resnet_stem, *blocks, *([_resnet_pool, _resnet_head] if with_head else [_resnet_end])]


def _resnet_stem(net: Any, h: Tensor) -> Tensor:
    out: Tensor = net.maxpool(net.act1(net.bn1(net.conv1(h))))
    return out


def _resnet_block(net: Any, h: Tensor, *, stage: int, index: int) -> Tensor:
    part = {1: net.layer1, 2: net.layer2, 3: net.layer3, 4: net.layer4}[stage]
    out: Tensor = part[index](h)
    return out


def _resnet_pool(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.global_pool(h)
    return features


def _resnet_head(net: Any, h: Tensor) -> Tensor:
    if net.drop_rate:
        h = F.dropout(h, p=float(net.drop_rate), training=net.training)
    logits: Tensor = net.fc(h)
    return logits


def _resnet_end(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.forward_head(h)
    return features


CHAINS: dict[str, Callable[[Any, bool], list[Run] | None]] = {
    "timm.models.vision_transformer.VisionTransformer": _vit,
    "timm.models.deit.VisionTransformerDistilled": _distilled,
    "timm.models.eva.Eva": _eva,
    "timm.models.beit.Beit": _beit,
    "timm.models.convnext.ConvNeXt": _convnext,
    "timm.models.resnet.ResNet": _resnet,
}
