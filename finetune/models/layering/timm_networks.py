"""timm's networks: which name belongs to which layer, and the functions that run a layer.

Each function calls upstream's modules and methods in upstream's order, so that a network gives the same bits whole and
in slices, also in train mode from one state of the random generator. One tensor goes from layer to layer, so each block
computes again what timm computes once for all blocks (rotary embeddings, relative positions), at little cost.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.core.ownership import assign_layers
from finetune.models.layering.rules import NOTHING, WITH_PREVIOUS, GroupKey, Matcher, Rule, group_key
from finetune.models.layering.running import Run, in_blocks, in_residual_stages, through
from finetune.system.errors import UserError

# The parts between the last block and the classifier. Where timm's matcher leaves one out, timm trains it at the
# classifier's rate without a word. Here a name that neither this expression nor a matcher knows is an error.
READOUT = (
    r"(encoder\.)?(attn_pool|fc_norm|norm|norm_head|head_norm|conv_head|final_conv|final_act|final_layer|incre_modules"
    r"|downsamp_modules|in_conv|pre_classifier|pre_logits|msfa|neck|std_bias|std_scale|pooler|global_pool|flatten"
    r"|head|heads|head_dist|head_drop)(\.|$)|features\.norm5"
)
# The parts that run ahead of the first block, or that all blocks share, where some matchers do not know them. A table
# that all blocks share must be in the stem: in a higher layer it would learn, and change the output of frozen blocks.
STEM = r"(encoder\.)?(rope|shared_rel_pos|pos_drop|patch_drop|reroll|unroll)(\.|$)"

_STAGES: Matcher = {
    "stem": r"stem",
    "blocks": [(r"stages\.(\d+)\.downsample", (0,)), (r"stages\.(\d+)\.blocks\.(\d+)", None)],
}
# Matchers for networks without one of timm's, or whose own does not follow the order of the forward pass.
MATCHERS: dict[str, Matcher] = {
    "MetaFormer": _STAGES,
    "MobileNetV5Encoder": {"stem": r"conv_stem", "blocks": r"blocks\.(\d+)\.(\d+)"},
    # Each stage is one flat list: downsampling, blocks, a norm.
    "CSATv2": {"stem": r"stem_dct", "blocks": r"stages\.(\d+)\.(\d+)"},
    "PoolingVisionTransformer": {
        "stem": r"patch_embed|pos_embed|cls_token|pos_drop",
        "blocks": [(r"transformers\.(\d+)\.(?:pool|norm)", (0,)), (r"transformers\.(\d+)\.blocks\.(\d+)", None)],
    },
    # timm counts the class-attention blocks together with the last patch blocks, which run before them.
    "Cait": {
        "stem": r"cls_token|pos_embed|patch_embed|pos_drop",
        "blocks": r"blocks\.(\d+)",
        "class_blocks": r"blocks_token_only\.(\d+)",
    },
}
# Networks whose `norm_pre` runs ahead of the blocks, as in CLIP. In ConvNeXt that name is the norm behind the blocks.
PRE_NORM = {"VisionTransformer", "VisionTransformerDistilled", "VisionTransformerSAM", "NaFlexVit", "Eva"}


def rule_of(net: nn.Module, kinds: set[str]) -> Rule:
    """Which name of a timm network belongs to which layer; `kinds` are the names of its class and its base classes."""
    classifiers = "|".join(rf"{re.escape(name)}(\.|$)" for name in classifier_names(net)) or NOTHING
    return Rule(
        matcher=next((MATCHERS[kind] for kind in kinds if kind in MATCHERS), None) or _own_matcher(net),
        # These have several classifiers and learned weights that mix their logits; the weights belong to the head.
        head=classifiers + (r"|weights(_dist)?$" if kinds & {"EfficientViM", "EfficientViMDistilled"} else ""),
        # In SelecSls `head` is the last block of convolutions, and the classifier is `fc`.
        readout=r"global_pool(\.|$)" if "SelecSls" in kinds else READOUT,
        stem=STEM + (r"|norm_pre(\.|$)" if kinds & PRE_NORM else ""),
    )


def classifier_names(net: nn.Module) -> list[str]:
    """The modules of a timm network that give logits: one, or several whose logits are averaged; none in an encoder."""
    # `classifier` is None for an encoder. A network that was not built by timm's factory has no configuration.
    config = vars(net).get("pretrained_cfg") or {}
    named = config.get("classifier") or ("head", "head.fc", "fc", "classifier") * (not config)
    names = [named] if isinstance(named, str) else list(named)
    modules = dict(net.named_modules())
    if not config:
        names = [name for name in names if name in modules and isinstance(modules[name], nn.Linear)]
    # Not every configuration lists the classifier of the distillation token.
    names += [re.sub(r"\bhead\b(?!.*\bhead\b)", "head_dist", name) for name in names]
    return [name for name in dict.fromkeys(names) if name in modules]


def _own_matcher(net: Any) -> Matcher:
    try:
        return net.group_matcher(coarse=False)  # type: ignore[no-any-return]
    except AttributeError as error:
        problem = f"{type(net).__name__} has no group_matcher, which says the order of its layers"
        place = "MATCHERS in finetune/models/layering/timm_networks.py"
        raise UserError(f"{problem}, and {place} has no rule for it") from error


def with_timm_steps(net: nn.Module, layers: list[Layer], kinds: set[str]) -> list[Layer]:
    """The same layers, with `timm_steps` for the parameters that timm trains at another distance from the output.

    timm's `param_groups_layer_decay` gives a parameter the scale `decay ** (top - group)`. A name that the matcher
    leaves out is at the top. A bare tower is counted with the classifier that it gets later.
    """
    if kinds & (MATCHERS.keys() - {"Cait"}):
        return layers  # timm has no matcher for these networks, and so no rule to follow
    matcher = _own_matcher(net)
    keys = {name: group_key(name, matcher) for name, _ in net.named_parameters()}
    groups: dict[GroupKey, int] = {}
    for found_key in sorted({key for key in keys.values() if key is not None}):
        number = max(groups.values(), default=-1)
        groups[found_key] = number if found_key[-1] == WITH_PREVIOUS and number >= 0 else number + 1
    top = max(groups.values()) + (layers[-1].name != "head" or None in keys.values())
    ours = assign_layers(net, layers)
    last = sum(layer.name.startswith("block.") for layer in layers) + 1
    found: list[dict[str, int]] = [{} for _ in layers]
    for name, key in keys.items():
        steps = top - (top if key is None else groups[key])
        if steps != last - min(ours[name], last):
            found[ours[name]][name] = steps
    return [dataclasses.replace(layer, timm_steps=steps) for layer, steps in zip(layers, found, strict=True)]


# The functions of each family, in the order of its layers: stem, blocks, readout and, `with_head`, the classifier. A
# bare tower has an Identity in the place of its classifier, and so the whole end of the network is its readout.

_TOKENS = through("patch_embed", "_pos_embed", "patch_drop", "norm_pre")
_END = through("norm", "forward_head")


def vision_transformer(net: Any, with_head: bool) -> list[Run]:
    """ViT."""
    return [_TOKENS, *in_blocks("blocks.{}", len(net.blocks)), *([_pooled, through("head")] if with_head else [_END])]


def _pooled(net: Any, h: Tensor) -> Tensor:
    return net.forward_head(net.norm(h), pre_logits=True)  # type: ignore[no-any-return]


def distilled(net: Any, with_head: bool) -> list[Run]:
    """Distilled ViT (DeiT): two tokens, each with a classifier of its own; the logits are averaged."""
    return [_TOKENS, *in_blocks("blocks.{}", len(net.blocks)), *([_two_tokens, _two_heads] if with_head else [_END])]


def _two_tokens(net: Any, h: Tensor) -> Tensor:
    """Class and distillation token. (batch, tokens, width) -> (batch, 2, width)."""
    h = net.norm(h)
    return torch.stack([net.head_drop(h[:, 0]), net.head_drop(h[:, 1])], dim=1)


def _two_heads(net: Any, h: Tensor) -> Tensor:
    # timm averages too, except in its own distillation training, where it returns both.
    return (net.head(h[:, 0]) + net.head_dist(h[:, 1])) / 2  # type: ignore[no-any-return]


def eva(net: Any, with_head: bool) -> list[Run] | None:
    """EVA, EVA-02, DINOv3, Perception Encoder: absolute and rotary position embeddings."""
    if net.rope is not None and (net.patch_drop is not None or net.rope.aug_active):
        # The stem draws which patches stay, or how positions shift, and every block needs that draw. A single tensor
        # between layers cannot carry it.
        return None
    blocks = [partial(_eva_block, index=index) for index in range(len(net.blocks))]
    return [_eva_stem, *blocks, *([_pooled, through("head")] if with_head else [_END])]


def _eva_stem(net: Any, h: Tensor) -> Tensor:
    if net.rope is not None and net.dynamic_img_size and h.shape[-1] != h.shape[-2]:
        why = "with rotary positions and a free image size, layers that run one by one see only the number of tokens"
        raise UserError(f"images of {h.shape[-1]} x {h.shape[-2]} pixels must be square: {why}")
    return net.norm_pre(net._pos_embed(net.patch_embed(h))[0])  # type: ignore[no-any-return]


def _eva_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    return net.blocks[index](h, rope=rotary(net, h, index))  # type: ignore[no-any-return]


def rotary(net: Any, h: Tensor, index: int) -> Tensor | None:
    """The rotary embedding for block `index` of an Eva, as its `_pos_embed` computes it for all blocks."""
    if net.rope is None:
        return None
    shape = {}
    if net.dynamic_img_size:
        side = math.isqrt(h.shape[1] - net.num_prefix_tokens)
        shape = {"shape": (side, side)}
    elif type(net.rope).__name__ == "RotaryEmbeddingMRope":  # alone among timm's, it does not store its grid
        shape = {"shape": net.patch_embed.grid_size}
    embed = net.rope.get_embed(**shape)
    return embed[index] if net.rope_mixed else embed  # type: ignore[no-any-return]


def beit(net: Any, with_head: bool) -> list[Run]:
    """BEiT: relative positions, in a table of each block or in one table for all blocks."""
    blocks = [partial(_beit_block, index=index) for index in range(len(net.blocks))]
    return [_beit_stem, *blocks, *([_pooled, through("head")] if with_head else [_END])]


def _beit_stem(net: Any, h: Tensor) -> Tensor:
    h = net.patch_embed(h)
    h = torch.cat((net.cls_token.expand(h.shape[0], -1, -1), h), dim=1)
    if net.pos_embed is not None:
        h = h + net.pos_embed
    return net.pos_drop(h)  # type: ignore[no-any-return]


def _beit_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    shared = None if net.rel_pos_bias is None else net.rel_pos_bias()
    return net.blocks[index](h, shared_rel_pos_bias=shared)  # type: ignore[no-any-return]


def convnext(net: Any, with_head: bool) -> list[Run] | None:
    """ConvNeXt; None where it does not pool, and so has a classifier at every position."""
    if with_head and not isinstance(net.head.fc, nn.Linear):
        return None
    blocks = [
        through(f"stages.{number}.downsample", path) if index == 0 else through(path)
        for number, stage in enumerate(net.stages)
        for index in range(len(stage.blocks))
        for path in [f"stages.{number}.blocks.{index}"]
    ]
    tail = [_convnext_readout, through("head.fc")] if with_head else [through("norm_pre", "forward_head")]
    return [through("stem"), *blocks, *tail]


def _convnext_readout(net: Any, h: Tensor) -> Tensor:
    return net.forward_head(net.norm_pre(h), pre_logits=True)  # type: ignore[no-any-return]


def resnet(net: Any, with_head: bool) -> list[Run] | None:
    """ResNet, ResNeXt; None where it does not pool, and so has a classifier at every position."""
    if with_head and not isinstance(net.fc, nn.Linear):
        return None
    tail = [through("global_pool"), _resnet_head] if with_head else [through("forward_head")]
    return [through("conv1", "bn1", "act1", "maxpool"), *in_residual_stages(net), *tail]


def _resnet_head(net: Any, h: Tensor) -> Tensor:
    features = F.dropout(h, float(net.drop_rate), net.training) if net.drop_rate else h
    return net.fc(features)  # type: ignore[no-any-return]
