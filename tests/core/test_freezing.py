"""Freezing by names beside freezing by layers: one list of layers says what learns, runs apart, and is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.config import ClassTokenOnly, OptimConf, PrefixConf, TrainConf
from finetune.config.conf import Conf, find_problems
from finetune.core.ema import Ema
from finetune.core.freezing import freeze, set_up_layers
from finetune.core.layers import Layer, LayeredModel
from finetune.core.optim import param_groups
from finetune.core.plan import layer_rows
from finetune.core.rates import rate_table
from finetune.prefix.frozen import FrozenPrefix


class Net(nn.Module):
    """A stem of a convolution and a token, a block with BatchNorm and dropout, an empty readout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.token = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)


def model() -> LayeredModel:
    torch.manual_seed(0)
    layers = [
        Layer("stem", ("conv", "token"), lambda net, x: net.conv(x) + net.token),
        Layer("block.1", ("block",), lambda net, h: net.block(h)),
        Layer("readout", ("pool",), lambda net, h: net.pool(h).flatten(1)),
        Layer("head", ("head",), lambda net, h: net.head(h)),
    ]
    return LayeredModel(Net(), layers)


def learning(layered: LayeredModel) -> set[str]:
    return {name for name, parameter in layered.net.named_parameters() if parameter.requires_grad}


def test_a_part_of_a_layer_is_frozen_and_the_layer_still_learns() -> None:
    layered = model().train()
    everything = learning(layered)
    freeze(layered, -1, ["conv.*"])
    assert learning(layered) == everything - {"conv.weight", "conv.bias"}
    assert layered.num_frozen == layered.boundary == 0
    rows = layer_rows(layered, rate_table(layered, OptimConf()))
    assert [row["state"] for row in rows] == ["learns", "learns", "empty", "learns"]
    assert (rows[0]["parameters"], rows[0]["learning"]) == (3 * 4 * 4 + 4 + 4, 4)
    names = {name for group in param_groups(layered, OptimConf()) for name in group["param_names"]}
    assert names == learning(layered)
    assert set(Ema(layered, 0.9).state_dict()) >= names and "conv.weight" not in Ema(layered, 0.9).state_dict()
    freeze(layered, -1)
    assert learning(layered) == everything and not layered.frozen_modules


def test_a_layer_of_which_nothing_learns_counts_as_frozen() -> None:
    by_id, by_name = model(), model()
    freeze(by_id, 0)
    freeze(by_name, -1, ["conv.weight", "conv.bias", "tok*"])
    assert by_name.num_frozen == by_name.boundary == by_id.num_frozen == 1
    assert learning(by_name) == learning(by_id)
    assert layer_rows(by_name, rate_table(by_name, OptimConf())) == layer_rows(by_id, rate_table(by_id, OptimConf()))
    images = torch.randn(2, 3, 4, 4)
    prefix = FrozenPrefix(by_name, batch_size=2, autocast=torch.autocast("cpu", enabled=False), dtype=torch.float32)
    assert torch.equal(by_name.eval()(prefix(images), start=1), by_id.eval()(images))
    both = model()
    freeze(both, 0, ["block.*"])  # the prefix goes on over the block and the readout, which has nothing to learn
    assert (both.num_frozen, learning(both)) == (3, {"head.weight", "head.bias"})


def test_a_frozen_layer_above_one_that_learns_is_no_prefix_but_rests() -> None:
    layered = model().train()
    freeze(layered, -1, ["block.*"])
    assert layered.num_frozen == 0
    assert [row["state"] for row in layer_rows(layered, rate_table(layered, OptimConf()))][1] == "frozen"
    norm = layered.net.get_submodule("block.1")
    before = norm.running_mean.clone()  # type: ignore[union-attr,operator]
    for _ in range(3):
        layered.train()
        layered(torch.randn(5, 3, 4, 4)).sum().backward()
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
    assert not layered.net.get_submodule("block.2").training  # its dropout too
    assert layered.net.get_parameter("conv.weight").grad is not None  # the gradient passes through


def test_a_batchnorm_frozen_by_name_keeps_its_statistics_and_dropout_beside_it_stays() -> None:
    layered = model().train()
    freeze(layered, -1, ["*block.1.*"])
    norm, dropout = layered.net.get_submodule("block.1"), layered.net.get_submodule("block.2")
    assert not norm.training and dropout.training
    layered.eval()
    layered.train()
    assert not norm.training and dropout.training


@pytest.mark.parametrize(
    ("globs", "words"),
    [
        (["conv2.*"], ["optim.freeze: 'conv2.*' matches no parameter", "did you mean 'conv.*'?"]),
        (["conv.*", "head.wieght"], ["'head.wieght'", "did you mean 'head.weight'?"]),
        (["block"], ["'block'", "block."]),
        (["*"], ["optim.freeze=['*'] leaves nothing to learn"]),
    ],
)
def test_a_glob_that_fits_nothing_or_everything_is_an_error(globs: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"optim\.freeze") as caught:
        set_up_layers(model(), OptimConf(freeze=globs), train=TrainConf(class_token_only=ClassTokenOnly.off))
    for word in words:
        assert word in str(caught.value)


def test_a_glob_beside_fix_layer_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        freeze(model(), 2, ["head.*"])


def test_settings_of_the_prefix_count_where_only_names_are_frozen() -> None:
    assert find_problems(Conf(prefix=PrefixConf(max_gib=3.0)))
    assert not find_problems(Conf(prefix=PrefixConf(max_gib=3.0), optim=OptimConf(freeze=["*"])))
