"""How the package transformers names the tensors of networks: a table each.

Also how open_clip names those of an image tower, for timm's networks of the same form.

A row has a pattern of our names (those of timm or open_clip), and the names of transformers from which the tensor is
made. Version 5 of transformers writes files with the names of version 4, but has others in memory, which
`torch.save(model.state_dict())` writes; `live` turns the former into the latter.
"""

import math
import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from finetune.models.upstream.layouts import Layout, Source, Wanted
from finetune.models.upstream.tables import (
    Row,
    Table,
    first_third,
    of_patches,
    other_thirds,
    placed,
    qkv,
    row,
    transposed,
    with_batch,
)
from finetune.models.upstream.transformers_stages import CONVNEXT, DINOV3_CONVNEXT, SWIN

# Tensors without a use here: buffers that are computed anew, the token of masked patches, ViT's unused pooler.
IGNORED = re.compile(r"(position_ids|relative_position_index|mask_token|inv_freq)$|^pooler\.")


_VIT_STEM = (
    row(r"cls_token", "embeddings.cls_token"),
    row(r"dist_token", "embeddings.distillation_token"),
    row(r"pos_embed", "embeddings.position_embeddings"),
    row(r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    row(r"norm\.(\w+)", r"layernorm.\1"),
)
_VIT_ATTENTION = (
    qkv(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layer.\1.attention.attention", ("query", "key", "value"), r"\2"),
    row(r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
)
_HEADS = (row(r"head\.(\w+)", r"classifier.\1"),)
_LIVE_ATTENTION = (
    *(("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj")),
    *(("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")),
)

_VIT_ROWS = (
    *(*_VIT_STEM, *_VIT_ATTENTION),
    row(r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layer.\1.layernorm_before.\2"),
    row(r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layer.\1.layernorm_after.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
)
_VIT_LIVE = (
    *_LIVE_ATTENTION,
    *(("encoder.layer.", "layers."), (".intermediate.dense", ".mlp.fc1"), (".output.dense", ".mlp.fc2")),
)
VIT = Table("transformers' ViT", (*_VIT_ROWS, *_HEADS), "gelu", 1e-12, _VIT_LIVE)
DEIT = Table(
    "transformers' DeiT",
    (
        *_VIT_ROWS,
        row(r"head\.(\w+)", r"cls_classifier.\1"),
        row(r"head_dist\.(\w+)", r"distillation_classifier.\1"),
    ),
    *("gelu", 1e-12, _VIT_LIVE, "dist_token"),
)

_BEIT_ATTENTION = r"encoder.layer.\1.attention.attention"
BEIT = Table(
    "transformers' BEiT",
    (
        row(r"blocks\.(\d+)\.attn\.q_bias", f"{_BEIT_ATTENTION}.query.bias"),  # the key has none
        row(r"blocks\.(\d+)\.attn\.v_bias", f"{_BEIT_ATTENTION}.value.bias"),
        row(
            r"blocks\.(\d+)\.attn\.relative_position_bias_table",
            f"{_BEIT_ATTENTION}.relative_position_bias.relative_position_bias_table",
        ),
        row(
            r"rel_pos_bias\.relative_position_bias_table", "encoder.relative_position_bias.relative_position_bias_table"
        ),
        row(r"blocks\.(\d+)\.gamma_(\d)", r"encoder.layer.\1.lambda_\2"),
        row(r"fc_norm\.(\w+)", r"pooler.layernorm.\1"),
        *(*_VIT_ROWS, *_HEADS),
    ),
    *("gelu", 1e-12),
    (
        ("attention.attention.relative_position_bias.", "relative_position_bias."),
        ("encoder.relative_position_bias.", "shared_position_bias."),
        *_VIT_LIVE,
    ),
    "blocks.0.gamma_1",
)

_DINOV2_BLOCKS = (
    *_VIT_ATTENTION,
    row(r"blocks\.(\d+)\.(norm\d)\.(\w+)", r"encoder.layer.\1.\2.\3"),
    row(r"blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
)
_DINOV2_MLP = (row(r"blocks\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"encoder.layer.\1.mlp.\2.\3"),)
_DINOV2_GATED = (
    row(r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layer.\1.mlp.weights_in.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.mlp.weights_out.\2"),
)
_DINOV2_GATED_LIVE = (
    row(
        r"blocks\.(\d+)\.mlp\.fc1\.(\w+)",
        *(r"encoder.layer.\1.mlp.gate_proj.\2", r"encoder.layer.\1.mlp.up_proj.\2"),
    ),
    row(r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layer.\1.mlp.down_proj.\2"),
)
_REGISTERS = (
    row(r"cls_token", "embeddings.cls_token", "embeddings.position_embeddings", make=placed),
    row(r"reg_token", "embeddings.register_tokens"),
    row(r"pos_embed", "embeddings.position_embeddings", make=of_patches),
)
DINOV2 = tuple(
    Table(f"transformers' {name}", (*stem, *_VIT_STEM, *_DINOV2_BLOCKS, *mlp), "gelu", 1e-6, _LIVE_ATTENTION, has)
    for name, stem, has in (("DINOv2", (), "cls_token"), ("DINOv2 with registers", _REGISTERS, "reg_token"))
    for mlp in (_DINOV2_MLP, _DINOV2_GATED, _DINOV2_GATED_LIVE)
)

_DINOV3_ROWS = (
    row(r"cls_token", "embeddings.cls_token"),
    row(r"reg_token", "embeddings.register_tokens"),
    row(r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.\1"),
    row(r"norm\.(\w+)", r"norm.\1"),
    qkv(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"layer.\1.attention"),
    row(r"blocks\.(\d+)\.attn\.([qv])_bias", r"layer.\1.attention.\2_proj.bias"),
    row(r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layer.\1.attention.o_proj.\2"),
    row(r"blocks\.(\d+)\.(norm\d)\.(\w+)", r"layer.\1.\2.\3"),
    row(r"blocks\.(\d+)\.gamma_(\d)", r"layer.\1.layer_scale\2.lambda1"),
    row(r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"layer.\1.mlp.up_proj.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc1_g\.(\w+)", r"layer.\1.mlp.gate_proj.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc1_x\.(\w+)", r"layer.\1.mlp.up_proj.\2"),
    row(r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"layer.\1.mlp.down_proj.\2"),
)
DINOV3 = Table("transformers' DINOv3", _DINOV3_ROWS, "gelu", 1e-5, (("layer.", "model.layer."),), "blocks.0.gamma_1")


def _pair_blocks(ours: str, theirs: str) -> tuple[Row, ...]:
    """The blocks that CLIP and SigLIP share, as timm names them."""
    return (
        qkv(rf"{ours}\.(\d+)\.attn\.qkv\.(\w+)", rf"{theirs}.\1.self_attn"),
        row(rf"{ours}\.(\d+)\.attn\.proj\.(\w+)", rf"{theirs}.\1.self_attn.out_proj.\2"),
        row(rf"{ours}\.(\d+)\.norm(\d)\.(\w+)", rf"{theirs}.\1.layer_norm\2.\3"),
        row(rf"{ours}\.(\d+)\.mlp\.(fc\d)\.(\w+)", rf"{theirs}.\1.mlp.\2.\3"),
    )


def _resblocks(ours: str, theirs: str) -> tuple[Row, ...]:
    """The same blocks, as open_clip names them."""
    return (
        qkv(rf"{ours}\.(\d+)\.attn\.in_proj_(\w+)", rf"{theirs}.\1.self_attn"),
        row(rf"{ours}\.(\d+)\.attn\.out_proj\.(\w+)", rf"{theirs}.\1.self_attn.out_proj.\2"),
        row(rf"{ours}\.(\d+)\.ln_(\d)\.(\w+)", rf"{theirs}.\1.layer_norm\2.\3"),
        row(rf"{ours}\.(\d+)\.mlp\.c_fc\.(\w+)", rf"{theirs}.\1.mlp.fc1.\2"),
        row(rf"{ours}\.(\d+)\.mlp\.c_proj\.(\w+)", rf"{theirs}.\1.mlp.fc2.\2"),
    )


def _siglip_tower(ours: str, theirs: str) -> tuple[Row, ...]:
    pool = rf"{ours}attn_pool\."
    return (
        row(rf"{ours}pos_embed", f"{theirs}embeddings.position_embedding.weight", make=with_batch),
        row(rf"{ours}patch_embed\.proj\.(\w+)", rf"{theirs}embeddings.patch_embedding.\1"),
        *_pair_blocks(rf"{ours}blocks", f"{theirs}encoder.layers"),
        row(rf"{ours}norm\.(\w+)", rf"{theirs}post_layernorm.\1"),
        row(rf"{pool}latent", f"{theirs}head.probe"),
        row(rf"{pool}q\.(\w+)", rf"{theirs}head.attention.in_proj_\1", make=first_third),
        row(rf"{pool}kv\.(\w+)", rf"{theirs}head.attention.in_proj_\1", make=other_thirds),
        row(rf"{pool}proj\.(\w+)", rf"{theirs}head.attention.out_proj.\1"),
        row(rf"{pool}norm\.(\w+)", rf"{theirs}head.layernorm.\1"),
        row(rf"{pool}mlp\.(fc\d)\.(\w+)", rf"{theirs}head.mlp.\1.\2"),
    )


# The text tower; it stands under `text.` in the newer of open_clip's two classes.
_TEXT = (
    row(r"(?:text\.)?positional_embedding", "text_model.embeddings.position_embedding.weight"),
    row(r"(?:text\.)?token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    *_resblocks(r"(?:text\.)?transformer\.resblocks", "text_model.encoder.layers"),
    row(r"(?:text\.)?ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    row(r"(logit_scale|logit_bias)", r"\1"),
)


def on_grid(table: Tensor) -> Tensor:
    """The positions on the square grid of the patches. (patches, width) -> (1, side, side, width)."""
    side = math.isqrt(len(table))
    return table.reshape(1, side, side, table.shape[-1])


# SigLIP2's networks for images of any form; the others have the layout of SigLIP.
NAFLEX = Table(
    "transformers' SigLIP2 NaFlex",
    (
        row(r"embeds\.pos_embed", "embeddings.position_embedding.weight", make=on_grid),
        row(r"embeds\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
        *_siglip_tower("", ""),
        row(r"head\.(\w+)", r"classifier.\1"),
    ),
    *("gelu_pytorch_tanh", 1e-6, (), "embeds.proj.weight"),
)
SIGLIP_TIMM = Table(
    "transformers' SigLIP",
    (*_siglip_tower("", ""), row(r"head\.(\w+)", r"classifier.\1")),
    *("gelu_pytorch_tanh", 1e-6),
)
SIGLIP = Table(
    "transformers' SigLIP",
    (
        *_siglip_tower(r"visual\.trunk\.", "vision_model."),
        *_TEXT,
        row(r"text\.text_projection\.(\w+)", r"text_model.head.\1"),
    ),
    *("gelu_pytorch_tanh", 1e-6),
)
SIGLIP_TOWER = Table("transformers' SigLIP", _siglip_tower(r"visual\.trunk\.", ""), "gelu_pytorch_tanh", 1e-6)
CLIP_TIMM = Table(
    "transformers' CLIP",
    (
        row(r"cls_token", "embeddings.class_embedding", make=with_batch),
        row(r"pos_embed", "embeddings.position_embedding.weight", make=with_batch),
        row(r"patch_embed\.proj\.weight", "embeddings.patch_embedding.weight"),
        row(r"norm_pre\.(\w+)", r"pre_layrnorm.\1"),  # the misspelling is transformers'
        *_pair_blocks("blocks", "encoder.layers"),
        row(r"norm\.(\w+)", r"post_layernorm.\1"),
    ),
    *("quick_gelu", 1e-5, (), "norm_pre.weight"),
)
CLIP = Table(
    "transformers' CLIP",
    (
        row(r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
        row(r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        row(r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
        row(r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
        *_resblocks(r"visual\.transformer\.resblocks", "vision_model.encoder.layers"),
        row(r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
        row(r"visual\.proj", "visual_projection.weight", make=transposed),
        *_TEXT,
        row(r"(?:text\.)?text_projection", "text_projection.weight", make=transposed),
    ),
    *("quick_gelu", 1e-5),
)
# The image tower of OpenAI's and open_clip's CLIPs, which stands there under `visual.`.
OPEN_CLIP = Table(
    "open_clip",
    (
        row(r"cls_token", "class_embedding", make=with_batch),
        row(r"pos_embed", "positional_embedding", make=with_batch),
        row(r"patch_embed\.proj\.(\w+)", r"conv1.\1"),
        row(r"norm_pre\.(\w+)", r"ln_pre.\1"),
        row(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"transformer.resblocks.\1.attn.in_proj_\2"),
        row(r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
        row(r"blocks\.(\d+)\.norm(\d)\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
        row(r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
        row(r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
        row(r"norm\.(\w+)", r"ln_post.\1"),
    ),
    *("gelu", 1e-5, (), "norm_pre.weight"),
)
TABLES = (
    *(DEIT, VIT, BEIT, *DINOV2, DINOV3, CLIP_TIMM, SIGLIP_TIMM, NAFLEX, CLIP, SIGLIP, SIGLIP_TOWER, OPEN_CLIP),
    *(SWIN, CONVNEXT, DINOV3_CONVNEXT),
)


def transformers_layouts(wanted: Wanted) -> Iterator[Layout]:
    """The layouts of transformers, and that of open_clip's image tower, which have every tensor of a network."""
    for table in TABLES:
        if table.has and table.has not in wanted.shapes:
            continue
        found = sources(wanted.shapes, table)
        if all(own in found for own in wanted.shapes if wanted.needs(own)):
            yield Layout(found, table.program, IGNORED)
            if table.live:
                lived = {
                    own: Source(tuple(_live(name, table) for name in source.names), source.make)
                    for own, source in found.items()
                }
                yield Layout(lived, table.program, IGNORED)


def table_of(program: str) -> Table:
    """The table of a layout, by the layout's name."""
    return next(table for table in TABLES if table.program == program)


def sources(names: Iterable[str], table: Table) -> dict[str, Source]:
    """For each of our names that a table has: the tensors of transformers of which ours is made."""
    return {own: source for own in names if (source := _source(own, table.rows)) is not None}


def _source(own: str, rows: tuple[Row, ...]) -> Source | None:
    for pattern, theirs, make in rows:
        if match := re.fullmatch(pattern, own):
            return Source(tuple(match.expand(name) for name in theirs), make)
    return None


def _live(name: str, table: Table) -> str:
    for old, new in table.live:
        name = name.replace(old, new)
    return name
