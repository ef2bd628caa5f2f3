"""`param_groups_lrd`: layer-wise rate decay and freezing for a training script of one's own.

    groups, names = param_groups_lrd(model.visual, fix_layer=-1, weight_decay=0.05, layer_decay=0.65)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = create_scheduler(SchedulerConf(mode="cosine_pi"), optimizer, num_epochs)

These lines are right as they stand: `create_scheduler` folds each group's `lr_scale` into its rate, once. Without our
scheduler give `lr=`, and the groups hold their rates themselves; nothing in torch reads an `lr_scale`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from finetune.core.layers import Layer, LayeredModel
from finetune.core.optim import Group, is_decayed, layer_scale
from finetune.core.ownership import assign_layers
from finetune.models.layering.model import spared_names
from finetune.models.layering.towers import open_clip_layers, timm_layers, torchvision_layers
from finetune.system.errors import UserError

# What DDP and torch.compile put ahead of every name.
WRAPPERS = ("module", "_orig_mod")


def param_groups_lrd(
    model: nn.Module,
    fix_layer: int = -1,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
    *,
    lr: float | None = None,
) -> tuple[list[Group], dict[str, dict[str, Any]]]:
    """AdamW's groups, one a (layer, weight decay or not), of the parameters above `fix_layer`.

    `requires_grad` is left alone: what is frozen simply enters no group. A parameter that needs no gradient already
    enters none either.

    Args:
        model: A bare image tower of CLIP (`clip.visual`) or timm, whose ids end at L + 1 (final norm, `proj`,
            classifier), or a `LayeredModel`, whose head is L + 2. DDP or torch.compile may be around it.
        fix_layer: Layers with id <= this enter no group; -1: all enter.
        weight_decay: Of matrices; norms, biases, tokens, position embeddings and what upstream spares get 0.
        no_weight_decay_list: More names, or globs, that get 0; names that the model lacks are ignored.
        layer_decay: d in `d ** (L + 1 - min(id, L + 1))`, the scale of a layer's rate; in (0, 1].
        lr: Peak rate of the head. Given, the groups hold `lr`, already scaled; else `lr_scale`.

    Returns:
        The groups, and the same by name with `params` as names of `model.named_parameters()`, for printing.

    Raises:
        ValueError: A whole CLIP, an architecture without layers, or a number out of range.
    """
    prefix, inner = _unwrap(model)
    ids, num_blocks, top = _layer_ids(inner)
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay={layer_decay}: must be greater than 0 and at most 1")
    if not -1 <= fix_layer < top:
        raise UserError(
            f"fix_layer={fix_layer}: {type(inner).__name__} has layers 0 (stem) to {top}, so use -1 (nothing frozen)"
            f" to {top - 1} (only layer {top} learns)"
        )
    spared = {*no_weight_decay_list, *_spared(inner)}
    groups: dict[str, Group] = {}
    names: dict[str, dict[str, Any]] = {}
    for name, parameter in inner.named_parameters():
        layer_id = ids[name]
        if layer_id <= fix_layer or not parameter.requires_grad:
            continue
        decayed = is_decayed(name, parameter, spared)
        key = f"layer_{layer_id}_{'decay' if decayed else 'no_decay'}"
        if key not in groups:
            scale = layer_scale(layer_id, num_blocks, layer_decay)
            rate = {"lr_scale": scale} if lr is None else {"lr": lr * scale}
            decay = weight_decay if decayed else 0.0
            groups[key] = {**rate, "weight_decay": decay, "params": []}
            names[key] = {**rate, "weight_decay": decay, "params": []}
        groups[key]["params"].append(parameter)
        names[key]["params"].append(prefix + name)
    return list(groups.values()), names


def _unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """What DDP and torch.compile wrap, and the prefix that they put on its names."""
    prefix = ""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        name, model = children.popitem()
        prefix += f"{name}."
        children = dict(model.named_children())
    return prefix, model


def _spared(model: nn.Module) -> set[str]:
    """The names that upstream spares from weight decay."""
    if isinstance(model, LayeredModel):
        return {f"net.{name}" for name in model.no_weight_decay}
    return set(spared_names(model))


def _layer_ids(model: nn.Module) -> tuple[dict[str, int], int, int]:
    """The layer id of every parameter by name, the number of blocks, and the highest id."""
    if isinstance(model, LayeredModel):
        ids = {f"net.{name}": layer_id for name, layer_id in model.layer_ids.items()}
        return ids, model.num_blocks, model.num_blocks + 2
    children = {name for name, _ in model.named_children()}
    if "visual" in children and children & {"transformer", "text"}:
        raise UserError(
            f"{type(model).__name__} holds two towers: pass its image tower, model.visual;"
            " the blocks directly under it are those of the text tower"
        )
    layers = _layers_of(model)
    num_blocks = sum(layer.name.startswith("block.") for layer in layers)
    # A bare tower's classifier shares the id of its readout, as the published functions count.
    ids = {name: min(index, num_blocks + 1) for name, index in assign_layers(model, layers).items()}
    return ids, num_blocks, num_blocks + 1


def _layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a bare tower, by the library whose class it is or descends from."""
    homes = {kind.__module__.partition(".")[0]: kind for kind in reversed(type(model).__mro__)}
    if "timm" in homes:
        return timm_layers(model)
    if "torchvision" in homes:
        return torchvision_layers(model)
    if "open_clip" in homes or "clip" in homes:
        return open_clip_layers(model)
    raise UserError(
        f"{type(model).__module__}.{type(model).__name__} is no image tower that finetune can cut into layers:"
        " pass one of open_clip, timm or torchvision, or a LayeredModel"
    )
