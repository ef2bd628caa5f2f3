"""The learning rates that a run plans for each layer: the content of `rates.json`, and the table in the log."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from finetune.app.build import Run
from finetune.config import Conf
from finetune.core import recipe
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.sched import lr_factor
from finetune.runs.earlier import EarlierRun
from finetune.runs.resume import Promise, Saved, compare_curves, earlier_curve
from finetune.system.tables import table

logger = logging.getLogger("finetune")


def planned(run: Run, steps: int, earlier: EarlierRun, found: Saved | None, promise: Promise) -> dict[str, Any]:
    """The content of `rates.json`; if the number of epochs has changed, with the old curve under `before`.

    The promise is weakened if the epochs before the checkpoint `found` had other rates than the new curve. `steps` are
    the optimizer steps of an epoch.
    """
    plan = planned_rates(run.model, run.conf, steps)
    if earlier.epochs_before is None:
        before = None if earlier.result is None else earlier_curve(run.folder / "rates.json")
        return plan if before is None else {**plan, "before": before}
    old = dataclasses.replace(run.conf, train=dataclasses.replace(run.conf.train, epochs=earlier.epochs_before))
    if found is not None:
        now, position = _factors(run.conf, steps), max(int(found[0]["scheduler"]["last_epoch"]), 0)
        per_epoch = len(now) // run.conf.train.epochs
        compare_curves(_factors(old, steps), now, promise, position=position, units_per_epoch=per_epoch)
    curve = planned_rates(run.model, old, steps)
    return {**plan, "before": {"epochs": earlier.epochs_before, "x": curve["x"], "layers": curve["layers"]}}


def _factors(conf: Conf, steps: int) -> list[float]:
    """The schedule's factor in each of its units, over the whole run."""
    sched, units = recipe.timed_sched(conf.sched, steps), recipe.num_units(conf, steps)
    return [lr_factor(t, sched, units) for t in range(units)]


def log_layers(run: Run, num_groups: int) -> None:
    """Log a table with a row for each layer; `num_groups` is the number of parameter groups."""
    rows = layer_rows(run.model, run.conf)
    logger.info("%s", table(rows, columns=list(rows[0])))
    learning = sum(row["parameters"] for row in rows if row["state"] == "learns")
    logger.info(
        "%s of %s parameters learn, in %d groups; weight decay spares biases, norms, tokens and positions",
        f"{learning:,}",
        f"{sum(row['parameters'] for row in rows):,}",
        num_groups,
    )
