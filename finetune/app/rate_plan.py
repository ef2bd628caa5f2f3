"""From a run's settings to its rates: the peak rate, the curve, `rates.json`, and the table of layers in the log."""

import dataclasses
import logging
from typing import Any

from finetune.app.build import Run
from finetune.config import Conf, Interval, OptimConf
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.rates import rate_table, with_peak_rate
from finetune.core.sched import Curve
from finetune.report.columns import state_in_words
from finetune.runs.earlier import EarlierRun
from finetune.runs.resume import Promise, Saved, compare_curves, epochs_before
from finetune.system.limits import Limit
from finetune.system.tables import table
from finetune.system.terminal import counted

STEPS = Limit(10_000_000, "every step's rate is planned ahead: lower train.epochs", "steps")

logger = logging.getLogger("finetune")


def images_per_step(conf: Conf) -> int:
    """Images that an optimizer step learns from."""
    return conf.data.batch_size * conf.train.accumulate


def peak_optim(conf: Conf) -> OptimConf:
    """The optimizer's settings with the head's peak rate as an absolute number."""
    return with_peak_rate(conf.optim, images_per_step(conf))


def run_curve(conf: Conf, batches_per_epoch: int) -> Curve:
    """The schedule's curve for a run whose epochs have this many micro-batches; see `Curve.of_run` for the error."""
    steps = -(-batches_per_epoch // conf.train.accumulate)  # the last step of an epoch may have fewer micro-batches
    subject = f"train.epochs={conf.train.epochs}: the run"
    STEPS.check(subject, conf.train.epochs * steps if conf.sched.interval == Interval.step else 0)
    peak = peak_optim(conf).lr
    return Curve.of_run(conf.sched, epochs=conf.train.epochs, steps_per_epoch=steps, peak_lr=peak)


def batch_notice(conf: Conf) -> str | None:
    """A warning for a recipe whose rate was tuned for another batch than this run's; None where there is none.

    FT-CLIP's 6e-4 at 2048 images a step, run with 32, trains to chance: its best-known issue.
    """
    wanted, batch, rate = conf.optim.recipe_batch, images_per_step(conf), conf.optim.lr
    if wanted in (0, batch):
        return None
    text = (
        f"BATCH: this run learns from {counted(batch, 'image')} a step (data.batch_size={conf.data.batch_size} x"
        f" train.accumulate={conf.train.accumulate}), and its recipe was tuned for {wanted}."
    )
    again = -(-wanted // conf.data.batch_size)
    reach = f" train.accumulate={again} keeps the recipe's batch" if again * conf.data.batch_size == wanted else ""
    if conf.optim.lr_base_batch:
        return f"{text} The rate is scaled to it: peak {peak_optim(conf).lr:.3g}.{reach and reach + '.'}"
    offer = f"optim.lr_base_batch={wanted} scales the rate to it: peak {rate * batch / wanted:.3g}"
    return f"{text} The rate is still {rate:g}; {offer}{reach and ';' + reach}."


def short_epoch_notice(conf: Conf, epoch_images: int) -> str | None:
    """A warning where an epoch has fewer images than `train.accumulate` asks of a step; None where it has enough."""
    asked = images_per_step(conf)
    if asked <= epoch_images or conf.train.accumulate == 1:
        return None
    product = f"data.batch_size={conf.data.batch_size} x train.accumulate={conf.train.accumulate}"
    scaled = f"; optim.lr_base_batch={conf.optim.lr_base_batch} scales the rate as if it had {asked:,}"
    text = f"BATCH: a step would have {counted(asked, 'image')} ({product}), and an epoch has {epoch_images:,}, so each"
    return f"{text} epoch is one step{scaled if conf.optim.lr_base_batch else ''}. Lower train.accumulate."


def plan_rates(run: Run, curve: Curve, earlier: EarlierRun, found: Saved | None, promise: Promise) -> dict[str, Any]:
    """The content of `rates.json`; if the number of epochs has changed, with the old curve under `before`.

    The promise is weakened if the epochs before the checkpoint `found` had other rates than `curve`, the new one.
    """
    layers = layer_rows(run.model, rate_table(run.model, peak_optim(run.conf)))
    plan = planned_rates(layers, curve)
    before_that = None if found is None else epochs_before(found)  # the older `rates.json` may be anybody's
    epochs = earlier.epochs_before or before_that
    if epochs is None:
        return plan
    old = dataclasses.replace(curve, epochs=epochs)
    if found is not None and earlier.epochs_before is not None:
        compare_curves(old, curve, promise, int(found[0]["scheduler"]["last_epoch"]))
    before = planned_rates(layers, old)
    return {**plan, "before": {"epochs": old.epochs, "x": before["x"], "layers": before["layers"]}}


def log_layers(run: Run, num_groups: int) -> None:
    """Log a table with a row for each layer; `num_groups` is the number of parameter groups."""
    rows = layer_rows(run.model, rate_table(run.model, peak_optim(run.conf)))
    shown = {"id": "id", "layer": "layer", "rate_peak": "rate", "weight_decay": "weight decay"}
    shown |= {"parameters": "parameters", "state": "state"}
    cells = [{**{name: row[key] for key, name in shown.items()}, "state": state_in_words(row)} for row in rows]
    logger.info("%s", table(cells, list(shown.values())))
    everything, learning = (sum(row[key] for row in rows) for key in ("parameters", "learning"))
    optim = run.conf.optim
    spared = "nothing" if optim.decay_all else "biases, norms" + ", tokens and positions" * (not optim.decay_embeddings)
    text = f"{learning:,} of {everything:,} parameters learn, in {counted(num_groups, 'group')}"
    logger.info("%s; weight decay spares %s", text, spared)


def log_steps(conf: Conf, curve: Curve) -> None:
    """Log how many optimizer steps the whole run makes: it, rather than the epochs, says how far a rate can go."""
    steps, images = counted(curve.steps_per_epoch, "optimizer step"), counted(images_per_step(conf), "image")
    total = curve.epochs * curve.steps_per_epoch
    most = "at most " if curve.steps_per_epoch == 1 else ""
    logger.info("%s of %s%s each in an epoch, %s in all", steps, most, images, f"{total:,}")
