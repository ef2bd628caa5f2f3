"""Every parameter is owned once; freezing is by id; a frozen layer stays in eval mode."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny import TinyNet, tiny_batches, tiny_layers, tiny_model

from finetune.core.freezing import freeze
from finetune.core.layers import Layer, LayeredModel
from finetune.core.ownership import assign_layers


def test_whole_and_split_equal_upstream() -> None:
    model = tiny_model().eval()
    images = tiny_batches([5])[0][0]
    whole = model.net(images)
    assert torch.equal(model(images), whole)
    for k in range(1, 5):
        assert torch.equal(model(model(images, stop=k), start=k), whole)


def test_every_parameter_has_one_layer_and_ids_rise() -> None:
    model = tiny_model()
    assert list(model.layer_ids) == [*dict(model.net.named_parameters()), *dict(model.net.named_buffers())]
    assert sorted(set(model.layer_ids.values())) == [0, 1, 2, 3, 4]
    assert model.layer_ids["pos_embed"] == 0
    assert model.num_blocks == 2


def test_the_state_dict_of_net_is_upstreams_own() -> None:
    assert list(tiny_model().net.state_dict()) == list(TinyNet().state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layers: [*layers[:3], Layer("readout", (), None), *layers[4:]], ["norm", "no layer"]),
        (lambda layers: [*layers[:3], Layer("readout", ("norm", "head"), None), *layers[4:]], ["head", "two layers"]),
        (
            lambda layers: [*layers[:1], Layer("block.1", ("blocks",), None), *layers[2:]],
            ["blocks.1", "block.1 and block.2"],
        ),
        (lambda layers: [*layers[:3], Layer("readout", ("norm", "nrom"), None), *layers[4:]], ["nrom", "lacks"]),
    ],
)
def test_a_name_without_exactly_one_layer_is_an_error(change: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        assign_layers(TinyNet(), change(tiny_layers()))  # type: ignore[operator]
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("fix_layer", range(-1, 4))
def test_freeze_counts_from_the_stem(fix_layer: int) -> None:
    model = tiny_model()
    freeze(model, fix_layer)
    for name, parameter in model.net.named_parameters():
        assert parameter.requires_grad == (model.layer_ids[name] > fix_layer)
    freeze(model, -1)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fix_layer", [-2, 4, 9])
def test_freezing_everything_names_the_range(fix_layer: int) -> None:
    with pytest.raises(ValueError, match=rf"fix_layer={fix_layer} .*use -1 .*to 3"):
        freeze(tiny_model(), fix_layer)


def test_frozen_layers_stay_in_eval_mode_and_batchnorm_does_not_drift() -> None:
    model = tiny_model(batch_norm=True)
    freeze(model, 1)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.net.named_buffers()}
    model(tiny_batches([8])[0][0])
    for name, buffer in model.net.named_buffers():
        assert torch.equal(buffer, before[name]) == (model.layer_ids[name] <= 1), name
    assert not model.net.stem.training
    assert model.net.head.training


def test_gradients_stop_at_the_boundary() -> None:
    model = tiny_model()
    freeze(model, 1)
    images = tiny_batches([4])[0][0]
    assert not model(images, stop=2).requires_grad
    model(images).sum().backward()
    for name, parameter in model.net.named_parameters():
        assert (parameter.grad is None) == (model.layer_ids[name] <= 1), name


@pytest.mark.parametrize("fix_layer", [-1, 1])
def test_recompute_gives_the_same_gradients(fix_layer: int) -> None:
    images = tiny_batches([4])[0][0]
    gradients = []
    for recompute in (False, True):
        model = tiny_model(dropout=0.3)
        freeze(model, fix_layer)
        model.train()
        model.recompute = recompute
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_copied_model_runs_its_own_weights() -> None:
    model = tiny_model().eval()
    twin = copy.deepcopy(model)
    images = tiny_batches([2])[0][0]
    with torch.no_grad():
        twin.net.head.weight.zero_()
        twin.net.head.bias.zero_()
    assert torch.equal(twin(images), torch.zeros(2, 3))
    assert not torch.equal(model(images), torch.zeros(2, 3))


def test_an_architecture_that_is_no_chain_runs_whole_and_refuses_slices() -> None:
    torch.manual_seed(0)
    model = LayeredModel(TinyNet(), [dataclasses.replace(layer, run=None) for layer in tiny_layers()]).eval()
    images = tiny_batches([2])[0][0]
    assert torch.equal(model(images), model.net(images))
    with pytest.raises(ValueError, match="no plain chain"):
        model(images, stop=2)
