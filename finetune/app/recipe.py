"""From a recipe's settings to the numbers of this run: its peak rate, its curve, and a warning about its batch."""

from __future__ import annotations

from finetune.config import Conf, OptimConf
from finetune.core.rates import with_peak_rate
from finetune.core.sched import Curve


def images_per_step(conf: Conf) -> int:
    """Images that an optimizer step learns from."""
    return conf.data.batch_size * conf.train.accumulate


def peak_optim(conf: Conf) -> OptimConf:
    """The optimizer's settings with the head's peak rate as an absolute number."""
    return with_peak_rate(conf.optim, images_per_step(conf))


def batch_notice(conf: Conf) -> str | None:
    """A warning for a recipe whose rate was tuned for another batch than this run's; None where there is none.

    FT-CLIP's 6e-4 at 2048 images a step, run with 32, trains to chance: its best-known issue.
    """
    wanted, batch, rate = conf.optim.recipe_batch, images_per_step(conf), conf.optim.lr
    if wanted in (0, batch):
        return None
    text = (
        f"BATCH: this run learns from {batch} images a step (data.batch_size={conf.data.batch_size} x"
        f" train.accumulate={conf.train.accumulate}), and its recipe was tuned for {wanted}."
    )
    again = -(-wanted // conf.data.batch_size)
    reach = f" train.accumulate={again} keeps the recipe's batch" if again * conf.data.batch_size == wanted else ""
    if conf.optim.lr_base_batch:
        return f"{text} The rate is scaled to it: peak {peak_optim(conf).lr:.3g}.{reach and reach + '.'}"
    offer = f"optim.lr_base_batch={wanted} scales the rate to it: peak {rate * batch / wanted:.3g}"
    return f"{text} The rate is still {rate:g}; {offer}{reach and ';' + reach}."


def run_curve(conf: Conf, batches_per_epoch: int) -> Curve:
    """The schedule's curve for a run whose epochs have this many micro-batches."""
    steps = -(-batches_per_epoch // conf.train.accumulate)  # the last step of an epoch may have fewer micro-batches
    return Curve.of_run(conf.sched, epochs=conf.train.epochs, steps_per_epoch=steps)
