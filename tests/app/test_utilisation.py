"""The work of a training image, counted by hand, with and without cached activations; the speed that a run shows."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from small_runs import go, small
from tiny import tiny_batches, tiny_model
from tiny_runs import tiny_state

from finetune.app import training, utilisation
from finetune.app.build import build_run
from finetune.config import AugmentConf, Conf, Family, ModelConf, OptimConf, PrefixCache, Recipe, TrainConf
from finetune.core.cost import count_flops
from finetune.core.freezing import set_up_layers
from finetune.core.loop import train_step
from finetune.data import ImageError
from finetune.data.loading.batches import BatchKey, BatchMaker, PixelBatch
from finetune.models import build_model
from finetune.report.columns import DROPPED_FIRST, bar_texts
from finetune.system import progress

CONF = Conf(model=ModelConf(family=Family.vit, name="glyph_vit"), optim=OptimConf(fix_layer=4))


def test_frozen_layers_are_counted_apart() -> None:
    model = build_model(CONF.model, tuple("0123456789"), device="meta").model
    set_up_layers(model, OptimConf(fix_layer=-1), train=CONF.train)
    whole = count_flops(model, 32)
    assert whole.frozen == 0
    set_up_layers(model, CONF.optim, train=CONF.train)
    flops = count_flops(model, 32)
    assert flops.forward == whole.forward
    with torch.device("meta"):
        images = torch.empty(2, 3, 32, 32)
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images, stop=5)
    assert flops.frozen == counter.get_total_flops() / 2
    # Behind the boundary every product comes three times: forward, and two gradients.
    assert flops.training == flops.frozen + 3 * (flops.forward - flops.frozen)


def test_recomputed_work_is_no_use_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "peak", lambda device, dtype: 1e12)  # a processor takes half a minute for it
    counted = []
    for conf in (CONF, dataclasses.replace(CONF, train=TrainConf(recompute=True))):
        run = build_run(conf, tmp_path)
        counted.append(utilisation.measure_utilisation(run.built_again("meta"), 32, device=run.device, dtype=run.dtype))
    assert counted[0].training == counted[1].training


def test_share_of_the_peak() -> None:
    used = utilisation.Utilisation(training=3e9, frozen=2e9, peak=1e12)
    assert used.share(100, hits=0.0) == pytest.approx(0.3)
    assert used.share(100, hits=1.0) == pytest.approx(0.1)


def test_the_peak_goes_by_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [3.0, 0.5, 1.0, *[2.0] * (utilisation.REPEATS - 3)]
    clock = iter([time for elapsed in seconds for time in (0.0, elapsed)])
    monkeypatch.setattr(utilisation, "_now", lambda device: next(clock))
    assert utilisation.peak(torch.device("cpu"), torch.float32, side=8) == 2 * 8**3 / 0.5


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_measuring_draws_nothing_from_the_run() -> None:
    """Else a resumed run would drop out other units than an unbroken one."""
    before = torch.get_rng_state()
    utilisation.peak(torch.device("cpu"), torch.float32, side=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bar_shows_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    used = utilisation.Utilisation(training=3e9, frozen=2e9, peak=1e12)
    state = tiny_state(tiny_model())
    # Built ahead of this very epoch: none was there before, and yet the bar's time holds nothing but what learns.
    feed = Mock(stats=lambda: {"data_wait": 0.02, "prefix_hits": 0.0}, is_cached=True)
    train_step(state, tiny_batches([4], seed=0), TrainConf())
    bar = progress.Bar("train 3/15", total=4, images=400)
    for number, _ in enumerate(bar.wrap(range(4))):
        clock[0] += 0.5
        bar.show(bar_texts(training.bar_numbers(state, bar, feed, used)), dropped_first=DROPPED_FIRST)
        line = terminal.getvalue().split("\r")[-1].rstrip()
        if number == 0:
            assert "mfu" not in line and "wait 2%" in line, "no batch is done, so there is no speed"
        if number == 3:  # 300 images in 2 s, of 1e9 FLOP each
            assert line.endswith("wait 2% cached 0% mfu 15% 150 img/s"), line
            assert len(line) <= 80
            assert "mfu" not in training.bar_numbers(state, bar, feed, None)


@pytest.mark.parametrize("cache", [PrefixCache.none, PrefixCache.ram])
def test_a_run_shows_its_speed_its_wait_and_what_is_cached(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: PrefixCache
) -> None:
    """48 training images; every batch of 8 takes 0.2 s to load, unless its activations are cached."""
    make, terminal = BatchMaker.__getitem__, Terminal()

    def slow(maker: BatchMaker, key: BatchKey) -> PixelBatch | ImageError:
        time.sleep(0.2)
        return make(maker, key)

    monkeypatch.setattr(BatchMaker, "__getitem__", slow)
    monkeypatch.setattr(progress, "REDRAW_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    augment = AugmentConf(recipe=Recipe.none)
    conf = small(stripes, optim__fix_layer=7, augment=augment, data__workers="0", prefix__cache=cache)
    go(conf, tmp_path / "run")
    built = any(line.startswith("frozen layers on train") for line in terminal.getvalue().split("\r"))
    assert built == (cache == PrefixCache.ram)
    bars = [line for line in terminal.getvalue().split("\r") if line.startswith("train 2/2")]
    assert bars and all(len(line.rstrip()) <= 80 for line in bars)
    row = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[1])
    assert row["images_per_s"] > 48 / row["seconds"], "validation is not in it"
    if cache == PrefixCache.none:
        assert 0.5 < row["data_wait"] < 1 and row["prefix_hits"] == 0
        assert row["images_per_s"] < 48 / (6 * 0.2)
        assert re.search(r" wait [5-9]\d% cached 0% \d+ img/s", bars[-1])
    else:
        assert 0 <= row["data_wait"] < 0.5 and row["prefix_hits"] == 1
        assert re.search(r" wait \d+% cached 100% [\d,]+ img/s", bars[-1])
