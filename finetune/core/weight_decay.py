"""Which parameters weight decay reaches: matrices and kernels, and neither vectors nor embeddings."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from finetune.config import OptimConf
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError

# Matched against the last part of a parameter's name, at any depth. BEiT, MAE and timm spare these too: they are
# offsets, not maps, and decay would only pull them towards zero.
EMBEDDINGS = (
    "cls_token", "class_embedding", "dist_token", "reg_token", "register_tokens", "storage_tokens", "mask_token",
    "pos_embed", "positional_embedding", "pos_embedding", "class_token", "position_embedding", "pos_embed_win",
    "relative_position_bias_table", "logit_scale", "logit_bias",
)  # fmt: skip


def is_embedding(name: str) -> bool:
    """Whether a parameter's name, or glob, is that of a token, a position embedding or a temperature."""
    return name.rpartition(".")[2] in EMBEDDINGS


def is_decayed(name: str, parameter: nn.Parameter, spared: Iterable[str], *, decay_embeddings: bool = False) -> bool:
    """Whether weight decay applies to the parameter `name`; a name that matches one of the globs `spared` has none.

    0-D tensors (`logit_scale`) and 1-D ones (biases, norms, layer scale) are never decayed. With `decay_embeddings`
    tokens and position embeddings are decayed like any matrix, as MKT does.
    """
    if parameter.ndim <= 1 or (is_embedding(name) and not decay_embeddings):
        return False
    return not any(fnmatchcase(name, glob) for glob in spared)


def spared_globs(model: LayeredModel, conf: OptimConf) -> list[str]:
    """The globs of parameter names without weight decay: those of `optim.no_weight_decay`, then upstream's own.

    Raises:
        UserError: A glob of `optim.no_weight_decay` matches no parameter, frozen ones included.
    """
    names = [name for name, _ in model.net.named_parameters()]
    for glob in conf.no_weight_decay:
        if not any(fnmatchcase(name, glob) for name in names):
            examples = f"{names[0]}, {names[-1]}"
            raise UserError(f"optim.no_weight_decay: '{glob}' matches no parameter; names look like {examples}")
    upstream = [glob for glob in model.no_weight_decay if not (conf.decay_embeddings and is_embedding(glob))]
    return [*conf.no_weight_decay, *upstream]
