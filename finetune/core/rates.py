"""The table of rates: a row for each parameter group, with its layer, distance from the output, and peak rate.

The optimizer, `param_groups_lrd`, `finetune describe`, the log, `rates.json` and `lr.png` all read this table. The
curve over the run, which multiplies every peak rate, is in `sched.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.config import LayerRule, OptimConf
from finetune.core.layers import LayeredModel
from finetune.core.weight_decay import decayed_names


@dataclass(frozen=True)
class GroupRate:
    """One parameter group: parameters of one layer that learn at one rate and decay alike."""

    name: str  # `block.7.no_decay`; timm's rule may cut a layer in two, and `readout.1.no_decay` has distance 1
    layer: str
    layer_id: int  # 0 for the stem
    distance: int  # layers between this group and the output: 0 for readout and head, L + 1 for the stem
    scale: float  # `layer_decay ** distance`, the share of the head's rate
    peak: float  # the rate where the curve's factor is 1
    weight_decay: float
    is_decayed: bool  # whether weight decay reaches parameters of this kind, even if `weight_decay` is 0
    num_parameters: int  # numbers in all tensors together
    param_names: tuple[str, ...]  # as in `model.net.named_parameters()`


def with_peak_rate(optim: OptimConf, images_per_step: int) -> OptimConf:
    """`optim` whose `lr` is the head's peak rate as an absolute number: `lr * images_per_step / lr_base_batch`.

    The linear rule of Goyal et al., arXiv:1706.02677, section 2.1; MAE's `blr` has the base 256.
    """
    if not optim.lr_base_batch:
        return optim  # the rate is absolute already
    return replace(optim, lr=optim.lr * images_per_step / optim.lr_base_batch, lr_base_batch=0)


def distance_to_output(layer_id: int, num_blocks: int) -> int:
    """How many layers stand between a layer and the output, as MKT, BEiT, MAE, FT-CLIP and DINOv2 count: 0 to L + 1."""
    return num_blocks + 1 - min(layer_id, num_blocks + 1)


def rate_table(model: LayeredModel, conf: OptimConf, *, more_spared: Sequence[str] = ()) -> list[GroupRate]:
    """A row for each group of parameters that learn, from the stem up, the decayed parameters of a layer first.

    Freeze `model` first; `conf.lr` must be an absolute rate (`with_peak_rate`). Parameters that match a glob of
    `more_spared` have no weight decay either; such a glob may match nothing.

    Raises:
        UserError: See `decayed_names`.
    """
    decayed, parameters = decayed_names(model, conf, more_spared), dict(model.net.named_parameters())
    found: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        if parameter.requires_grad:  # the model is frozen before, or resume would meet other groups
            layer_id = model.layer_ids[name]
            distance = distance_to_output(layer_id, model.num_blocks)
            if conf.layer_rule == LayerRule.timm:
                distance = model.layers[layer_id].timm_steps.get(name, distance)
            found[layer_id, -distance, name not in decayed].append(name)  # so sorts from the stem up, decayed first
    rows = []
    # A resumed optimizer needs the groups in the same order. So they are sorted, and not as the parameters come.
    for (layer_id, minus_distance, is_spared), names in sorted(found.items()):
        layer, distance = model.layers[layer_id].name, -minus_distance
        part = layer if distance == distance_to_output(layer_id, model.num_blocks) else f"{layer}.{distance}"
        scale = conf.layer_decay**distance  # 1 at the output, so `optim.lr` is the head's rate
        rows.append(
            GroupRate(
                name=f"{part}.{'no_decay' if is_spared else 'decay'}",
                layer=layer,
                layer_id=layer_id,
                distance=distance,
                scale=scale,
                peak=conf.lr * scale,  # baked here: LambdaLR never reads a scale
                weight_decay=0.0 if is_spared else conf.weight_decay,
                is_decayed=not is_spared,  # its own field: two kinds stay two groups at decay 0
                num_parameters=sum(parameters[name].numel() for name in names),
                param_names=tuple(names),
            )
        )
    return rows
