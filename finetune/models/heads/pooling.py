"""`model.pool=mean`: the mean of all patch tokens under a new norm, in the place of the pooling of the weights.

As MAE and BEiT fine-tune (`global_pool`, `use_mean_pooling`: arXiv:2111.06377, appendix A.1), and as FT-CLIP
(arXiv:2212.06138) fine-tunes CLIP, whose `ln_post` and `proj` are thrown away. The class token still attends and is
attended to; it is only not read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.system.errors import UserError

# timm's classes that pool tokens by `global_pool` and have both `norm` (ahead of the pool) and `fc_norm` (behind it).
TIMM_KINDS = ("VisionTransformer", "Eva", "Beit")


def mean_pool_open_clip(visual: nn.Module, name: str) -> int:
    """Let an image tower of open_clip pool by the mean, by upstream's own switches; the length of its features.

    The new norm keeps the name `ln_post`; `proj` is gone.

    Raises:
        ValueError: A tower that is no plain VisionTransformer.
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
    """Let a timm network pool by the mean: as if built with `global_pool='avg'`, with a new `fc_norm` and no `norm`.

    Raises:
        ValueError: A network that does not pool tokens this way.
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
