"""`param_groups_lrd`: layer-wise rate decay and freezing for a training script of one's own.

    groups, names = param_groups_lrd(model.visual, fix_layer=-1, weight_decay=0.05, layer_decay=0.65)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = create_scheduler(SchedulerConf(mode="cosine_pi"), optimizer, num_epochs)

These lines are right as they stand: `create_scheduler` folds each group's `lr_scale` into its rate, once. Without our
scheduler give `lr=`, and the groups hold their rates themselves; nothing in torch reads an `lr_scale`.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from finetune.config import OptimConf
from finetune.core.layers import Layer, LayeredModel
from finetune.core.optim import Group
from finetune.core.rates import rate_table
from finetune.models.layering.towers import open_clip_layers, spared_names, timm_layers, torchvision_layers
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

    A frozen parameter enters no group, nor does one that needs no gradient already; `requires_grad` stays as it is.
    Returns the groups, and the same by name with `params` as names of `model.named_parameters()`, for printing. A whole
    CLIP, an architecture without layers, or a number out of range is a UserError.

    Args:
        model: A bare image tower of CLIP (`clip.visual`) or timm, whose ids end at L + 1 (final norm, `proj`,
            classifier), or a `LayeredModel`, whose head is L + 2. DDP or torch.compile may be around it.
        fix_layer: Layers with id <= this enter no group; -1: all enter.
        weight_decay: Of matrices; norms, biases, tokens, position embeddings, and names that upstream spares, get 0.
        no_weight_decay_list: More names, or globs, that get 0; names that the model lacks are ignored.
        layer_decay: d in `d ** (L + 1 - min(id, L + 1))`, the scale of a layer's rate; in (0, 1].
        lr: Peak rate of the head. Given, the groups hold `lr`, already scaled; else `lr_scale`.
    """
    layered, prefix, top = _as_layered(model)
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay={layer_decay}: must be greater than 0 and at most 1")
    if not -1 <= fix_layer < top:
        problem = f"{type(model).__name__} has layers 0 (stem) to {top}"
        mend = f"use -1 (nothing frozen) to {top - 1} (only layer {top} learns)"
        raise UserError(f"fix_layer={fix_layer}: {problem}, so {mend}")
    more = [name.removeprefix("net.") for name in no_weight_decay_list]
    conf = OptimConf(lr=1.0 if lr is None else lr, weight_decay=weight_decay, layer_decay=layer_decay)
    groups: dict[str, Group] = {}
    names: dict[str, dict[str, Any]] = {}
    for row in rate_table(layered, conf, more_spared=more):
        layer_id = min(row.layer_id, top)
        if layer_id > fix_layer:
            key = f"layer_{layer_id}_{'decay' if row.is_decayed else 'no_decay'}"
            rate = {"lr_scale": row.scale} if lr is None else {"lr": row.peak}
            for found in (groups, names):
                found.setdefault(key, {**rate, "weight_decay": row.weight_decay, "params": []})
            groups[key]["params"] += [layered.net.get_parameter(name) for name in row.param_names]
            names[key]["params"] += [prefix + name for name in row.param_names]
    return list(groups.values()), names


def _as_layered(model: nn.Module) -> tuple[LayeredModel, str, int]:
    """The layers of a model, the prefix of their parameters' names in it, and the highest layer id."""
    prefix = ""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in WRAPPERS:
        name, model = children.popitem()
        prefix += f"{name}."
        children = dict(model.named_children())
    if isinstance(model, LayeredModel):
        return model, f"{prefix}net.", len(model.layers) - 1
    if "visual" in children and children.keys() & {"transformer", "text"}:
        text = "the blocks directly under it are those of the text tower"
        raise UserError(f"{type(model).__name__} holds two towers: pass its image tower, model.visual; {text}")
    layers = _layers_of(model)
    if layers[-1].name != "head":
        layers = [*layers, Layer("head", (), None)]
    layered = LayeredModel(model, layers, no_weight_decay=spared_names(model))
    return layered, prefix, layered.num_blocks + 1  # the published functions give readout and classifier one id


def _layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a bare tower, by the library whose class it is or descends from."""
    homes = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if "timm" in homes:
        return timm_layers(model)
    if "torchvision" in homes:
        return torchvision_layers(model)
    if homes & {"open_clip", "clip"}:
        return open_clip_layers(model)
    name = f"{type(model).__module__}.{type(model).__name__}"
    mend = "pass one of open_clip, timm or torchvision, or a LayeredModel"
    raise UserError(f"{name} is no image tower that finetune can cut into layers: {mend}")
