"""Which parameters weight decay reaches: matrices and kernels, and neither vectors nor embeddings."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from finetune.config import OptimConf
from finetune.core.globs import matched
from finetune.core.layers import LayeredModel

# A table that each block of some networks adds to its attention.
POSITION_TABLE = "relative_position_bias_table"
# Matched against the last part of a parameter's name, at any depth. BEiT, MAE and timm spare these too: they are
# offsets, not maps, and decay would only pull them towards zero.
EMBEDDINGS = (
    "cls_token", "class_embedding", "dist_token", "reg_token", "register_tokens", "storage_tokens", "mask_token",
    "pos_embed", "positional_embedding", "pos_embedding", "class_token", "position_embedding",
    POSITION_TABLE, "logit_scale", "logit_bias",
)  # fmt: skip


def is_embedding(name: str) -> bool:
    """Whether a parameter's name is that of a token, a position embedding or table, or a temperature."""
    return name.rpartition(".")[2] in EMBEDDINGS


def is_decayed(name: str, parameter: nn.Parameter, spared: Iterable[str], *, decay_embeddings: bool = False) -> bool:
    """Whether weight decay applies to the parameter `name`; a name that matches one of the globs `spared` has none.

    0-D tensors (`logit_scale`) and 1-D ones (biases, norms, layer scale) are never decayed. With `decay_embeddings`
    tokens and position embeddings are decayed like any matrix, as MKT does. A position table of a block is decayed
    unless `spared` names it: the authors of different networks do not agree about it.
    """
    is_spared_kind = is_embedding(name) and not name.endswith(POSITION_TABLE)
    if parameter.ndim <= 1 or (is_spared_kind and not decay_embeddings):
        return False
    return not any(fnmatchcase(name, glob) for glob in spared)


def decayed_names(model: LayeredModel, conf: OptimConf, more_spared: Iterable[str] = ()) -> set[str]:
    """The names of the parameters of `model.net` that weight decay reaches, frozen ones included.

    Parameters that match a glob of `more_spared` have none either; such a glob may match nothing.

    Raises:
        UserError: A glob of `optim.no_weight_decay` matches no parameter.
    """
    parameters = dict(model.net.named_parameters())
    by_user = matched(conf.no_weight_decay, list(parameters), "optim.no_weight_decay")
    if conf.decay_all:
        return parameters.keys() - by_user
    upstream = {name for name in model.no_weight_decay if not (conf.decay_embeddings and is_embedding(name))}
    left, embeddings = parameters.keys() - by_user - upstream, conf.decay_embeddings
    return {name for name in left if is_decayed(name, parameters[name], more_spared, decay_embeddings=embeddings)}
