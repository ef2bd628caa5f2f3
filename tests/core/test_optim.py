"""Groups cover every learning parameter once, rates are baked by the published rule, and a step is AdamW's."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_batches, tiny_model

from finetune.config import OptimConf
from finetune.core.freezing import freeze
from finetune.core.optim import build_optimizer, param_groups
from finetune.core.rates import distance_to_output
from finetune.core.weight_decay import is_decayed


def test_distances_fall_from_the_stem_to_the_output() -> None:
    assert [distance_to_output(i, 6) for i in range(9)] == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    # ViT-B/16 with BEiT's 0.65: the stem learns at 0.65 ** 13.
    assert distance_to_output(0, 12) == 13


@pytest.mark.parametrize("fix_layer", range(-1, 4))
def test_every_learning_parameter_is_in_exactly_one_group(fix_layer: int) -> None:
    model = tiny_model()
    freeze(model, fix_layer)
    groups = param_groups(model, OptimConf(lr=0.1, layer_decay=0.5))
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(n for n, p in model.net.named_parameters() if p.requires_grad)
    assert len({id(p) for group in groups for p in group["params"]}) == len(names)
    for group in groups:
        assert group["lr"] == 0.1 * 0.5 ** (3 - min(group["layer_id"], 3))
        assert "lr_scale" not in group
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert model.layer_ids[name] == group["layer_id"]
            decays = parameter.ndim > 1 and name != "pos_embed"
            assert group["weight_decay"] == (0.05 if decays else 0.0)
            assert group["name"] == f"{group['layer']}.{'decay' if decays else 'no_decay'}"


def test_weight_decay_spares_vectors_scalars_tokens_and_globs() -> None:
    matrix, vector, scalar = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), ()))
    assert is_decayed("visual.proj", matrix, [])
    assert not is_decayed("blocks.0.norm1.weight", vector, [])
    assert not is_decayed("logit_scale", scalar, [])
    for name in ("visual.positional_embedding", "visual.class_embedding", "cls_token", "trunk.pos_embed", "reg_token"):
        assert not is_decayed(name, matrix, [])
    assert not is_decayed("blocks.0.attn.qkv.weight", matrix, ["*qkv*"])


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no_weight_decay: '\*qvk\*' matches no parameter"):
        param_groups(tiny_model(), OptimConf(no_weight_decay=["*qvk*"]))


def test_one_adamw_step_equals_a_hand_computation() -> None:
    model = tiny_model()
    conf = OptimConf(lr=0.01, layer_decay=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, conf)
    images, labels, _ = tiny_batches([6])[0]
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    before = {
        name: (p.detach().clone().double(), p.grad.double())
        for name, p in model.net.named_parameters()
        if p.grad is not None
    }
    optimizer.step()
    for name, parameter in model.net.named_parameters():
        weight, gradient = before[name]
        rate = 0.01 * 0.5 ** (3 - min(model.layer_ids[name], 3))
        if parameter.ndim > 1 and name != "pos_embed":
            weight = weight * (1 - rate * 0.1)
        mean, square = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
        expected = weight - rate * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)
        assert math.isfinite(parameter.sum().item())
