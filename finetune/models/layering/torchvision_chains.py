"""torchvision's classification models: which name belongs to which layer, and the sequential ones a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.models.layering.placing import WITH_PREVIOUS, Key, Matcher, Rule

Run = Callable[[Any, Tensor], Tensor]


def _in_order(*expressions: str) -> Callable[[str], Key]:
    """A matcher that numbers names by the first expression that fits; the first one is the stem."""

    def matcher(name: str) -> Key:
        return next(((float(i),) for i, expression in enumerate(expressions) if re.match(expression, name)), ())

    return matcher


def _stages_and_merges(name: str) -> Key:
    """`features` holds the stem, then stages at odd places; what stands between merges into the stage behind it."""
    match = re.match(r"features\.(\d+)(?:\.(\d+))?", name)
    if match is None:
        return ()
    place = int(match[1])
    if place == 0:
        return (0,)
    return (1, place, int(match[2] or 0)) if place % 2 else (1, place + 1, 0)


# The convolution that ends a mobile network: a conv and its norm right inside `features`, where a block has parts.
# timm trains it with the last block.
_CONV_TENSOR = r"\.\d+(\.(weight|bias|running_mean|running_var|num_batches_tracked))?$"
_LAST_CONV = rf"features\.[1-9]\d*{_CONV_TENSOR}"
_FLAT: Matcher = {"stem": r"features\.0(?:\.|$)", "blocks": r"features\.(\d+)"}
_RESIDUAL_STAGES = r"layer(\d+)\.(\d+)"

RULES: dict[str, Rule] = {
    "AlexNet": Rule(_FLAT, r"classifier\.6", r"avgpool|classifier"),
    "ConvNeXt": Rule(_stages_and_merges, r"classifier\.2", r"avgpool|classifier"),
    "DenseNet": Rule(
        {
            "stem": r"features\.(?:conv|norm|relu|pool)0",
            "blocks": [
                (r"features\.denseblock(\d+)\.denselayer(\d+)", None),
                (r"features\.transition(\d+)", (WITH_PREVIOUS,)),
            ],
        },
        r"classifier",
        r"features\.norm5",
    ),
    "EfficientNet": Rule(
        {"stem": r"features\.0\.", "blocks": r"features\.(\d+)\.(\d+)\."},
        r"classifier\.1",
        rf"{_LAST_CONV}|avgpool|classifier",
        below=_LAST_CONV,
    ),
    "GoogLeNet": Rule(
        _in_order(
            *(r"conv1", r"maxpool1|conv[23]", r"maxpool2|inception3a", r"inception3b", r"maxpool3|inception4a"),
            *(r"inception4b", r"inception4c", r"inception4d", r"inception4e", r"maxpool4|inception5a", r"inception5b"),
        ),
        r"fc|aux[12]",
        r"avgpool|dropout",
    ),
    "Inception3": Rule(
        _in_order(
            *(r"Conv2d_[12]|maxpool1", r"Conv2d_[34]", r"maxpool2|Mixed_5b", r"Mixed_5c", r"Mixed_5d", r"Mixed_6a"),
            *(r"Mixed_6b", r"Mixed_6c", r"Mixed_6d", r"Mixed_6e", r"Mixed_7a", r"Mixed_7b", r"Mixed_7c"),
        ),
        r"fc|AuxLogits",
        r"avgpool|dropout",
    ),
    "MNASNet": Rule(
        {"stem": r"layers\.[0-7](?:\.|$)", "blocks": r"layers\.(\d+)\.(\d+)\."},
        r"classifier\.1",
        r"layers\.1[456](\.|$)|classifier",
        below=r"layers\.1[45]\.",
    ),
    "MaxVit": Rule({"stem": r"stem", "blocks": r"blocks\.(\d+)\.layers\.(\d+)"}, r"classifier\.5", r"classifier"),
    "MobileNetV2": Rule(_FLAT, r"classifier\.1", rf"{_LAST_CONV}|classifier", below=_LAST_CONV),
    "MobileNetV3": Rule(_FLAT, r"classifier\.3", rf"{_LAST_CONV}|avgpool|classifier"),
    "RegNet": Rule({"stem": r"stem", "blocks": r"trunk_output\.block(\d+)\.block\d+-(\d+)"}, r"fc", r"avgpool"),
    "ResNet": Rule({"stem": r"conv1|bn1|relu|maxpool", "blocks": _RESIDUAL_STAGES}, r"fc", r"avgpool"),
    "ShuffleNetV2": Rule({"stem": r"conv1|maxpool", "blocks": r"stage(\d+)\.(\d+)"}, r"fc", r"conv5"),
    "SqueezeNet": Rule(_FLAT, r"classifier\.[123]", r"classifier\.0"),
    "SwinTransformer": Rule(_stages_and_merges, r"head", r"norm|permute|avgpool|flatten", below=r"norm\."),
    "VGG": Rule(_FLAT, r"classifier\.6", r"avgpool|classifier"),
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


def runs(net: nn.Module, layers: Sequence[Layer]) -> list[Run] | None:
    """The functions of `layers` in order; None where this network is no plain chain, or none that is known here."""
    kind = type(net)
    build = CHAINS.get(f"{kind.__module__}.{kind.__qualname__}")
    found = None if build is None else build(net)
    assert found is None or len(found) == len(layers), f"{kind.__name__}: {len(found)} runs for {len(layers)} layers"
    return found


def _vit(net: Any) -> list[Run]:
    blocks = [partial(_vit_block, index=index) for index in range(len(net.encoder.layers))]
    return [_vit_stem, *blocks, _vit_readout, _vit_head]


def _vit_stem(net: Any, h: Tensor) -> Tensor:
    h = net._process_input(h)
    h = torch.cat([net.class_token.expand(h.shape[0], -1, -1), h], dim=1)
    tokens: Tensor = net.encoder.dropout(h + net.encoder.pos_embedding)
    return tokens


def _vit_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    tokens: Tensor = net.encoder.layers[index](h)
    return tokens


def _vit_readout(net: Any, h: Tensor) -> Tensor:
    # All of `heads` but its last part, the classifier: a network trained from scratch has a layer ahead of it.
    features: Tensor = net.heads[:-1](net.encoder.ln(h)[:, 0])
    return features


def _vit_head(net: Any, h: Tensor) -> Tensor:
    logits: Tensor = net.heads[-1](h)
    return logits


def _resnet(net: Any) -> list[Run]:
    blocks = [
        partial(_resnet_block, stage=stage, index=index)
        for stage, part in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1)
        for index in range(len(part))
    ]
    return [_resnet_stem, *blocks, _resnet_readout, _resnet_head]


def _resnet_stem(net: Any, h: Tensor) -> Tensor:
    out: Tensor = net.maxpool(net.relu(net.bn1(net.conv1(h))))
    return out


def _resnet_block(net: Any, h: Tensor, *, stage: int, index: int) -> Tensor:
    part = {1: net.layer1, 2: net.layer2, 3: net.layer3, 4: net.layer4}[stage]
    out: Tensor = part[index](h)
    return out


def _resnet_readout(net: Any, h: Tensor) -> Tensor:
    return torch.flatten(net.avgpool(h), 1)


def _resnet_head(net: Any, h: Tensor) -> Tensor:
    logits: Tensor = net.fc(h)
    return logits


def _staged(net: Any, tail: list[Run]) -> list[Run]:
    """Stem, then stages at odd places of `features`, each behind what merges into it."""
    places = [(stage, index) for stage in range(1, len(net.features), 2) for index in range(len(net.features[stage]))]
    return [_staged_stem, *(partial(_staged_block, stage=stage, index=index) for stage, index in places), *tail]


def _staged_stem(net: Any, h: Tensor) -> Tensor:
    out: Tensor = net.features[0](h)
    return out


def _staged_block(net: Any, h: Tensor, *, stage: int, index: int) -> Tensor:
    if index == 0 and stage > 1:
        h = net.features[stage - 1](h)
    out: Tensor = net.features[stage][index](h)
    return out


def _convnext(net: Any) -> list[Run]:
    return _staged(net, [_convnext_readout, _convnext_head])


def _convnext_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.classifier[:-1](net.avgpool(h))
    return features


def _convnext_head(net: Any, h: Tensor) -> Tensor:
    logits: Tensor = net.classifier[-1](h)
    return logits


def _swin(net: Any) -> list[Run]:
    return _staged(net, [_swin_readout, _swin_head])


def _swin_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net.flatten(net.avgpool(net.permute(net.norm(h))))
    return features


def _swin_head(net: Any, h: Tensor) -> Tensor:
    logits: Tensor = net.head(h)
    return logits


CHAINS: dict[str, Callable[[Any], list[Run]]] = {
    "torchvision.models.vision_transformer.VisionTransformer": _vit,
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.convnext.ConvNeXt": _convnext,
    "torchvision.models.swin_transformer.SwinTransformer": _swin,
}
