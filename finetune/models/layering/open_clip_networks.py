"""open_clip's image towers: which name belongs to which layer, and the functions that run a layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from finetune.core.layers import Layer
from finetune.models.layering.rules import Rule
from finetune.models.layering.running import Run, in_blocks, in_residual_stages, inside, through

RULES: dict[str, Rule] = {
    "VisionTransformer": Rule(
        matcher={
            "stem": r"conv1|class_embedding|positional_embedding|patch_dropout|ln_pre",
            "blocks": r"transformer\.resblocks\.(\d+)",
        },
        readout=r"ln_post|attn_pool|proj",
        below=r"ln_post\.",
    ),
    "ModifiedResNet": Rule(
        matcher={"stem": r"(?:conv|bn|act)[123](?:\.|$)|avgpool", "blocks": r"layer(\d+)\.(\d+)"},
        # Attention over positions holds the projection too; this ResNet has no other norm or projection behind it.
        readout=r"attnpool",
    ),
}


def vision_transformer(net: Any, with_head: bool) -> list[Run]:
    """The functions of stem, blocks and readout of open_clip's own ViT, with `output_tokens` off."""
    return [through("_embeds"), *in_blocks("transformer.resblocks.{}", len(net.transformer.resblocks)), _vit_readout]


def _vit_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net._pool(h)[0]
    return features if net.proj is None else features @ net.proj


def modified_resnet(net: Any, with_head: bool) -> list[Run]:
    """The functions of stem, blocks and readout of CLIP's ResNet."""
    return [through("stem"), *in_residual_stages(net), through("attnpool")]


def timm_model(trunk: Sequence[Layer]) -> list[Run]:
    """The functions of stem, blocks and readout of open_clip's wrapper around a timm trunk that is a chain.

    The readout of `trunk`, its head (where the trunk itself projects) and the wrapper's own `head` (pooling and
    projection) run together as the readout.
    """
    runs = [layer.run for layer in trunk if layer.run is not None]
    end = [layer.name for layer in trunk].index("readout")
    return [*(inside("trunk", run) for run in runs[:end]), partial(_timm_readout, parts=tuple(runs[end:]))]


def _timm_readout(net: Any, h: Tensor, *, parts: tuple[Run, ...]) -> Tensor:
    for run in parts:
        h = run(net.trunk, h)
    return net.head(h)  # type: ignore[no-any-return]
