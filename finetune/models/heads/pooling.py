"""`model.pool=mean`: replace the pooling of the weights by the mean of all patch tokens and a new norm.

MAE and BEiT fine-tune so (`global_pool`, `use_mean_pooling`: arXiv:2111.06377, appendix A.1), with the norm behind the
mean. FT-CLIP (arXiv:2212.06138) fine-tunes CLIP so, without its `ln_post` and `proj`, with the norm of every patch
ahead of the mean. Only the readout ignores the class token.
"""

from typing import Any

from torch import nn

from finetune.system.errors import UserError


def mean_pool_open_clip(visual: Any, name: str) -> int:
    """Make a VisionTransformer of open_clip pool by the mean, in place; return the length of its features.

    The new norm is called `ln_post` like the old one, and normalises every patch ahead of the mean; `proj` is removed.
    `name` is the model's, for the error.
    """
    if type(visual).__name__ != "VisionTransformer" or visual.attn_pool is not None:
        raise UserError(f"model.pool=mean needs a plain ViT, and {name} has none: use model.pool=auto")
    width = visual.conv1.out_channels
    visual.pool_type, visual.final_ln_after_pool = "avg", False
    visual.ln_post = _fresh(visual.ln_post, width)
    visual.proj = None
    visual.output_dim = width
    return int(width)


def mean_pool_timm(net: Any, name: str) -> None:
    """Make a timm network that pools tokens pool by the mean, in place, as timm builds it with `global_pool='avg'`.

    It gets a new `fc_norm` behind the pool, and no `norm` ahead of it. `name` is the model's, for the error.
    """
    # These classes pool tokens as `global_pool` says, with `norm` ahead of the pool and `fc_norm` behind it.
    if type(net).__name__ not in ("VisionTransformer", "Eva", "Beit") or "attn_pool" in dict(net.named_children()):
        raise UserError(f"model.pool=mean needs a plain ViT, BEiT or EVA, and {name} is none: use model.pool=auto")
    net.fc_norm = _fresh(net.norm if isinstance(net.fc_norm, nn.Identity) else net.fc_norm, net.num_features)
    net.norm = nn.Identity()
    net.global_pool = "avg"


def _fresh(norm: Any, width: int) -> nn.Module:
    """A new norm of the same class and epsilon: weight 1, bias 0."""
    return type(norm)(width, eps=norm.eps)  # type: ignore[no-any-return]
