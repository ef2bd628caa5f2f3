"""The optimizer over the rows of `rates.rate_table`, each group with its own baked rate.

Baked means `group["lr"] = peak rate of the group` before any scheduler is made: `LambdaLR` multiplies each group's
`initial_lr`, and nothing in torch reads a stored `lr_scale`. So layer decay and freezing work with every optimizer.
"""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices as foreach_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices as fused_devices

from finetune.config import OPTIMIZER_READERS, OPTIMIZERS, OptimConf, nearest
from finetune.config.fields import changed
from finetune.core.layers import LayeredModel
from finetune.core.rates import GroupRate, rate_table
from finetune.core.weight_decay import is_embedding
from finetune.system.errors import UserError

Group = dict[str, Any]

# timm's Muon and its variants move matrices, and give every group with `use_fallback` to AdamW.
MUONS = ("muon", "nmuon", "adamuon", "nadamuon")


def is_hidden_matrix(model: LayeredModel, name: str) -> bool:
    """Whether a parameter is a matrix between stem and head that is no embedding: those that Muon moves.

    Muon's author leaves the first and the last layer, and all that is no matrix, to AdamW
    (https://kellerjordan.github.io/posts/muon/, "Empirical considerations").
    """
    is_hidden = 0 < model.layer_ids[name] < len(model.layers) - 1
    return is_hidden and model.net.get_parameter(name).ndim == 2 and not is_embedding(name)


def param_groups(model: LayeredModel, conf: OptimConf) -> list[Group]:
    """The optimizer's groups, from the stem up, of every parameter that learns. Freeze the model first.

    A group holds `params`, `lr` (baked) and `weight_decay`; for tables and checkpoints `name`, `layer`, `layer_id`,
    `scale`, `param_names`, and `optimizer`, the rule that moves it. With muon the hidden matrices of a row make a group
    of their own, `block.7.decay.muon`, ahead of the group of the others, whose rule is adamw.

    Raises:
        UserError: See `rate_table`; or muon would move no parameter.
    """
    table = rate_table(model, conf)
    if conf.name not in MUONS:
        return [_group(model, row, row.param_names, row.name, rule=conf.name) for row in table]
    groups = []
    for row in table:
        matrices = [name for name in row.param_names if is_hidden_matrix(model, name)]
        if matrices:
            groups.append(_group(model, row, matrices, f"{row.name}.muon", rule=conf.name))
        if others := [name for name in row.param_names if name not in matrices]:
            groups.append({**_group(model, row, others, row.name, rule="adamw"), "use_fallback": True})
    # Without this check a linear probe with muon would silently be a run of AdamW.
    if all(group["optimizer"] == "adamw" for group in groups):
        why = "no matrix between stem and head learns, and it moves nothing else"
        raise UserError(f"optim={conf.name} would be ignored: {why}; use optim=adamw, or a lower optim.fix_layer")
    return groups


def _group(model: LayeredModel, row: GroupRate, param_names: Sequence[str], name: str, *, rule: str) -> Group:
    facts = {"name": name, "layer": row.layer, "layer_id": row.layer_id, "scale": row.scale, "optimizer": rule}
    params = [model.net.get_parameter(param_name) for param_name in param_names]
    rates = {"lr": row.peak, "weight_decay": row.weight_decay}
    return {**facts, **rates, "params": params, "param_names": list(param_names)}


def build_optimizer(model: LayeredModel, conf: OptimConf) -> Optimizer:
    """The optimizer of `optim.name` over `param_groups`; freeze the model first, and put it on its device.

    Raises:
        UserError: See `param_groups`; or nobody knows the name, the optimizer lacks a changed setting, the package that
            it needs is missing, or it does not run on this device.
    """
    groups = param_groups(model, conf)
    betas = (conf.betas[0], conf.betas[1])
    # AdamW and SGD are torch's: their fused kernels read the mask of a step that is not finite on the device. With any
    # other optimizer the host reads the mask, which waits for a GPU once a step.
    if conf.name == "adamw":
        return torch.optim.AdamW(groups, lr=conf.lr, betas=betas, eps=conf.eps, **_kernels(groups))
    if conf.name == "sgd":
        return _sgd(groups, conf)
    if conf.name == "adafactor":
        # Shazeer and Stern, arXiv:1804.04235. timm's optimizer of that name takes the rate as it is, and not as a
        # share of each tensor's own size, so every recipe would need another rate.
        return torch.optim.Adafactor(groups, lr=conf.lr)
    if conf.name == "adamw8bit":
        return _adamw8bit(groups, conf)
    return _timm_optimizer(groups, conf)


def _kernels(groups: list[Group]) -> dict[str, bool]:
    """`fused`: one kernel a group, where torch has such for the device; else `foreach`, where it has those.

    On a CPU fused AdamW is 6 to 8 times faster than torch's default there, a loop over the parameters.
    """
    if _devices(groups) <= set(fused_devices()):
        return {"fused": True}
    return {"foreach": _devices(groups) <= set(foreach_devices())}


def _devices(groups: list[Group]) -> set[str]:
    """The kinds of device that the parameters are on."""
    return {parameter.device.type for group in groups for parameter in group["params"]}


def _sgd(groups: list[Group], conf: OptimConf) -> Optimizer:
    # Torch adds weight decay to the gradient, and so to the momentum.
    optimizer = torch.optim.SGD(groups, lr=conf.lr, momentum=conf.momentum, nesterov=conf.nesterov, **_kernels(groups))
    # Momentum starts at zero instead of at the first gradient: the same numbers. But a fused first step that is masked
    # as not finite would leave torch's own start as it was allocated, uninitialised.
    if conf.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _timm_optimizer(groups: list[Group], conf: OptimConf) -> Optimizer:
    """The optimizer of that name in timm's registry, whose own defaults hold where no setting was changed."""
    import timm.optim

    registry: Any = timm.optim
    names: list[str] = registry.list_optimizers()
    if conf.name not in names:
        close = nearest(conf.name, [*OPTIMIZERS, *names])
        known = f"{', '.join(OPTIMIZERS)}, and of timm {', '.join(names)}"
        raise UserError(f"optim.name={conf.name}: no optimizer has that name{close}; known are {known}")
    info = registry.get_optimizer_info(conf.name)
    # A second-order optimizer needs a graph of the gradients, which costs the memory of a second backward pass.
    if info.second_order:
        raise UserError(f"optim.name={conf.name} needs second derivatives, which finetune does not compute")
    try:
        build = registry.get_optimizer_class(conf.name)
    except (ImportError, AssertionError) as error:  # of apex and bitsandbytes: a package or a GPU is missing
        raise UserError(f"optim.name={conf.name}: {error}") from error
    # timm's `create_optimizer_v2` drops settings that an optimizer does not take; here each is an error, by signature.
    parameters = inspect.signature(build).parameters
    read = {name: getattr(conf, name) for name, readers in OPTIMIZER_READERS.items() if conf.name in readers}
    settings = {**read, **changed(conf, *OPTIMIZER_READERS)}
    if info.has_momentum:
        settings["momentum"] = conf.momentum  # SGD's relatives have 0 as their own default, which Nesterov's refuse
    for name, value in settings.items():
        if name not in parameters or (name == "betas" and info.num_betas != len(value)):
            raise UserError(f"optim.{name}={value} does not fit optim.name={conf.name}; leave it out")
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return build(groups, lr=conf.lr, **settings)  # type: ignore[no-any-return]


def _adamw8bit(groups: list[Group], conf: OptimConf) -> Optimizer:
    """AdamW with moments of 8 bits, 256 of them sharing a scale: Dettmers et al., arXiv:2110.02861; bitsandbytes'.

    Tensors of fewer than 4,096 numbers keep moments of 32 bits. It waits for the device after every tensor.
    """
    devices = _devices(groups)
    if not devices <= {"cpu", "cuda", "xpu"}:
        raise UserError(f"optim=adamw8bit runs on cpu, cuda and xpu, and not on {', '.join(devices)}: use optim=adamw")
    # On some CPUs it advises to install a package for 4-bit products, which nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        install = "pip install 'finetune[adamw8bit]'"
        raise UserError(f"optim=adamw8bit needs bitsandbytes, which is not installed: {install}") from error

    return AdamW8bit(groups, lr=conf.lr, betas=(conf.betas[0], conf.betas[1]), eps=conf.eps)  # type: ignore[no-any-return]
