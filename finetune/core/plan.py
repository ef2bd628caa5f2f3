"""What a run will do to each layer, before it does it: a row a layer, and each layer's rate over the whole run."""

from __future__ import annotations

from typing import Any

from finetune.config import Conf, Interval
from finetune.core.layers import LayeredModel
from finetune.core.optim import layer_scale, steps_to_output
from finetune.core.recipe import num_units, peak_lr, timed_sched
from finetune.core.sched import lr_factor

# Most points of a planned curve: enough for a picture, and little enough for a file.
MAX_POINTS = 2000

LayerRow = dict[str, Any]


def layer_rows(model: LayeredModel, conf: Conf) -> list[LayerRow]:
    """A row a layer, from the stem up: id, layer, rate (its peak), weight decay, parameters, state.

    Freeze the model first. A frozen layer's rate is 0.0. Weight decay is what the layer's matrices get; its biases,
    norms, tokens and position embeddings get none.
    """
    sizes = [0] * len(model.layers)
    for name, parameter in model.net.named_parameters():
        sizes[model.layer_ids[name]] += parameter.numel()
    peaks = peak_rates(model, conf)
    return [
        {
            "id": index,
            "layer": layer.name,
            "rate": peaks[index],
            "weight decay": conf.optim.weight_decay if index >= model.num_frozen else 0.0,
            "parameters": sizes[index],
            "state": "learns" if index >= model.num_frozen else "frozen",
        }
        for index, layer in enumerate(model.layers)
    ]


def peak_rates(model: LayeredModel, conf: Conf) -> list[float]:
    """Each layer's rate where the schedule's factor is 1; 0.0 where it is frozen.

    Of a layer whose parts `optim.layer_rule=timm` counts at different distances, the highest.
    """
    scales = [layer_scale(index, model.num_blocks, conf.optim.layer_decay) for index in range(len(model.layers))]
    peaks = [peak_lr(conf) * scale if index >= model.num_frozen else 0.0 for index, scale in enumerate(scales)]
    for index in range(model.num_frozen, len(model.layers)):
        steps = [
            steps_to_output(model, name, conf.optim.layer_rule)
            for name, _ in model.net.named_parameters()
            if model.layer_ids[name] == index
        ]
        if steps:
            peaks[index] = peak_lr(conf) * conf.optim.layer_decay ** min(steps)
    return peaks


def planned_rates(model: LayeredModel, conf: Conf, steps_per_epoch: int) -> dict[str, Any]:
    """Every layer's rate over the run, as `rates.json` holds it and `lr.png` draws it.

    Args:
        model: Frozen as it will train.
        conf: Rates and schedule.
        steps_per_epoch: Optimizer steps an epoch.

    Returns:
        `unit` (of x), `interval` (of the scheduler), `x` (epochs), `layers` (name to rates at x) and `frozen` (names).
    """
    per_epoch = steps_per_epoch if conf.sched.interval == Interval.step else 1
    num_steps = num_units(conf, steps_per_epoch)
    sched = timed_sched(conf.sched, steps_per_epoch)
    times = range(0, num_steps, max(1, num_steps // MAX_POINTS))
    factors = [lr_factor(t, sched, num_steps) for t in times]
    peaks = peak_rates(model, conf)
    learning = list(zip(model.layers, peaks, strict=True))[model.num_frozen :]
    return {
        "unit": "epoch",
        "interval": str(conf.sched.interval),
        "x": [t / per_epoch for t in times],
        "layers": {layer.name: [peak * factor for factor in factors] for layer, peak in learning},
        "frozen": [layer.name for layer in model.layers[: model.num_frozen]],
    }
