"""`timm_layers`, `open_clip_layers`, `torchvision_layers`: any image network as its ordered list of layers.

Every architecture of the three libraries gets an exact list, so freezing and layer decay work on all of them; the
sequential ones get functions that run a single layer too (`timm_chains`, `open_clip_chains`, `torchvision_chains`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from finetune.core.layers import Layer
from finetune.core.ownership import assign_layers
from finetune.models.layering import clip, open_clip_chains, timm_chains, torchvision_chains
from finetune.models.layering.class_token import with_class_token_run
from finetune.models.layering.placing import WITH_PREVIOUS, Matcher, Rule, group_key, ordered_layers
from finetune.system.errors import UserError

# Between the last block and the classifier, where timm's matchers leave a name out and so, in silence, train it at the
# classifier's rate. A part that neither these nor a matcher name is an error.
READOUT = (
    r"(encoder\.)?(attn_pool|fc_norm|norm|norm_head|head_norm|conv_head|final_conv|final_act|final_layer|incre_modules"
    r"|downsamp_modules|in_conv|pre_classifier|pre_logits|msfa|neck|std_bias|std_scale|pooler|global_pool|flatten"
    r"|head|heads|head_dist|head_drop)(\.|$)|features\.norm5"
)
# Used by all blocks, or ahead of the first one, and unknown to some matchers. A table that all blocks share can only
# stand below all of them: anywhere higher, a frozen prefix would still move with it.
STEM = r"(encoder\.)?(rope|shared_rel_pos|pos_drop|patch_drop|reroll|unroll)(\.|$)"
NORM_PRE = r"|norm_pre(\.|$)"

_STAGES: Matcher = {
    "stem": r"stem",
    "blocks": [(r"stages\.(\d+)\.downsample", (0,)), (r"stages\.(\d+)\.blocks\.(\d+)", None)],
}
# Where timm publishes no matcher, or one whose order is not that of the forward pass.
MATCHERS: dict[str, Matcher] = {
    "MetaFormer": _STAGES,
    "MobileNetV5Encoder": {"stem": r"conv_stem", "blocks": r"blocks\.(\d+)\.(\d+)"},
    # A stage is one flat list: downsampling first, blocks, a norm at its end.
    "CSATv2": {"stem": r"stem_dct", "blocks": r"stages\.(\d+)\.(\d+)"},
    "PoolingVisionTransformer": {
        "stem": r"patch_embed|pos_embed|cls_token|pos_drop",
        "blocks": [
            (r"transformers\.(\d+)\.(?:pool|norm)", (0,)),
            (r"transformers\.(\d+)\.blocks\.(\d+)", None),
        ],
    },
    # timm gives the class-attention blocks the ids of the last patch blocks, which run before them.
    "Cait": {
        "stem": r"cls_token|pos_embed|patch_embed|pos_drop",
        "blocks": r"blocks\.(\d+)",
        "class_blocks": r"blocks_token_only\.(\d+)",
    },
}
# `norm_pre` as CLIP has it, ahead of the blocks. In ConvNeXt and its kin the same name is the norm behind them.
PRE_NORM = {"VisionTransformer", "VisionTransformerDistilled", "VisionTransformerSAM", "NaFlexVit", "Eva"}
# Here `head` is timm's name for the last block of convolutions, and the classifier is called `fc`.
HEAD_IS_BLOCK = {"SelecSls"}
# The learned mixture of a network's several classifiers is part of the classifier.
MIXED_HEADS = {"EfficientViM", "EfficientViMDistilled"}


def timm_layers(net: nn.Module) -> list[Layer]:
    """Stem, blocks, readout of a timm network, and head where it has a classifier (`num_classes` above 0).

    `run` is set on all layers where the architecture is a plain chain, else None on all.

    Raises:
        ValueError: A parameter that no rule places.
    """
    kinds = _kinds(net)
    matcher = next((MATCHERS[kind] for kind in kinds if kind in MATCHERS), None) or _own_matcher(net)
    layers = ordered_layers(
        net,
        Rule(
            matcher=matcher,
            head=_exactly(classifier_names(net)) + (r"|weights(_dist)?$" if kinds & MIXED_HEADS else ""),
            readout=r"global_pool(\.|$)" if kinds & HEAD_IS_BLOCK else READOUT,
            stem=STEM + (NORM_PRE if kinds & PRE_NORM else ""),
        ),
    )
    layers = with_runs(_with_timm_steps(net, layers), timm_chains.runs(net, layers))
    return with_class_token_run(net, layers)


def open_clip_layers(visual: nn.Module) -> list[Layer]:
    """Stem, blocks and readout of the image tower of an open_clip model (`model.visual`): it has no classifier.

    Raises:
        ValueError: A tower of another kind, or the whole CLIP instead of its image tower.
    """
    kinds = _kinds(visual)
    if "TimmModel" in kinds:
        layers = _timm_tower_layers(visual)
    elif "ModifiedResNet" in kinds:
        layers = ordered_layers(visual, open_clip_chains.MODIFIED_RESNET)
        layers = with_runs(layers, open_clip_chains.modified_resnet_runs(visual))
    elif "VisionTransformer" in kinds:
        layers = with_class_token_run(visual, clip.layers_of(visual))
    else:
        raise UserError(
            f"{type(visual).__name__} is no image tower of open_clip: expected model.visual,"
            " a VisionTransformer, ModifiedResNet or TimmModel"
        )
    # A class of somebody else's (a subclass, OpenAI's own package) has the names, but perhaps another forward pass.
    upstream = type(visual).__module__.startswith("open_clip.")
    return layers if upstream else [dataclasses.replace(layer, run=None, run_class_token=None) for layer in layers]


def torchvision_layers(net: nn.Module) -> list[Layer]:
    """Stem, blocks, readout and head of one of torchvision's classification models.

    Raises:
        ValueError: A network that is none of them.
    """
    rules = torchvision_chains.RULES
    rule = next((rules[kind] for kind in rules if kind in _kinds(net)), None)
    if rule is None:
        raise UserError(
            f"{type(net).__name__} is no classification model of torchvision: expected one of {', '.join(rules)}"
        )
    layers = ordered_layers(net, rule)
    return with_class_token_run(net, with_runs(layers, torchvision_chains.runs(net, layers)))


def _kinds(net: nn.Module) -> set[str]:
    """The names of a network's class and of those it descends from: a subclass keeps its parent's names."""
    return {kind.__name__ for kind in type(net).__mro__}


def with_runs(layers: Sequence[Layer], runs: Sequence[Any] | None) -> list[Layer]:
    """The same layers, each with the function that runs it; unchanged where there are none."""
    if runs is None:
        return list(layers)
    return [dataclasses.replace(layer, run=run) for layer, run in zip(layers, runs, strict=True)]


def classifier_names(net: nn.Module) -> list[str]:
    """The modules of a timm network that turn features into logits: one, or several where heads are averaged."""
    # An encoder says None; a network that was built without timm's factory says nothing.
    config = vars(net).get("pretrained_cfg") or {}
    named = config.get("classifier") or ("head", "head.fc", "fc", "classifier") * (not config)
    names = [named] if isinstance(named, str) else list(named)
    modules = dict(net.named_modules())
    if not config:
        names = [name for name in names if name in modules and isinstance(modules[name], nn.Linear)]
    # Distillation heads, which not every configuration lists.
    names += [re.sub(r"\bhead\b(?!.*\bhead\b)", "head_dist", name) for name in names]
    return [name for name in dict.fromkeys(names) if name in modules]


def _exactly(names: Sequence[str]) -> str:
    return rf"({'|'.join(re.escape(name) for name in names)})(\.|$)" if names else r"(?!)"


def _own_matcher(net: Any) -> Matcher:
    try:
        matcher: Matcher = net.group_matcher(coarse=False)
    except AttributeError as error:
        raise UserError(
            f"{type(net).__name__} has no group_matcher, timm's own word on the order of its layers,"
            " and finetune/models/layering.py has no rule for it"
        ) from error
    return matcher


def _timm_tower_layers(visual: Any) -> list[Layer]:
    """open_clip's wrapper of a timm trunk: what it adds (`head`: pooling, projection) follows the trunk's readout."""
    trunk = timm_layers(visual.trunk)
    end = [layer.name for layer in trunk].index("readout")
    inside = [_inside_trunk(layer) for layer in trunk]
    # A trunk without a projection behind it projects with its own classifier: readout, seen from here.
    owns = tuple(name for layer in inside[end:] for name in layer.owns)
    readout = dataclasses.replace(inside[end], owns=(*owns, "head"))
    return with_runs([*inside[:end], readout], open_clip_chains.timm_tower_runs(trunk))


def _inside_trunk(layer: Layer) -> Layer:
    owns = tuple(f"trunk.{name}" for name in layer.owns)
    steps = {f"trunk.{name}": steps for name, steps in layer.timm_steps.items()}
    shorter = open_clip_chains.inside_trunk(layer.run_class_token)
    return Layer(layer.name, owns, None, steps, shorter)


def _with_timm_steps(net: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Note in each layer which of its parameters timm trains at another distance from the output.

    timm's `param_groups_layer_decay` gives a parameter `decay ** (top - group)`; a name that its matcher leaves out is
    at the top. A bare tower counts as if a classifier followed, as one does here.
    """
    if _kinds(net) & (MATCHERS.keys() - {"Cait"}):
        return layers  # no matcher, so timm has no rule that one could follow
    matcher = _own_matcher(net)
    keys = {name: group_key(name, matcher) for name, _ in net.named_parameters()}
    groups: dict[Any, int] = {}
    for found_key in sorted({key for key in keys.values() if key is not None}):
        number = max(groups.values(), default=-1)
        groups[found_key] = number if found_key[-1] == WITH_PREVIOUS and number >= 0 else number + 1
    has_top = layers[-1].name != "head" or None in keys.values()
    top = max(groups.values()) + has_top
    ours = assign_layers(net, layers)
    last = sum(layer.name.startswith("block.") for layer in layers) + 1
    found: list[dict[str, int]] = [{} for _ in layers]
    for name, key in keys.items():
        steps = top - (top if key is None else groups[key])
        if steps != last - min(ours[name], last):
            found[ours[name]][name] = steps
    return [dataclasses.replace(layer, timm_steps=steps) for layer, steps in zip(layers, found, strict=True)]
