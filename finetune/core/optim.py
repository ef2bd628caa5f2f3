"""The optimizer, with one group per (layer, weight decay or not), each holding its own baked rate.

Baked means `group["lr"] = lr * scale` before any scheduler is made: `LambdaLR` multiplies each group's `initial_lr`,
and nothing in torch reads a stored `lr_scale`. So layer decay and freezing are the same with every optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._foreach_utils import (
    _get_foreach_kernels_supported_devices as foreach_devices,
)
from torch.utils._foreach_utils import (
    _get_fused_kernels_supported_devices as fused_devices,
)

from finetune.config import LayerRule, OptimConf, OptimizerKind
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError

Group = dict[str, Any]

# Matched against the last part of a parameter's name, at any depth. BEiT, MAE and timm spare these too: they are
# offsets, not maps, and decay would only pull them towards zero.
EMBEDDINGS = (
    "cls_token", "class_embedding", "dist_token", "reg_token", "register_tokens", "storage_tokens", "mask_token",
    "pos_embed", "positional_embedding", "pos_embedding", "class_token", "position_embedding", "pos_embed_win",
    "relative_position_bias_table", "logit_scale", "logit_bias",
)  # fmt: skip


def layer_scale(layer_id: int, num_blocks: int, layer_decay: float) -> float:
    """`layer_decay ** distance from the output`: 1 for readout and head, one more factor for each layer below them.

    As BEiT, MAE, FT-CLIP, DINOv2 and MKT number it. timm counts the final norm one step lower.

    Args:
        layer_id: 0 for the stem, 1 to L for blocks, L + 1 readout, L + 2 head.
        num_blocks: L.
        layer_decay: In (0, 1].
    """
    return layer_decay ** (num_blocks + 1 - min(layer_id, num_blocks + 1))


def steps_to_output(model: LayeredModel, name: str, rule: LayerRule) -> int:
    """The exponent of a parameter's rate under `optim.layer_rule`: how many layers it stands below the output.

    Args:
        model: Whose layers are counted.
        name: Of a parameter of `model.net`.
        rule: beit: all of a layer alike, 0 for readout and head. timm: as timm's `param_groups_layer_decay` counts
            (timm.optim), which keeps the final norm with the last block; the layers themselves stay as they are.
    """
    layer_id, top = model.layer_ids[name], model.num_blocks + 1
    steps = top - min(layer_id, top)
    return model.layers[layer_id].timm_steps.get(name, steps) if rule == LayerRule.timm else steps


def is_decayed(name: str, parameter: nn.Parameter, spared: Iterable[str], *, decay_embeddings: bool = False) -> bool:
    """Whether weight decay applies: matrices and kernels, but no bias, norm, token, position or spared name.

    Args:
        name: As `named_parameters` gives it.
        parameter: Its tensor; 0-D (`logit_scale`) and 1-D (biases, norms, layer scale) are never decayed.
        spared: Globs; a name that matches one is not decayed.
        decay_embeddings: Decay tokens and position embeddings like any matrix, as MKT does.
    """
    if parameter.ndim <= 1 or (is_embedding(name) and not decay_embeddings):
        return False
    return not any(fnmatchcase(name, glob) for glob in spared)


def is_embedding(name: str) -> bool:
    """Whether a parameter's name, or glob, is that of a token, a position embedding or a temperature."""
    return name.rpartition(".")[2] in EMBEDDINGS


def is_muons(model: LayeredModel, name: str, parameter: nn.Parameter) -> bool:
    """Whether `optim=muon` moves a parameter by Muon: a matrix between stem and head that is no embedding.

    Muon's authors leave the first and the last layer, and all that is no matrix, to AdamW
    (https://kellerjordan.github.io/posts/muon/, "Empirical considerations").
    """
    is_hidden = 0 < model.layer_ids[name] < len(model.layers) - 1
    return is_hidden and parameter.ndim == 2 and not is_embedding(name)


def param_groups(model: LayeredModel, conf: OptimConf) -> list[Group]:
    """The optimizer's groups, from the stem up, of every parameter that learns.

    Each group holds `params`, `lr` (baked), `weight_decay`, and for the tables `name` (`block.7.no_decay`), `layer`,
    `layer_id`, `scale`, `param_names` and `optimizer`, whose rule moves it: that of `optim.name`, or with muon
    adamw for what is no matrix of hidden layers; `block.7.decay.muon` are the others. Freeze the model first.

    Raises:
        ValueError: A glob of `optim.no_weight_decay` that matches no parameter, frozen ones included; or muon, and
            no matrix that it would move.
    """
    names = [name for name, _ in model.net.named_parameters()]
    for glob in conf.no_weight_decay:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f"optim.no_weight_decay: '{glob}' matches no parameter; names look like {names[0]}, {names[-1]}"
            )
    upstream = [glob for glob in model.no_weight_decay if not (conf.decay_embeddings and is_embedding(glob))]
    spared = [*conf.no_weight_decay, *upstream]

    groups: dict[tuple[int, int, bool, bool], Group] = {}
    for name, parameter in model.net.named_parameters():
        if not parameter.requires_grad:
            continue
        layer_id = model.layer_ids[name]
        steps = steps_to_output(model, name, conf.layer_rule)
        decayed = is_decayed(name, parameter, spared, decay_embeddings=conf.decay_embeddings)
        by_muon = conf.name == OptimizerKind.muon and is_muons(model, name, parameter)
        # In the order that the table shows and that a resumed optimizer meets again: from the stem up, decayed first.
        key = (layer_id, -steps, not decayed, not by_muon)
        if key not in groups:
            layer = model.layers[layer_id].name
            # timm's rule may cut a layer in two: `readout.1.no_decay` is the part that it counts one step lower.
            part = layer if steps == steps_to_output(model, name, LayerRule.beit) else f"{layer}.{steps}"
            groups[key] = {
                "name": f"{part}.{'decay' if decayed else 'no_decay'}{'.muon' if by_muon else ''}",
                "layer": layer,
                "layer_id": layer_id,
                "scale": conf.layer_decay**steps,
                "lr": conf.lr * conf.layer_decay**steps,
                "weight_decay": conf.weight_decay if decayed else 0.0,
                "optimizer": "adamw" if conf.name == OptimizerKind.muon and not by_muon else conf.name.value,
                "params": [],
                "param_names": [],
            }
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    if conf.name == OptimizerKind.muon and all(group["optimizer"] != "muon" for group in groups.values()):
        raise UserError(
            "optim=muon would be ignored: no matrix between stem and head learns, and it moves nothing else;"
            " use optim=adamw, or a lower optim.fix_layer"
        )
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: LayeredModel, conf: OptimConf) -> Optimizer:
    """The optimizer of `optim.name` over `param_groups`; freeze the model first, and put it on its device.

    Raises:
        ValueError: See `param_groups`; or a package that it needs is missing or too old, or it does not run on this
            device.
    """
    return _BUILDERS[conf.name](param_groups(model, conf), conf)


def _kernels(groups: list[Group]) -> dict[str, bool]:
    """`fused`: one kernel a group, where torch has such for the device; else `foreach`, where it has those.

    On a CPU fused AdamW is 6 to 8 times faster than torch's default there, a loop over the parameters.
    """
    if _devices(groups) <= set(fused_devices()):
        return {"fused": True}
    return {"foreach": _has_foreach(groups)}


def _has_foreach(groups: list[Group]) -> bool:
    return _devices(groups) <= set(foreach_devices())


def _devices(groups: list[Group]) -> set[str]:
    """The kinds of device that the parameters are on."""
    return {parameter.device.type for group in groups for parameter in group["params"]}


def _adamw(groups: list[Group], conf: OptimConf) -> Optimizer:
    """Loshchilov and Hutter, arXiv:1711.05101."""
    return torch.optim.AdamW(groups, lr=conf.lr, betas=(conf.betas[0], conf.betas[1]), eps=conf.eps, **_kernels(groups))


def _sgd(groups: list[Group], conf: OptimConf) -> Optimizer:
    """Torch's SGD: weight decay is added to the gradient, and so to the momentum."""
    optimizer = torch.optim.SGD(groups, lr=conf.lr, momentum=conf.momentum, nesterov=conf.nesterov, **_kernels(groups))
    if conf.momentum:
        # Momentum starts at zero instead of at the first gradient: the same numbers. But a fused first step that is
        # masked as not finite would leave torch's own start as it was allocated, uninitialised.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _lion(groups: list[Group], conf: OptimConf) -> Optimizer:
    """Chen et al., arXiv:2302.06675; timm's, since torch has none. It has no fused kernel."""
    from timm.optim.lion import Lion

    lion: Optimizer = Lion(groups, lr=conf.lr, betas=(conf.betas[0], conf.betas[1]), foreach=_has_foreach(groups))
    return lion


def _adafactor(groups: list[Group], conf: OptimConf) -> Optimizer:
    """Shazeer and Stern, arXiv:1804.04235, as torch has it, in its loop over parameters: it is there to save memory.

    A tensor moves by the share min(lr, 1 / sqrt(step)) of its own root mean square, or of 0.001 where that is more.
    """
    return torch.optim.Adafactor(groups, lr=conf.lr)


def _muon(groups: list[Group], conf: OptimConf) -> Optimizer:
    """Jordan et al. (https://kellerjordan.github.io/posts/muon/), steps scaled to AdamW's size (arXiv:2502.16982).

    So one rate and one decay serve the matrices and the rest, and those that were tuned for AdamW fit.
    """
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise UserError(f"optim=muon needs torch 2.9 or newer, and this is {torch.__version__}")
    matrices = [group for group in groups if group["optimizer"] == "muon"]
    others = [group for group in groups if group["optimizer"] == "adamw"]
    muon = kind(matrices, lr=conf.lr, momentum=conf.momentum, nesterov=conf.nesterov, adjust_lr_fn="match_rms_adamw")
    return Together(groups, {"muon": muon, **({"adamw": _adamw(others, conf)} if others else {})})


def _adamw8bit(groups: list[Group], conf: OptimConf) -> Optimizer:
    """AdamW with moments of 8 bits, 256 of them sharing a scale: Dettmers et al., arXiv:2110.02861; bitsandbytes'.

    Tensors of fewer than 4,096 numbers keep moments of 32 bits. It waits for the device after every tensor.
    """
    devices = _devices(groups)
    if not devices <= {"cpu", "cuda", "xpu"}:
        raise UserError(f"optim=adamw8bit runs on cpu, cuda and xpu, and not on {', '.join(devices)}: use optim=adamw")
    install = "pip install 'finetune[adamw8bit]'"
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"optim=adamw8bit needs bitsandbytes, which is not installed: {install}") from error
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 50):
        raise UserError(f"optim=adamw8bit needs bitsandbytes 0.50 or newer, and this is {version}: {install}")
    # On some CPUs it advises to install a package for 4-bit products, which nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, lr=conf.lr, betas=(conf.betas[0], conf.betas[1]), eps=conf.eps)
    return optimizer


_BUILDERS: dict[OptimizerKind, Callable[[list[Group], OptimConf], Optimizer]] = {
    OptimizerKind.adamw: _adamw,
    OptimizerKind.sgd: _sgd,
    OptimizerKind.lion: _lion,
    OptimizerKind.adafactor: _adafactor,
    OptimizerKind.muon: _muon,
    OptimizerKind.adamw8bit: _adamw8bit,
}


class Together(Optimizer):
    """Several optimizers as one: one list of groups for the scheduler and the tables, one state for checkpoints.

    The parts are nothing but arithmetic: at each step they are handed those groups that name them, and the state.
    """

    def __init__(self, groups: list[Group], parts: dict[str, Optimizer]) -> None:
        """Join `parts`, each made from those of `groups` whose `optimizer` is its name, and so with its settings."""
        super().__init__(groups, {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient, each by its own rule."""
        assert closure is None, "the loss has been computed by now"
        for name, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.state = self.state
            part.step()
        return None
