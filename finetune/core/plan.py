"""The table of rates by layer, and each layer's rate over the whole run: tables and pictures made before training."""

from collections.abc import Sequence
from typing import Any

from finetune.core.layers import LayeredModel
from finetune.core.rates import GroupRate
from finetune.core.sched import Curve


def layer_rows(model: LayeredModel, table: Sequence[GroupRate]) -> list[dict[str, Any]]:
    """A row for each layer, from the stem up: the groups of `rate_table` by layer, and the frozen layers.

    Keys: `id`, `layer`, `parameters`, `learning` (parameters that learn), `state` (frozen, learns, or empty: no
    parameters), `rate_peak` (of the fastest group), `rates_peak` (all, falling), `weight_decay`, `decayed` (parameters
    that it reaches) and `groups` (number).
    """
    sizes = [0] * len(model.layers)
    for name, parameter in model.net.named_parameters():
        sizes[model.layer_ids[name]] += parameter.numel()
    rows = []
    for index, layer in enumerate(model.layers):
        groups = [group for group in table if group.layer_id == index]
        peaks = sorted({group.peak for group in groups}, reverse=True)
        decayed = [group for group in groups if group.weight_decay > 0]
        row = {
            "id": index,
            "layer": layer.name,
            "parameters": sizes[index],
            "learning": sum(group.num_parameters for group in groups),
            "state": "learns" if groups else "frozen" if sizes[index] or index < model.num_frozen else "empty",
            "rate_peak": peaks[0] if peaks else 0.0,
            "rates_peak": peaks,
            "weight_decay": decayed[0].weight_decay if decayed else 0.0,
            "decayed": sum(group.num_parameters for group in decayed),
            "groups": len(groups),
        }
        rows.append(row)
    return rows


def planned_rates(layers: Sequence[dict[str, Any]], curve: Curve) -> dict[str, Any]:
    """Every layer's rate over the run, as `rates.json` holds it and `lr.png` draws it.

    Keys: `unit` (of x), `interval` (of the scheduler), `x` (epochs), `layers` (name to rates at x), `frozen` (names).
    """
    # About 2000 points of each curve: enough for a picture, and a small file.
    times = range(0, curve.num_units, max(1, curve.num_units // 2000))
    factors = curve.factors()[:: times.step]
    return {
        "unit": "epoch",
        "interval": str(curve.sched.interval),
        "x": [t / curve.units_per_epoch for t in times],
        "layers": {r["layer"]: [r["rate_peak"] * f for f in factors] for r in layers if r["state"] == "learns"},
        "frozen": [row["layer"] for row in layers if row["state"] == "frozen"],
    }
