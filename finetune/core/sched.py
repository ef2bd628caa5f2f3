"""The factor on every group's rate: the warmup, a curve over one cycle, and its continuation past the cycle.

A schedule mode is one function of progress t in [0, 1], from 1 down to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import Interval, Mode, PastCycle, SchedulerConf, member_of
from finetune.system.errors import UserError

CURVES: dict[Mode, Callable[[float], float]] = {
    Mode.linear: lambda t: 1 - t,  # 0 only at t = 1, after the last unit of the run
    Mode.cosine: lambda t: math.cos(math.pi / 2 * t),
    Mode.cosine_pi: lambda t: (1 + math.cos(math.pi * t)) / 2,  # SGDR, arXiv:1608.03983, eq. 5, one cycle
}


def lr_factor(t: int, conf: SchedulerConf, num_steps: int) -> float:
    """The factor on every group's peak rate at time `t`, in [0, 1].

    `t` counts units of `conf.interval` from 0, and `num_steps` is the length of the whole run in the same unit. For
    t < warmup the factor is (t + 1) / (warmup + 1); then the curve runs over (t - warmup) / (T - warmup), where T is
    `cycle`, or `num_steps` where that is 0.
    """
    if t < conf.warmup:
        return (t + 1) / (conf.warmup + 1)  # never 0, which would waste the first epoch or step
    cycle = conf.cycle or num_steps
    progress = (t - conf.warmup) / (cycle - conf.warmup)
    # Past the cycle the bare formulas of linear and cosine go negative, which would be gradient ascent.
    past_cycle = member_of(PastCycle, conf.past_cycle, "sched.past_cycle")
    if past_cycle == PastCycle.hold:
        progress = min(progress, 1.0)  # stays at the floor
    elif past_cycle == PastCycle.restart:
        progress %= 1.0  # SGDR: at the top again, without a second warmup
    else:
        progress %= 2.0
        progress = min(progress, 2.0 - progress)  # back up, as torch's CosineAnnealingLR
    # cos(pi/2) is 6e-17 in floating point and could round below 0.
    curve = max(0.0, CURVES[member_of(Mode, conf.mode, "sched.mode")](progress))
    return curve * (1 - conf.scale_min) + conf.scale_min


@dataclass(frozen=True)
class Curve:
    """The factor on every group's peak rate over one run of `epochs`; the schedule's warmup counts in its own unit."""

    sched: SchedulerConf
    epochs: int
    steps_per_epoch: int

    @classmethod
    def of_run(cls, sched: SchedulerConf, *, epochs: int, steps_per_epoch: int, peak_lr: float = 1.0) -> Curve:
        """The curve of a run: `warmup_epochs` becomes whole optimizer steps, and `min_lr` a share of `peak_lr`.

        Raises:
            UserError: `min_lr` is not below `peak_lr`, the head's rate at its peak; or the warmup has no step, or
                as many as the run or the curve.
        """
        given = f"sched.warmup={sched.warmup}"
        if sched.warmup_epochs:
            given = f"sched.warmup_epochs={sched.warmup_epochs:g}"
            steps = round(sched.warmup_epochs * steps_per_epoch)
            if not steps:
                raise UserError(f"{given} would be ignored: it is less than half a step, of {steps_per_epoch} an epoch")
            sched = replace(sched, warmup=steps, warmup_epochs=0.0)
        if sched.min_lr >= peak_lr:
            mend = "lower it, or leave it out"
            raise UserError(f"sched.min_lr={sched.min_lr:g}: must be less than the peak rate, {peak_lr:g}: {mend}")
        if sched.min_lr:
            sched = replace(sched, scale_min=sched.min_lr / peak_lr, min_lr=0.0)
        curve = cls(sched, epochs, steps_per_epoch)
        least = min(sched.cycle or curve.num_units, curve.num_units)
        if sched.warmup >= least:
            whole = "run" if least == curve.num_units else "curve"
            why = f"{sched.warmup} {sched.interval}s of warmup, and the {whole} has {least}"
            raise UserError(f"{given}: {why}; take fewer, or train longer")
        return curve

    @property
    def units_per_epoch(self) -> int:
        """How often the scheduler steps in an epoch: once, or after every optimizer step."""
        return self.steps_per_epoch if self.sched.interval == Interval.step else 1

    @property
    def num_units(self) -> int:
        """Length of the run in the scheduler's unit."""
        return self.epochs * self.units_per_epoch

    def factors(self) -> list[float]:
        """The factor in each unit of the run."""
        return [lr_factor(t, self.sched, self.num_units) for t in range(self.num_units)]


def create_scheduler(cfg: SchedulerConf, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """A `LambdaLR` that multiplies each group's own peak rate by `lr_factor`; `num_steps` is the length of the run.

    It folds an `lr_scale` of a group (see `param_groups_lrd`) into the group's rate, exactly once: LambdaLR ignores it.
    With `interval=epoch` call `scheduler.step()` after train and validate, with `step` after each optimizer step.

    Raises:
        UserError: An unknown word, or numbers that make no curve.
    """
    member_of(Interval, cfg.interval, "sched.interval")
    member_of(Mode, cfg.mode, "sched.mode")
    member_of(PastCycle, cfg.past_cycle, "sched.past_cycle")
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps}: a schedule needs at least one {cfg.interval}")
    if cfg.cycle < 0:
        raise UserError(f"sched.cycle={cfg.cycle}: must be 0 (the whole run) or more")
    if not 0 <= cfg.scale_min <= 1:
        raise UserError(f"sched.scale_min={cfg.scale_min}: must be between 0 and 1")
    if cfg.warmup_epochs:
        given = f"sched.warmup_epochs={cfg.warmup_epochs:g}"
        raise UserError(f"{given}: only a run knows its steps an epoch; give `warmup` in {cfg.interval}s")
    if cfg.min_lr:
        raise UserError(f"sched.min_lr={cfg.min_lr:g}: only a run knows its peak rate; give `scale_min`, a share of it")
    length = cfg.cycle or num_steps
    if not 0 <= cfg.warmup < length:
        curve = f"the length of the curve, {length} {cfg.interval}s"
        raise UserError(f"sched.warmup={cfg.warmup}: needs 0 or more, less than {curve}")
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            group["lr"] *= group.pop("lr_scale")  # removed, so that no second scheduler folds it again
    return LambdaLR(optimizer, lambda t: lr_factor(t, cfg, num_steps))
