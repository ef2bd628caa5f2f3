"""From a recipe's numbers to this run's: the rate for its batch, the warmup in its steps. Confs are never changed.

Standard library only.
"""

from __future__ import annotations

import dataclasses

from finetune.config import Conf, Interval, OptimConf, SchedulerConf


def effective_batch(conf: Conf) -> int:
    """Images an optimizer step learns from."""
    return conf.data.batch_size * conf.train.accumulate


def peak_lr(conf: Conf) -> float:
    """The head's peak rate: `optim.lr`, in proportion to the batch where `optim.lr_base_batch` is above 0.

    The linear rule of Goyal et al., arXiv:1706.02677, section 2.1; MAE's `blr` has the base 256.
    """
    base = conf.optim.lr_base_batch
    return conf.optim.lr * effective_batch(conf) / base if base else conf.optim.lr


def scaled_optim(conf: Conf) -> OptimConf:
    """`conf.optim` with the peak rate as an absolute number."""
    return dataclasses.replace(conf.optim, lr=peak_lr(conf), lr_base_batch=0)


def steps_per_epoch(conf: Conf, batches_per_epoch: int) -> int:
    """Optimizer steps an epoch; the last one may have fewer micro-batches."""
    return -(-batches_per_epoch // conf.train.accumulate)


def timed_sched(sched: SchedulerConf, steps: int) -> SchedulerConf:
    """`sched` with `warmup_epochs` turned into whole optimizer steps, of which an epoch has `steps`."""
    if not sched.warmup_epochs:
        return sched
    return dataclasses.replace(sched, warmup=round(sched.warmup_epochs * steps), warmup_epochs=0.0)


def num_units(conf: Conf, steps: int) -> int:
    """Length of the run in the scheduler's unit, where an epoch has `steps` optimizer steps."""
    return conf.train.epochs * (steps if conf.sched.interval == Interval.step else 1)


def batch_notice(conf: Conf) -> str | None:
    """What to say, loudly, where a recipe's rate meets another batch than it was tuned for; None where it does not.

    FT-CLIP's 6e-4 at 2048 images a step, run with 32, trains to chance: its best-known issue.
    """
    wanted, batch = conf.optim.recipe_batch, effective_batch(conf)
    if wanted in (0, batch):
        return None
    text = (
        f"BATCH: this run learns from {batch} images a step (data.batch_size={conf.data.batch_size} x"
        f" train.accumulate={conf.train.accumulate}), and its recipe was tuned for {wanted}."
    )
    again = -(-wanted // conf.data.batch_size)
    reach = f" train.accumulate={again} keeps the recipe's batch" if again * conf.data.batch_size == wanted else ""
    if conf.optim.lr_base_batch:
        scaled = f" The rate is scaled to it: peak {peak_lr(conf):.3g}."
        return text + scaled + (reach and f"{reach}.")
    offer = f"optim.lr_base_batch={wanted} scales the rate to it: peak {conf.optim.lr * batch / wanted:.3g}"
    kept = f" The rate is still {conf.optim.lr:g};"
    return f"{text}{kept} {offer}{';' + reach if reach else ''}."
