"""Every setting of the optimizer: which one, its rates, what is frozen, what decays. Standard library only."""

import re
from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, not_read_by, setting


class LayerRule(Choice):
    """How `layer_decay` counts a layer's distance from the output; never what `fix_layer` freezes."""

    beit = "beit"
    timm = "timm"


@dataclass
class OptimConf:
    """The optimizer with layer-wise rate decay and a frozen prefix."""

    name: str = setting("adamw", "write optim=NAME, which sets rates too; or a name of timm's, such as optim.name=lamb")
    lr: float = setting(
        1e-3, "peak rate of the head; see lr_base_batch; adafactor: a share of a tensor's size", gt=0, le=1e38
    )
    lr_base_batch: int = setting(0, "0: off; B: the peak rate is lr * (batch_size * accumulate) / B; MAE: 256", ge=0)
    recipe_batch: int = setting(0, "images a step that lr was tuned for; another number is reported; 0: unknown", ge=0)
    layer_decay: float = setting(0.75, "factor from each layer's rate to that of the layer below it", gt=0, le=1)
    layer_rule: LayerRule = setting(LayerRule.beit, "beit: the final norm has the head's rate; timm: the last block's")
    fix_layer: int = setting(-1, "freeze layers up to this id; -1: none, 0: stem, L: blocks, L+1: all but head", ge=-1)
    freeze: list[str] = setting([], "globs of parameter names that are frozen too, in layers that learn")
    weight_decay: float = setting(0.05, "of matrices, times the rate; never of biases, norms, tokens, positions", ge=0)
    no_weight_decay: list[str] = setting([], "globs of parameter names that are not decayed either")
    decay_embeddings: bool = setting(False, "true: decay tokens and position embeddings too, as MKT does")
    decay_all: bool = setting(False, "true: decay every parameter, biases and norms too, as WiSE-FT does")
    betas: tuple[float, float] = setting((0.9, 0.999), "decay of the running means of gradient and squared gradient")
    eps: float = setting(1e-8, "AdamW's denominator floor", gt=0)
    momentum: float = setting(0.9, "sgd, muon: factor on the step before, which is added to a step", ge=0, lt=1)
    nesterov: bool = setting(False, "sgd, muon: look one step of momentum ahead")


# The optimizers of conf/optim. All others are timm's, which is not imported before an optimizer is built.
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon", "adamw8bit")

# Of these, the ones that read a setting which not all read. AdamW updates the vectors beside Muon's matrices.
OPTIMIZER_READERS: dict[str, tuple[str, ...]] = {
    "betas": ("adamw", "lion", "muon", "adamw8bit"),
    "eps": ("adamw", "muon", "adamw8bit"),
    "momentum": ("sgd", "muon"),
    "nesterov": ("sgd", "muon"),
}


def optim_problems(optim: OptimConf) -> list[str]:
    """What is wrong with the optimizer's settings beyond their ranges, one line each."""
    problems = []
    if not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={list(optim.betas)}: each must be at least 0 and less than 1")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", optim.name):
        problems.append(f"optim.name={optim.name}: expected a name of small letters and digits, such as adamw or lamb")
    reasons = not_read_by("optim", optim.name, OPTIMIZER_READERS) if optim.name in OPTIMIZERS else {}
    if "nesterov" not in reasons and not optim.momentum:
        reasons["nesterov"] = "it needs optim.momentum above 0, such as 0.9"
    if optim.decay_all:
        reasons["decay_embeddings"] = "optim.decay_all=true decays them already"
    if optim.weight_decay == 0:
        why = "optim.weight_decay=0 decays nothing"
        reasons |= dict.fromkeys(("no_weight_decay", "decay_embeddings", "decay_all"), why)
    if optim.layer_decay == 1:
        reasons["layer_rule"] = "optim.layer_decay=1 gives all layers one rate"
    return problems + ignored("optim", optim, reasons)
