"""A shorter last block for networks that classify the class token alone: `train.class_token_only`.

Nothing reads the other tokens behind the last block, and only attention mixes tokens. So the shorter run computes keys
and values for all tokens, and all else for the class token: 2 of a block's 12 width^2 multiplications a token; logits
and gradients differ by rounding alone. The whole block runs where dropout is active in it (it draws a number for every
token, drop path one for each image), and where its class changed after the build: a wrapper must see its forward call.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.models.layering.running import Run, class_name
from finetune.models.layering.timm_networks import rotary

# (network, its last block, all tokens) -> the tokens that the readout reads.
RunBlock = Callable[[Any, Any, Tensor], Tensor]

# Classes that treat each token by itself: the output at one token does not depend on the other tokens. Subclasses of
# them are not known to do so, since their forward pass may be another.
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
EVA_ATTENTION = ("timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope")
# The parts of timm's attention modules that `_timm_attention` computes. An attention with another part is unknown.
PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def with_class_token_run(
    net: nn.Module, layers: Sequence[Layer], build: Callable[[Any, Any], RunBlock | None]
) -> list[Layer]:
    """The same layers, the last block with the shorter run that `build(net, block)` gives, if it gives one."""
    last = [layer.name for layer in layers].index("readout") - 1
    whole = layers[last].run
    assert whole is not None
    if last == 1:
        return list(layers)  # the only block: its layer names the list of blocks, not the block in it
    (path,) = layers[last].owns
    few = build(net, net.get_submodule(path))
    if few is None:
        return list(layers)
    run = partial(_run_last_block, path=path, kind=type(net.get_submodule(path)), whole=whole, few=few)
    return [*layers[:last], dataclasses.replace(layers[last], run_class_token=run), *layers[last + 1 :]]


def _run_last_block(net: Any, h: Tensor, *, path: str, kind: type[nn.Module], whole: Run, few: RunBlock) -> Tensor:
    block = net.get_submodule(path)
    if type(block) is not kind or any(_drops(module) for module in block.modules()):
        return whole(net, h)
    return few(net, block, h)


def _drops(module: nn.Module) -> bool:
    """Whether a module draws a random number for every token, in its present mode."""
    if isinstance(module, nn.Dropout):
        return module.training and module.p > 0
    return isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0


def _is_known(block: Any, kind: str, attention: nn.Module, kinds: Sequence[str], readout: Sequence[nn.Module]) -> bool:
    """Whether the block is a `kind`, its attention one of `kinds`, and all else in block and readout `TOKENWISE`."""
    others = {*block.modules()} - {block, attention} | {module for part in readout for module in part.modules()}
    is_known_kind = class_name(block) == kind and class_name(attention) in kinds
    return is_known_kind and all(class_name(module) in TOKENWISE for module in others)


def timm_vit(net: Any, block: Any) -> RunBlock | None:
    """The shorter run for ViT, where it reads the class token."""
    if net.global_pool != "token" or net.attn_pool is not None:
        return None
    return _timm_block_run(net, block, tokens=1)


def timm_distilled(net: Any, block: Any) -> RunBlock | None:
    """The shorter run for a distilled ViT: it reads the class token and, behind it, the distillation token."""
    return _timm_block_run(net, block, tokens=2)


def _timm_block_run(net: Any, block: Any, tokens: int) -> RunBlock | None:
    attention = dict(block.named_children()).get("attn")
    kind, readout = "timm.models.vision_transformer.Block", (net.norm, net.fc_norm)
    if attention is None or not _is_known(block, kind, attention, ("timm.layers.attention.Attention",), readout):
        return None
    return partial(_run_timm_block, tokens=tokens) if _has_known_parts(attention) else None


def _run_timm_block(net: Any, block: Any, h: Tensor, *, tokens: int) -> Tensor:
    x = h[:, :tokens] + block.drop_path1(block.ls1(_timm_attention(block.attn, block.norm1(h), tokens)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def timm_eva(net: Any, block: Any) -> RunBlock | None:
    """The shorter run for EVA and EVA-02, where they read the class token."""
    if net.global_pool != "token" or net.attn_pool is not None:
        return None
    kind, readout = "timm.models.eva.EvaBlock", (net.norm, net.fc_norm)
    if not _is_known(block, kind, block.attn, EVA_ATTENTION, readout) or not _has_known_parts(block.attn):
        return None
    # Without prefix tokens the rotary embedding would rotate the class token's query too.
    return _run_eva_block if block.attn.num_prefix_tokens >= 1 else None


def _run_eva_block(net: Any, block: Any, h: Tensor) -> Tensor:
    attended = _timm_attention(block.attn, block.norm1(h), 1, rope=rotary(net, h, len(net.blocks) - 1))
    x = h[:, :1] + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(x))
    out: Tensor = x + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)
    return out


def _has_known_parts(attention: nn.Module) -> bool:
    names = {name for name, _ in attention.named_children()}
    return names <= PARTS and {"proj", "proj_drop", "q_norm", "k_norm", "norm"} <= names


def _timm_attention(attn: Any, h: Tensor, tokens: int, rope: Tensor | None = None) -> Tensor:
    """The output of timm's `Attention`, `EvaAttention` and `AttentionRope` at the first tokens, (batch, tokens, width).

    `h` are all tokens behind the first norm, (batch, length, width), and `rope` the rotary embedding of the patch
    tokens. The first `tokens` must be prefix tokens, which `rope` does not rotate; dropout must not be active.
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
    if groups > 1:  # several heads share a key and a value
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, tokens, width))
    gate = dict(attn.named_children()).get("gate")
    return attn.proj_drop(attn.proj(out if gate is None else out * gate(few).sigmoid()))  # type: ignore[no-any-return]


def _project(attn: Any, h: Tensor, few: Tensor, width: int) -> Iterator[Tensor]:
    """Queries of `few`, then keys and values of `h`, each (batch, tokens, heads * head width)."""
    if attn.qkv is None:
        yield from (attn.q_proj(few), attn.k_proj(h), attn.v_proj(h))
        return
    bias = attn.qkv.bias
    if "q_bias" in dict(attn.named_parameters(recurse=False)):
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    # `split`, because its gradient is one concatenation. Two slices would add two matrices padded with zeros.
    for_q, for_kv = attn.qkv.weight.split([width, 2 * width])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
    yield F.linear(few, for_q, bias_q)
    yield from F.linear(h, for_kv, bias_kv).chunk(2, dim=-1)


def _rotated(attn: Any, k: Tensor, rope: Tensor) -> Tensor:
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    first = attn.num_prefix_tokens
    return torch.cat([k[:, :, :first], apply_rot_embed_cat(k[:, :, first:], rope, half=attn.rotate_half)], dim=2)


def open_clip_vit(net: Any, block: Any) -> RunBlock | None:
    """The shorter run for open_clip's own ViT, where it reads the class token."""
    if net.pool_type != "tok" or net.attn_pool is not None or net.output_tokens:
        return None
    known = _is_known(block, "open_clip.transformer.ResidualAttentionBlock", block.attn, (MULTIHEAD,), (net.ln_post,))
    return _run_open_clip_block if known and block.attn.batch_first else None


def _run_open_clip_block(net: Any, block: Any, h: Tensor) -> Tensor:
    y = block.ln_1(h)  # torch's own attention, which torchvision uses too, accepts fewer queries than keys
    x = h[:, :1] + block.ls_1(block.attention(q_x=y[:, :1], k_x=y, v_x=y))
    return x + block.ls_2(block.mlp(block.ln_2(x)))  # type: ignore[no-any-return]


def torchvision_vit(net: Any, block: Any) -> RunBlock | None:
    """The shorter run for torchvision's ViT."""
    kind = "torchvision.models.vision_transformer.EncoderBlock"
    known = _is_known(block, kind, block.self_attention, (MULTIHEAD,), (net.encoder.ln,))
    return _run_torchvision_block if known else None


def _run_torchvision_block(net: Any, block: Any, h: Tensor) -> Tensor:
    y = block.ln_1(h)
    x = block.dropout(block.self_attention(y[:, :1], y, y, need_weights=False)[0]) + h[:, :1]
    return x + block.mlp(block.ln_2(x))  # type: ignore[no-any-return]
