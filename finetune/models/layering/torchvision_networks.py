"""torchvision's classification models: which name belongs to which layer, and the functions that run a layer."""

import re
from typing import Any

import torch
from torch import Tensor

from finetune.models.layering.rules import GroupKey, Rule
from finetune.models.layering.running import Run, in_blocks, in_residual_stages, through


def _stages_and_merges(name: str) -> GroupKey:
    """Of `features`, entry 0 is the stem and odd entries are stages; an even entry belongs to the stage behind it."""
    match = re.match(r"features\.(\d+)(?:\.(\d+))?", name)
    if match is None:
        return ()
    entry = int(match[1])
    if entry == 0:
        return (0,)
    return (1, entry, int(match[2] or 0)) if entry % 2 else (1, entry + 1, 0)


# The convolution and norm that end an EfficientNet: tensors right below an entry of `features`, where a block has
# further modules. timm trains them at the last block's rate.
_LAST_CONV = r"features\.[1-9]\d*\.\d+(\.(weight|bias|running_mean|running_var|num_batches_tracked))?$"

RULES: dict[str, Rule] = {
    "ConvNeXt": Rule(_stages_and_merges, r"classifier\.2", r"avgpool|classifier"),
    "EfficientNet": Rule(
        {"stem": r"features\.0\.", "blocks": r"features\.(\d+)\.(\d+)\."},
        r"classifier\.1",
        rf"{_LAST_CONV}|avgpool|classifier",
        below=_LAST_CONV,
    ),
    "MaxVit": Rule({"stem": r"stem", "blocks": r"blocks\.(\d+)\.layers\.(\d+)"}, r"classifier\.5", r"classifier"),
    "RegNet": Rule({"stem": r"stem", "blocks": r"trunk_output\.block(\d+)\.block\d+-(\d+)"}, r"fc", r"avgpool"),
    "ResNet": Rule({"stem": r"conv1|bn1|relu|maxpool", "blocks": r"layer(\d+)\.(\d+)"}, r"fc", r"avgpool"),
    "SwinTransformer": Rule(_stages_and_merges, r"head", r"norm|permute|avgpool|flatten", below=r"norm\."),
    "VisionTransformer": Rule(
        {
            "stem": r"conv_proj|class_token|encoder\.(?:pos_embedding|dropout)",
            "blocks": r"encoder\.layers\.encoder_layer_(\d+)",
        },
        r"heads\.head",
        r"encoder\.ln|heads",
        below=r"encoder\.ln",
    ),
}

# The functions of each family, in the order of its layers. These networks always have a classifier, and so a head.


def vision_transformer(net: Any, with_head: bool) -> list[Run]:
    """ViT."""
    blocks = in_blocks("encoder.layers.encoder_layer_{}", len(net.encoder.layers))
    return [_vit_stem, *blocks, _vit_readout, through("heads.head")]


def _vit_stem(net: Any, h: Tensor) -> Tensor:
    h = net._process_input(h)
    h = torch.cat([net.class_token.expand(h.shape[0], -1, -1), h], dim=1)
    return net.encoder.dropout(h + net.encoder.pos_embedding)  # type: ignore[no-any-return]


def _vit_readout(net: Any, h: Tensor) -> Tensor:
    # `heads` ends with the classifier; a network made for training from scratch has a hidden layer ahead of it.
    return net.heads[:-1](net.encoder.ln(h)[:, 0])  # type: ignore[no-any-return]


def resnet(net: Any, with_head: bool) -> list[Run]:
    """ResNet, ResNeXt, Wide ResNet."""
    return [through("conv1", "bn1", "relu", "maxpool"), *in_residual_stages(net), _resnet_readout, through("fc")]


def _resnet_readout(net: Any, h: Tensor) -> Tensor:
    return torch.flatten(net.avgpool(h), 1)


def convnext(net: Any, with_head: bool) -> list[Run]:
    """ConvNeXt."""
    return [*_stem_and_stages(net), through("avgpool", "classifier.0", "classifier.1"), through("classifier.2")]


def swin(net: Any, with_head: bool) -> list[Run]:
    """Swin Transformer."""
    return [*_stem_and_stages(net), through("norm", "permute", "avgpool", "flatten"), through("head")]


def _stem_and_stages(net: Any) -> list[Run]:
    """See `_stages_and_merges`; the first stage has no merging layer of its own ahead of it."""
    runs = [through("features.0")]
    for stage in range(1, len(net.features), 2):
        first, *others = in_blocks(f"features.{stage}.{{}}", len(net.features[stage]))
        runs += [first if stage == 1 else through(f"features.{stage - 1}", f"features.{stage}.0"), *others]
    return runs
