"""Schedules equal their formulas at every t: inside the cycle, past it, with warmup and a floor."""

from __future__ import annotations

import math

import pytest
import torch

from finetune import SchedulerConf, create_scheduler
from finetune.core.sched import lr_factor

FORMULAS = {
    "linear": lambda t, cycle: 1 - t / cycle,
    "cosine": lambda t, cycle: math.cos(math.pi / 2 * t / cycle),
    "cosine_pi": lambda t, cycle: 0.5 + 0.5 * math.cos(math.pi * t / cycle),
}


def factors(num_steps: int, upto: int, **conf: object) -> list[float]:
    return [lr_factor(t, SchedulerConf(**conf), num_steps) for t in range(upto)]


@pytest.mark.parametrize("mode", FORMULAS)
@pytest.mark.parametrize("scale_min", [0.0, 0.1, 1.0])
def test_inside_the_cycle_each_mode_is_its_formula(mode: str, scale_min: float) -> None:
    for t in range(13):
        r = FORMULAS[mode](t, 12)
        expected = r * (1 - scale_min) + scale_min
        for conf, num_steps in (
            (SchedulerConf(mode=mode, scale_min=scale_min), 12),
            (SchedulerConf(mode=mode, scale_min=scale_min, cycle=12), 99),
        ):
            assert lr_factor(t, conf, num_steps) == pytest.approx(expected, abs=1e-15)


def test_hand_computed_tables() -> None:
    half = math.sqrt(0.5)
    assert factors(4, 9, mode="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0.25, 0.5, 0.75, 1])
    assert factors(99, 9, mode="linear", cycle=4, past_cycle="restart") == pytest.approx(
        [1, 0.75, 0.5, 0.25, 1, 0.75, 0.5, 0.25, 1]
    )
    assert factors(99, 7, mode="linear", cycle=4, past_cycle="hold", scale_min=0.2) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    )
    assert factors(4, 9, mode="cosine") == pytest.approx(
        [
            1,
            math.cos(math.pi / 8),
            half,
            math.cos(3 * math.pi / 8),
            0,
            math.cos(3 * math.pi / 8),
            half,
            math.cos(math.pi / 8),
            1,
        ],
        abs=1e-15,
    )
    assert factors(6, 7, mode="cosine_pi", warmup=2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5 + half / 2, 0.5, 0.5 - half / 2, 0], abs=1e-15
    )
    # After the warmup the curve takes what is left of the cycle; a restart starts at the top, without a warmup.
    assert factors(99, 7, mode="linear", cycle=4, warmup=2, past_cycle="restart") == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5, 1, 0.5, 1]
    )


def test_cosine_pi_past_the_cycle_is_its_own_formula() -> None:
    for t in range(40):
        assert lr_factor(t, SchedulerConf(mode="cosine_pi", cycle=7), 40) == pytest.approx(
            FORMULAS["cosine_pi"](t, 7), abs=1e-14
        )


@pytest.mark.parametrize("mode", FORMULAS)
@pytest.mark.parametrize("past_cycle", ["mirror", "restart", "hold"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_never_negative_never_above_one(mode: str, past_cycle: str, warmup: int) -> None:
    for cycle in (4, 7, 0):
        for value in factors(20, 60, mode=mode, past_cycle=past_cycle, warmup=warmup, cycle=cycle):
            assert 0 <= value <= 1


def test_the_scheduler_multiplies_each_groups_own_rate() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    peaks = [1e-3, 5e-4, 1e-5]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": lr} for w, lr in zip(weights, peaks, strict=True)])
    conf = SchedulerConf(mode="cosine_pi")
    scheduler = create_scheduler(conf, optimizer, 5)
    for t in range(8):
        assert [group["lr"] for group in optimizer.param_groups] == [peak * lr_factor(t, conf, 5) for peak in peaks]
        optimizer.step()
        scheduler.step()


def test_a_group_that_carries_lr_scale_has_it_folded_in_exactly_once() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": [weights[0]], "lr_scale": 0.25}, {"params": [weights[1]], "lr_scale": 1.0}], lr=0.1
    )
    scheduler = create_scheduler(SchedulerConf(), optimizer, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1]
    assert all("lr_scale" not in group for group in optimizer.param_groups)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025 * 0.75, 0.1 * 0.75], rel=1e-15)


@pytest.mark.parametrize(
    ("conf", "num_steps", "words"),
    [
        (SchedulerConf(mode="cosin"), 5, ["sched.mode=cosin", "linear, cosine, cosine_pi", "did you mean 'cosine'"]),
        (SchedulerConf(interval="epochs"), 5, ["sched.interval=epochs", "did you mean 'epoch'"]),
        (SchedulerConf(past_cycle="bounce"), 5, ["sched.past_cycle=bounce", "mirror, restart, hold"]),
        (SchedulerConf(cycle=-1), 5, ["sched.cycle=-1"]),
        (SchedulerConf(scale_min=1.5), 5, ["sched.scale_min=1.5"]),
        (SchedulerConf(warmup=5), 5, ["sched.warmup=5", "less than the length of the curve, 5"]),
        (SchedulerConf(), 0, ["num_steps=0"]),
    ],
)
def test_what_makes_no_curve_is_refused(conf: SchedulerConf, num_steps: int, words: list[str]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError) as error:
        create_scheduler(conf, optimizer, num_steps)
    for word in words:
        assert word in str(error.value)
