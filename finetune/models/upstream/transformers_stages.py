"""How the package transformers names the tensors of networks in stages: Swin, ConvNeXt and DINOv3's ConvNeXt."""

from torch import Tensor

from finetune.models.upstream.tables import Table, qkv, row


def flat(weight: Tensor) -> Tensor:
    """A weight for each channel without its axes of length one."""
    return weight.flatten()


MAX_STAGES = 8  # real networks have four
_SWIN_ATTENTION = r"encoder.layers.\1.blocks.\2.attention"
_SWIN_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)"
SWIN = Table(
    "transformers' Swin",
    (
        row(r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
        row(r"patch_embed\.norm\.(\w+)", r"embeddings.norm.\1"),
        qkv(rf"{_SWIN_BLOCK}\.attn\.qkv\.(\w+)", f"{_SWIN_ATTENTION}.self", ("query", "key", "value"), r"\3"),
        row(rf"{_SWIN_BLOCK}\.attn\.proj\.(\w+)", rf"{_SWIN_ATTENTION}.output.dense.\3"),
        row(rf"{_SWIN_BLOCK}\.attn\.(relative_position_bias_table)", rf"{_SWIN_ATTENTION}.self.\3"),
        row(rf"{_SWIN_BLOCK}\.norm1\.(\w+)", r"encoder.layers.\1.blocks.\2.layernorm_before.\3"),
        row(rf"{_SWIN_BLOCK}\.norm2\.(\w+)", r"encoder.layers.\1.blocks.\2.layernorm_after.\3"),
        row(rf"{_SWIN_BLOCK}\.mlp\.fc1\.(\w+)", r"encoder.layers.\1.blocks.\2.intermediate.dense.\3"),
        row(rf"{_SWIN_BLOCK}\.mlp\.fc2\.(\w+)", r"encoder.layers.\1.blocks.\2.output.dense.\3"),
        # There a stage ends with the merging of patches, with which the next one begins here.
        *(
            row(rf"layers\.{stage}\.downsample\.(\w+)\.(\w+)", rf"encoder.layers.{stage - 1}.downsample.\1.\2")
            for stage in range(1, MAX_STAGES)
        ),
        row(r"norm\.(\w+)", r"layernorm.\1"),
        row(r"head\.fc\.(\w+)", r"classifier.\1"),
    ),
    *("gelu", 1e-5),
    (
        *(("attention.self.query", "attention.q_proj"), ("attention.self.key", "attention.k_proj")),
        *(("attention.self.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")),
        *((".intermediate.dense", ".mlp.fc1"), (".output.dense", ".mlp.fc2")),
        ("attention.self.relative", "attention.relative_position_bias.relative"),
    ),
)

_CONVNEXT_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)"
_CONVNEXT_LAYER = r"encoder.stages.\1.layers.\2"
# Its configuration gives the last norm alone an epsilon, 1e-12; the authors' and timm's is 1e-6, as of all other norms.
CONVNEXT = Table(
    "transformers' ConvNeXt",
    (
        row(r"stem\.0\.(\w+)", r"embeddings.patch_embeddings.\1"),
        row(r"stem\.1\.(\w+)", r"embeddings.layernorm.\1"),
        row(r"stages\.(\d+)\.downsample\.(\d)\.(\w+)", r"encoder.stages.\1.downsampling_layer.\2.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.gamma", rf"{_CONVNEXT_LAYER}.layer_scale_parameter"),
        row(rf"{_CONVNEXT_BLOCK}\.conv_dw\.(\w+)", rf"{_CONVNEXT_LAYER}.dwconv.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.norm\.(\w+)", rf"{_CONVNEXT_LAYER}.layernorm.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.mlp\.fc(\d)\.(\w+)", rf"{_CONVNEXT_LAYER}.pwconv\3.\4"),
        row(rf"{_CONVNEXT_BLOCK}\.mlp\.grn\.(\w+)", rf"{_CONVNEXT_LAYER}.grn.\3", make=flat),
        row(r"head\.norm\.(\w+)", r"layernorm.\1"),
        row(r"head\.fc\.(\w+)", r"classifier.\1"),
    ),
    *("gelu", 0.0, (), "stages.0.blocks.0.conv_dw.weight"),
)
DINOV3_CONVNEXT = Table(
    "transformers' DINOv3 ConvNeXt",
    (
        row(r"stem\.(\d)\.(\w+)", r"stages.0.downsample_layers.\1.\2"),
        row(r"stages\.(\d+)\.downsample\.(\d)\.(\w+)", r"stages.\1.downsample_layers.\2.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.gamma", r"stages.\1.layers.\2.gamma"),
        row(rf"{_CONVNEXT_BLOCK}\.conv_dw\.(\w+)", r"stages.\1.layers.\2.depthwise_conv.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.norm\.(\w+)", r"stages.\1.layers.\2.layer_norm.\3"),
        row(rf"{_CONVNEXT_BLOCK}\.mlp\.fc(\d)\.(\w+)", r"stages.\1.layers.\2.pointwise_conv\3.\4"),
        row(r"head\.norm\.(\w+)", r"layer_norm.\1"),
    ),
    *("gelu", 1e-6, (("stages.", "model.stages."),), "stages.0.blocks.0.conv_dw.weight"),
)
