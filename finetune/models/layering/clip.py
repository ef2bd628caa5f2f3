"""open_clip's image towers with a classifier on top, as an ordered list of layers.

The functions that run a layer call upstream's own methods in upstream's own order, so that a tower gives the same bits
whole, sliced, and without us.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from finetune.core.layers import Layer
from finetune.models.heads.head import Head

# All that can stand ahead of the first block and behind the last one, in open_clip's VisionTransformer.
STEM = ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")
READOUT = ("ln_post", "attn_pool", "attn_pool_contrastive", "proj")


class ClipClassifier(nn.Module):
    """An image tower and a classifier. The keys under `visual.` are those of upstream's whole CLIP.

    Attributes:
        visual: The image tower of an open_clip model.
        head: The classifier over its features.
    """

    def __init__(self, visual: nn.Module, head: Head) -> None:
        """Take ownership of both parts."""
        super().__init__()
        self.visual = visual
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits. (batch, 3, height, width) -> (batch, classes)."""
        logits: Tensor = self.head(self.visual(images))
        return logits


def layers_of(tower: nn.Module) -> list[Layer]:
    """Stem, blocks and readout of open_clip's own `VisionTransformer`.

    Args:
        tower: `model.visual`, with `output_tokens` off.
    """
    net: Any = tower
    # What a variant does without is None (or, in OpenAI's own class, not there at all), and so in neither list.
    there = {name for name, _ in net.named_children()} | {name for name, _ in net.named_parameters(recurse=False)}
    # open_clip's own trainer, like timm's, keeps the final norm with the last block.
    steps = {name: 1 for name, _ in net.named_parameters() if name.startswith("ln_post.")}
    blocks = [
        Layer(f"block.{index + 1}", (f"transformer.resblocks.{index}",), partial(_run_block, index=index))
        for index in range(len(net.transformer.resblocks))
    ]
    return [
        Layer("stem", tuple(name for name in STEM if name in there), _run_stem),
        *blocks,
        Layer("readout", tuple(name for name in READOUT if name in there), _run_readout, steps),
    ]


def _run_stem(net: Any, h: Tensor) -> Tensor:
    tokens: Tensor = net._embeds(h)
    return tokens


def _run_block(net: Any, h: Tensor, *, index: int) -> Tensor:
    tokens: Tensor = net.transformer.resblocks[index](h)
    return tokens


def _run_readout(net: Any, h: Tensor) -> Tensor:
    features: Tensor = net._pool(h)[0]
    return features if net.proj is None else features @ net.proj


def classifier_layers(tower_layers: list[Layer]) -> list[Layer]:
    """The layers of a `ClipClassifier` whose tower has these."""
    head = Layer("head", ("head",), None if tower_layers[-1].run is None else _run_head)
    return [*(_inside_visual(layer) for layer in tower_layers), head]


def _run_head(net: ClipClassifier, h: Tensor) -> Tensor:
    logits: Tensor = net.head(h)
    return logits


def _inside_visual(layer: Layer) -> Layer:
    owns = tuple(f"visual.{name}" for name in layer.owns)
    steps = {f"visual.{name}": count for name, count in layer.timm_steps.items()}
    run, shorter = (
        None if run is None else partial(_run_visual, run=run) for run in (layer.run, layer.run_class_token)
    )
    return Layer(layer.name, owns, run, steps, shorter)


def _run_visual(net: ClipClassifier, h: Tensor, *, run: Any) -> Tensor:
    out: Tensor = run(net.visual, h)
    return out
