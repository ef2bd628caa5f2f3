"""Every setting of the schedule: how the learning rates change during a run. Standard library only."""

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, setting


class Mode(Choice):
    """Shape of the rate curve over one cycle, as a function of progress t in [0, 1]."""

    linear = "linear"
    cosine = "cosine"
    cosine_pi = "cosine_pi"


class Interval(Choice):
    """How often the scheduler steps, and so the unit of `cycle` and `warmup`."""

    epoch = "epoch"
    step = "step"


class PastCycle(Choice):
    """What the rate does after the cycle has ended."""

    mirror = "mirror"
    restart = "restart"
    hold = "hold"


@dataclass
class SchedulerConf:
    """The factor on every group's rate over time. Plain strings serve for enums: `SchedulerConf(mode="cosine_pi")`."""

    mode: Mode = setting(Mode.linear, "linear: 1 - t; cosine: cos(pi/2 t); cosine_pi: (1 + cos(pi t)) / 2, t in [0, 1]")
    cycle: int = setting(0, "length of the curve in units of `interval`; 0: the whole run", ge=0)
    scale_min: float = setting(0.0, "floor of the factor: r becomes r * (1 - scale_min) + scale_min", ge=0, le=1)
    min_lr: float = setting(0.0, "the same floor as a rate of the head: scale_min is min_lr / peak rate; 0: none", ge=0)
    interval: Interval = setting(Interval.epoch, "epoch: step once after each epoch; step: once an optimizer step")
    warmup: int = setting(0, "units ahead of the curve in which the factor rises as (t + 1) / (warmup + 1)", ge=0)
    warmup_epochs: float = setting(0.0, "interval=step: the warmup in epochs, also 0.5; 0: as `warmup` says", ge=0)
    past_cycle: PastCycle = setting(PastCycle.mirror, "mirror: back up; restart: from the top; hold: stay at the floor")


def sched_problems(sched: SchedulerConf, epochs: int) -> list[str]:
    """Why this schedule does not fit a run of `epochs` epochs: one line, or none.

    With `interval=step` the length of the run depends on the data, so `Curve.of_run` checks the warmup again.
    """
    if sched.min_lr and sched.scale_min:
        return [f"sched.min_lr={sched.min_lr:g} and sched.scale_min={sched.scale_min:g} say the same: leave one out"]
    is_by_epoch = sched.interval == Interval.epoch
    length = min(sched.cycle or epochs, epochs) if is_by_epoch else sched.cycle
    given = f"sched.warmup_epochs={sched.warmup_epochs:g}"
    if sched.warmup_epochs and is_by_epoch:
        return [f"{given}: with sched.interval=epoch say sched.warmup, in whole epochs; or use sched.interval=step"]
    if sched.warmup_epochs and sched.warmup:
        return [f"sched.warmup={sched.warmup} and {given} say the same: leave one out"]
    if sched.warmup_epochs >= epochs:
        return [f"{given}: must be less than the run, train.epochs={epochs}"]
    if length > 0 and sched.warmup >= length:
        curve = f"the length of the curve, {length} {sched.interval}s"
        return [f"sched.warmup={sched.warmup}: must be less than {curve}"]
    is_within = not sched.cycle or (is_by_epoch and sched.cycle >= epochs)
    reason = f"sched.cycle={sched.cycle or '0 (the whole run)'} ends no sooner than the run"
    return ignored("sched", sched, {"past_cycle": reason} if is_within else {})
