"""One table of rates: everybody who shows or uses a rate reads `rate_table`, and the table is short enough to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model

from finetune.config import Interval, OptimConf, SchedulerConf
from finetune.core import rates
from finetune.core.freezing import freeze
from finetune.core.optim import build_optimizer
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.rates import rate_table, with_peak_rate
from finetune.core.sched import Curve
from finetune.models.param_groups import param_groups_lrd

CONF = OptimConf(lr=0.1, layer_decay=0.5)


def test_optimizer_layers_plan_and_param_groups_hold_the_tables_rates() -> None:
    model = tiny_model()
    freeze(model, 0)
    table = rate_table(model, CONF)
    peaks = {name: row.peak for row in table for name in row.param_names}
    assert peaks["head.weight"] == 0.1 and peaks["blocks.0.0.weight"] == 0.1 * 0.5**2
    groups = build_optimizer(model, CONF).param_groups
    assert {name: group["lr"] for group in groups for name in group["param_names"]} == peaks
    groups, names = param_groups_lrd(model, 0, CONF.weight_decay, layer_decay=0.5, lr=0.1)
    found = {n: g["lr"] for key, g in zip(names, groups, strict=True) for n in names[key]["params"]}
    assert found == {f"net.{name}": peak for name, peak in peaks.items()}
    layers = layer_rows(model, table)
    assert [row["state"] for row in layers] == ["frozen", "learns", "learns", "learns", "learns"]
    assert [row["rate_peak"] for row in layers] == [0.0, 0.1 * 0.5**2, 0.05, 0.1, 0.1]
    plan = planned_rates(layers, Curve.of_run(SchedulerConf(mode="linear"), epochs=2, steps_per_epoch=3))
    assert plan["x"] == [0.0, 1.0] and plan["frozen"] == ["stem"]
    assert plan["layers"]["block.2"] == [0.05, 0.025]


def test_a_rate_by_steps_has_a_point_for_each_step_of_the_run() -> None:
    model = tiny_model()
    curve = Curve.of_run(SchedulerConf(interval=Interval.step), epochs=2, steps_per_epoch=4)
    plan = planned_rates(layer_rows(model, rate_table(model, CONF)), curve)
    assert plan["x"] == [t / 4 for t in range(8)]
    long = Curve.of_run(SchedulerConf(interval=Interval.step), epochs=10, steps_per_epoch=1000)
    assert len(planned_rates(layer_rows(model, rate_table(model, CONF)), long)["x"]) == 2000


@pytest.mark.parametrize(("base", "peak"), [(0, 0.1), (64, 0.4), (256, 0.1)])
def test_the_peak_rate_follows_the_batch(base: int, peak: float) -> None:
    conf = with_peak_rate(OptimConf(lr=0.1, lr_base_batch=base), 256)
    assert (conf.lr, conf.lr_base_batch) == (peak, 0)


def test_where_a_rate_comes_from_is_at_most_220_lines() -> None:
    room = Path(rates.__file__).parent
    assert sum(len((room / name).read_text(encoding="utf-8").splitlines()) for name in ("rates.py", "sched.py")) <= 220
