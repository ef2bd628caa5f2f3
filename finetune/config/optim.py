"""Every setting of the optimizer: which one, its rates, what is frozen, what decays. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, not_read_by, setting


class OptimizerKind(Choice):
    """Whose rule turns a gradient into a step."""

    adamw = "adamw"
    sgd = "sgd"
    lion = "lion"
    adafactor = "adafactor"
    muon = "muon"
    adamw8bit = "adamw8bit"


class LayerRule(Choice):
    """How `layer_decay` counts a layer's distance from the output; never what `fix_layer` freezes."""

    beit = "beit"
    timm = "timm"


@dataclass
class OptimConf:
    """The optimizer with layer-wise rate decay and a frozen prefix."""

    name: OptimizerKind = setting(
        OptimizerKind.adamw,
        "adamw, sgd, lion, adafactor, muon or adamw8bit; say optim=NAME instead, which brings the rates that suit it",
    )
    lr: float = setting(
        1e-3,
        "peak rate of the head; absolute unless lr_base_batch says otherwise, and with adafactor a share of each"
        " tensor's own size",
        above=0,
    )
    lr_base_batch: int = setting(
        0, "0: off; B: the peak rate is lr * (batch_size * accumulate) / B, as MAE's blr with 256", at_least=0
    )
    recipe_batch: int = setting(
        0, "images an optimizer step that lr was tuned for; a run with another number says so; 0: unknown", at_least=0
    )
    layer_decay: float = setting(
        0.75, "each layer further from the output learns at this times the rate of the one above", above=0, at_most=1
    )
    layer_rule: LayerRule = setting(
        LayerRule.beit,
        "beit (also MAE, MKT, FT-CLIP): the final norm learns at the head's rate; timm: at the last block's",
    )
    fix_layer: int = setting(
        -1,
        "layers with id <= this are frozen; -1: none, 0: the stem, L: all blocks, L+1: all but the head",
        at_least=-1,
    )
    weight_decay: float = setting(
        0.05,
        "shrinks matrices by rate * weight_decay (sgd adds it to the gradient); never biases, norms, tokens, positions",
        at_least=0,
    )
    no_weight_decay: list[str] = setting([], "globs of parameter names that are not decayed either")
    decay_embeddings: bool = setting(False, "true: decay tokens and position embeddings too, as MKT does")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "running-mean coefficients: AdamW's of gradient and squared gradient, Lion's of step and moment"
    )
    eps: float = setting(1e-8, "AdamW's denominator floor", above=0)
    momentum: float = setting(0.9, "sgd, muon: how much of the step before a step keeps", at_least=0, below=1)
    nesterov: bool = setting(False, "sgd, muon: look one step of momentum ahead")


# The optimizers that read a setting which not every optimizer reads. AdamW updates the vectors beside Muon's matrices.
_READERS: dict[str, tuple[OptimizerKind, ...]] = {
    "betas": (OptimizerKind.adamw, OptimizerKind.lion, OptimizerKind.muon, OptimizerKind.adamw8bit),
    "eps": (OptimizerKind.adamw, OptimizerKind.muon, OptimizerKind.adamw8bit),
    "momentum": (OptimizerKind.sgd, OptimizerKind.muon),
    "nesterov": (OptimizerKind.sgd, OptimizerKind.muon),
}


def optim_problems(optim: OptimConf) -> list[str]:
    """What is wrong with the optimizer's settings beyond their ranges, one line each."""
    problems = []
    if not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={list(optim.betas)}: each must be at least 0 and less than 1")
    reasons = not_read_by("optim", optim.name, _READERS)
    if "nesterov" not in reasons and not optim.momentum:
        reasons["nesterov"] = "it needs optim.momentum above 0, such as 0.9"
    return problems + ignored("optim", optim, reasons)
