"""The learning rates that a run plans for each layer: the content of `rates.json`, and the table in the log."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from finetune.app.build import Run
from finetune.app.recipe import peak_optim
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.rates import rate_table
from finetune.core.sched import Curve
from finetune.runs.earlier import EarlierRun
from finetune.runs.resume import Promise, Saved, compare_curves, earlier_curve
from finetune.system.tables import table

logger = logging.getLogger("finetune")


def plan_rates(run: Run, curve: Curve, earlier: EarlierRun, found: Saved | None, promise: Promise) -> dict[str, Any]:
    """The content of `rates.json`; if the number of epochs has changed, with the old curve under `before`.

    The promise is weakened if the epochs before the checkpoint `found` had other rates than `curve`, the new one.
    """
    layers = layer_rows(run.model, rate_table(run.model, peak_optim(run.conf)))
    plan = planned_rates(layers, curve)
    if earlier.epochs_before is None:
        before = None if earlier.result is None else earlier_curve(run.folder / "rates.json")
        return plan if before is None else {**plan, "before": before}
    old = dataclasses.replace(curve, epochs=earlier.epochs_before)
    if found is not None:
        position, per_epoch = max(int(found[0]["scheduler"]["last_epoch"]), 0), curve.units_per_epoch
        compare_curves(old.factors(), curve.factors(), promise, position=position, units_per_epoch=per_epoch)
    before = planned_rates(layers, old)
    return {**plan, "before": {"epochs": old.epochs, "x": before["x"], "layers": before["layers"]}}


def log_layers(run: Run, num_groups: int) -> None:
    """Log a table with a row for each layer; `num_groups` is the number of parameter groups."""
    rows = layer_rows(run.model, rate_table(run.model, peak_optim(run.conf)))
    shown = {"id": "id", "layer": "layer", "rate_peak": "rate", "weight_decay": "weight decay"}
    shown |= {"parameters": "parameters", "state": "state"}
    logger.info("%s", table([{name: row[key] for key, name in shown.items()} for row in rows], list(shown.values())))
    learning = sum(row["parameters"] for row in rows if row["state"] == "learns")
    logger.info(
        "%s of %s parameters learn, in %d groups; weight decay spares biases, norms, tokens and positions",
        f"{learning:,}",
        f"{sum(row['parameters'] for row in rows):,}",
        num_groups,
    )
