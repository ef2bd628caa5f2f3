"""`model.pool=mean`: replace the pooling of the weights by the mean of all patch tokens and a new norm.

MAE and BEiT fine-tune so (`global_pool`, `use_mean_pooling`: arXiv:2111.06377, appendix A.1), and FT-CLIP
(arXiv:2212.06138) fine-tunes CLIP so, without CLIP's `ln_post` and `proj`. The class token still takes part in
attention; only the readout ignores it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.system.errors import UserError

# The classes of timm that pool tokens as `global_pool` says, with `norm` ahead of the pool and `fc_norm` behind it.
TIMM_KINDS = ("VisionTransformer", "Eva", "Beit")


def mean_pool_open_clip(visual: nn.Module, name: str) -> int:
    """Make an image tower of open_clip pool by the mean; return the length of its features.

    The new norm is called `ln_post` like the old one; `proj` is removed.

    Args:
        visual: The image tower, changed in place.
        name: The model's name, for the error.

    Raises:
        UserError: The tower is not a plain VisionTransformer.
    """
    tower: Any = visual
    if type(visual).__name__ != "VisionTransformer" or tower.attn_pool is not None:
        raise UserError(
            f"model.pool=mean needs a plain ViT, and the image tower of {name} is none: use model.pool=auto"
        )
    width = tower.conv1.out_channels
    tower.pool_type, tower.final_ln_after_pool = "avg", True
    tower.ln_post = _fresh(tower.ln_post, width)
    tower.proj = None
    tower.output_dim = width
    return int(width)


def mean_pool_timm(net: nn.Module, name: str) -> None:
    """Make a timm network pool by the mean: a new `fc_norm` behind the pool, no `norm` ahead of it.

    That is the network that timm builds with `global_pool='avg'`.

    Args:
        net: The network, changed in place.
        name: The model's name, for the error.

    Raises:
        UserError: The network does not pool tokens.
    """
    tower: Any = net
    if type(net).__name__ not in TIMM_KINDS or "attn_pool" in dict(net.named_children()):
        raise UserError(f"model.pool=mean needs a plain ViT, BEiT or EVA, and {name} is none: use model.pool=auto")
    old = tower.norm if isinstance(tower.fc_norm, nn.Identity) else tower.fc_norm
    tower.fc_norm = _fresh(old, tower.num_features)
    tower.norm = nn.Identity()
    tower.global_pool = "avg"


def _fresh(norm: nn.Module, width: int) -> nn.Module:
    """A new norm of the same class and epsilon: weight 1, bias 0."""
    old: Any = norm
    return type(norm)(width, eps=old.eps)
