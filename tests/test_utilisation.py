"""What a training image needs: counted by hand, with what is kept left out; and the share of a peak."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from finetune import utilisation
from finetune.config import Conf, Family, ModelConf, OptimConf, TrainConf
from finetune.cost import count_flops
from finetune.models import build_model
from finetune.parts import build_parts
from finetune.plan import prepare

CONF = Conf(model=ModelConf(family=Family.vit, name="glyph_vit"), optim=OptimConf(fix_layer=4))


def test_frozen_layers_are_counted_apart() -> None:
    model = build_model(CONF.model, tuple("0123456789"), device="meta").model
    prepare(model, dataclasses.replace(CONF, optim=OptimConf(fix_layer=-1)))
    whole = count_flops(model, 32)
    assert whole.frozen == 0
    prepare(model, CONF)
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


def test_recomputed_work_is_no_use_of_a_device(tmp_path: Path) -> None:
    plain = utilisation.measure(build_parts(CONF, tmp_path))
    again = dataclasses.replace(CONF, train=TrainConf(recompute=True))
    assert utilisation.measure(build_parts(again, tmp_path)).training == plain.training


def test_share_of_the_peak() -> None:
    used = utilisation.Utilisation(training=3e9, frozen=2e9, peak=1e12)
    assert used.share(100, hits=0.0) == pytest.approx(0.3)
    assert used.share(100, hits=1.0) == pytest.approx(0.1)


def test_the_peak_of_this_machine() -> None:
    found = utilisation.peak(torch.device("cpu"), torch.float32, side=128)
    assert 1e8 < found < 1e14
