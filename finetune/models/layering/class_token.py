"""The last block for the tokens that are read out, where those are class tokens: `train.class_token_only`.

Of the last block a classifier reads the class token. Keys and values of all tokens go into that one, so they are
computed; queries, the projection of attention, the second norm and the MLP of the patch tokens go nowhere, so they are
not. Of a patch token's work (12 times its width squared: 3 for query, key and value, 1 for the projection, 8 for the
MLP) 2 are left. Logits and gradients are the same but for rounding.

The ordinary run is taken, bit for bit, wherever dropout is at work in that block, because it would draw other random
numbers (drop path draws one a sample, so it may be at work), and wherever the block is no longer of the class that it
was built as (a wrapper that must see its forward call has taken its place). A network gets no such run where patch
tokens are read, or where a part of block or readout is of a class not known here to treat each token by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.models.layering.timm_chains import rotary

Run = Callable[[Any, Tensor], Tensor]
# (network, its last block, all tokens) -> the tokens that are read.
RunBlock = Callable[[Any, Any, Tensor], Tensor]

# Classes that treat each token by itself: what they give for one does not depend on the others.
TOKENWISE = {
    *(f"torch.nn.modules.activation.{name}" for name in ("GELU", "ReLU", "SiLU", "Sigmoid", "Tanh")),
    *(f"torch.nn.modules.linear.{name}" for name in ("Identity", "Linear", "NonDynamicallyQuantizableLinear")),
    *(f"torch.nn.modules.normalization.{name}" for name in ("LayerNorm", "RMSNorm")),
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.dropout.Dropout"),
    *(f"timm.layers.activations.{name}" for name in ("GELU", "GELUTanh", "QuickGELU")),
    *(f"timm.layers.mlp.{name}" for name in ("GluMlp", "Mlp", "SwiGLU")),
    *(f"timm.layers.norm.{name}" for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")),
    *("timm.layers.drop.DropPath", "timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale"),
    *(f"open_clip.transformer.{name}" for name in ("LayerNorm", "LayerNormFp32", "LayerScale", "QuickGELU")),
    "torchvision.models.vision_transformer.MLPBlock",
}
MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
TIMM_ATTENTION = "timm.layers.attention.Attention"
EVA_ATTENTION = ("timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope")
# Parts of timm's attentions that `_timm_attention` knows what to do with: a version with others is unknown.
ATTENTION_PARTS = {
    *("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm"),
    *("attn_drop", "norm", "gate", "proj", "proj_drop"),
}


def with_class_token_run(net: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The same layers, the last block with its `run_class_token` where this network can have one.

    Args:
        net: A network of timm, open_clip (the image tower) or torchvision.
        layers: Its layers, their `owns` and `run` as seen from `net`.
    """
    build = BUILDERS.get(_class_name(net))
    last = max((index for index, layer in enumerate(layers) if layer.name.startswith("block.")), default=0)
    whole = layers[last].run
    if build is None or whole is None:
        return list(layers)
    (path,) = layers[last].owns
    block = net.get_submodule(path)
    few = build(net, block)
    if few is None:
        return list(layers)
    run = partial(_run_last_block, path=path, kind=type(block), whole=whole, few=few)
    return [
        dataclasses.replace(layer, run_class_token=run) if index == last else layer
        for index, layer in enumerate(layers)
    ]


def _run_last_block(net: Any, h: Tensor, *, path: str, kind: type[nn.Module], whole: Run, few: RunBlock) -> Tensor:
    block = net.get_submodule(path)
    if type(block) is not kind or any(_drops(module) for module in block.modules()):
        return whole(net, h)
    return few(net, block, h)


def _drops(module: nn.Module) -> bool:
    """Whether a module draws random numbers for every token now."""
    if isinstance(module, nn.Dropout):
        return module.training and module.p > 0
    return isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_known(block: Any, kind: str, attention: nn.Module, kinds: Sequence[str], readout: Sequence[nn.Module]) -> bool:
    """Whether all parts of block and readout are of classes known here; a subclass may do something else."""
    others = {*block.modules()} - {block, attention}
    others |= {module for part in readout for module in part.modules()}
    return (
        _class_name(block) == kind
        and _class_name(attention) in kinds
        and all(_class_name(module) in TOKENWISE for module in others)
    )


# timm


def _timm_vit(net: Any, block: Any) -> RunBlock | None:
    if net.global_pool != "token" or net.attn_pool is not None:
        return None
    return _timm_block_run(net, block, tokens=1)


def _timm_distilled(net: Any, block: Any) -> RunBlock | None:
    return _timm_block_run(net, block, tokens=2)  # the class token and the one behind it, each with its classifier


def _timm_block_run(net: Any, block: Any, tokens: int) -> RunBlock | None:
    attention = dict(block.named_children()).get("attn")
    kind, readout = "timm.models.vision_transformer.Block", (net.norm, net.fc_norm)
    if attention is None or not _is_known(block, kind, attention, (TIMM_ATTENTION,), readout):
        return None
    return partial(_run_timm_block, tokens=tokens) if _has_known_parts(attention) else None


def _run_timm_block(net: Any, block: Any, h: Tensor, *, tokens: int) -> Tensor:
    x = h[:, :tokens] + block.drop_path1(block.ls1(_timm_attention(block.attn, block.norm1(h), tokens)))
    out: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return out


def _timm_eva(net: Any, block: Any) -> RunBlock | None:
    if net.global_pool != "token" or net.attn_pool is not None:
        return None
    kind, readout = "timm.models.eva.EvaBlock", (net.norm, net.fc_norm)
    if not _is_known(block, kind, block.attn, EVA_ATTENTION, readout) or not _has_known_parts(block.attn):
        return None
    return _run_eva_block if block.attn.num_prefix_tokens >= 1 else None  # else positions rotate the class token too


def _run_eva_block(net: Any, block: Any, h: Tensor) -> Tensor:
    attended = _timm_attention(block.attn, block.norm1(h), 1, rope=rotary(net, h, len(net.blocks) - 1))
    x = h[:, :1] + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(x))
    out: Tensor = x + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)
    return out


def _has_known_parts(attention: nn.Module) -> bool:
    names = {name for name, _ in attention.named_children()}
    return names <= ATTENTION_PARTS and {"proj", "proj_drop", "q_norm", "k_norm", "norm"} <= names


def _timm_attention(attn: Any, h: Tensor, tokens: int, rope: Tensor | None = None) -> Tensor:
    """What `Attention`, `EvaAttention` and `AttentionRope` of timm do, with the first tokens' queries only.

    Args:
        attn: The module, dropout not at work.
        h: All tokens behind the first norm (batch, length, width).
        tokens: How many of them ask, from the first on; positions rotate none of these.
        rope: Rotary embedding of the patch tokens.

    Returns:
        (batch, tokens, width).
    """
    batch, width = len(h), attn.proj.in_features
    few = h[:, :tokens]
    q, k, v = (
        part.reshape(batch, part.shape[1], -1, width // attn.num_heads).transpose(1, 2)
        for part in _project(attn, h, few, width)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        k = _rotated(attn, k, rope).type_as(v)
        q = q.type_as(v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # keys and values that several heads share
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, tokens, width))
    gate = dict(attn.named_children()).get("gate")
    found: Tensor = attn.proj_drop(attn.proj(out if gate is None else out * gate(few).sigmoid()))
    return found


def _project(attn: Any, h: Tensor, few: Tensor, width: int) -> Iterator[Tensor]:
    """Queries of `few`, keys and values of all tokens, heads side by side: (batch, tokens, heads * head width) each."""
    if attn.qkv is None:
        yield from (attn.q_proj(few), attn.k_proj(h), attn.v_proj(h))
        return
    bias = attn.qkv.bias
    if "q_bias" in dict(attn.named_parameters(recurse=False)):
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    # One split, and not two slices: its gradient is one concatenation, not a sum of two matrices padded with zeros.
    for_q, for_kv = attn.qkv.weight.split([width, 2 * width])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
    yield F.linear(few, for_q, bias_q)
    yield from F.linear(h, for_kv, bias_kv).chunk(2, dim=-1)


def _rotated(attn: Any, k: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    first = attn.num_prefix_tokens
    return torch.cat([k[:, :, :first], apply_rot_embed_cat(k[:, :, first:], rope, half=attn.rotate_half)], dim=2)


# open_clip and torchvision: torch's own attention takes other queries than keys as it is.


def _open_clip_vit(net: Any, block: Any) -> RunBlock | None:
    if net.pool_type != "tok" or net.attn_pool is not None or net.output_tokens:
        return None
    kind = "open_clip.transformer.ResidualAttentionBlock"
    known = _is_known(block, kind, block.attn, (MULTIHEAD,), (net.ln_post,))
    return _run_open_clip_block if known and block.attn.batch_first else None


def _run_open_clip_block(net: Any, block: Any, h: Tensor) -> Tensor:
    y = block.ln_1(h)
    x = h[:, :1] + block.ls_1(block.attention(q_x=y[:, :1], k_x=y, v_x=y))
    out: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return out


def _torchvision_vit(net: Any, block: Any) -> RunBlock | None:
    kind = "torchvision.models.vision_transformer.EncoderBlock"
    known = _is_known(block, kind, block.self_attention, (MULTIHEAD,), (net.encoder.ln,))
    return _run_torchvision_block if known else None


def _run_torchvision_block(net: Any, block: Any, h: Tensor) -> Tensor:
    y = block.ln_1(h)
    x = block.dropout(block.self_attention(y[:, :1], y, y, need_weights=False)[0]) + h[:, :1]
    out: Tensor = x + block.mlp(block.ln_2(x))
    return out


BUILDERS: dict[str, Callable[[Any, Any], RunBlock | None]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm_vit,
    "timm.models.deit.VisionTransformerDistilled": _timm_distilled,
    "timm.models.eva.Eva": _timm_eva,
    "open_clip.transformer.VisionTransformer": _open_clip_vit,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision_vit,
}
