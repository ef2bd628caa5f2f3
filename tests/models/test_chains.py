"""A network run layer by layer gives upstream's bits, whole and in slices; frozen layers do not change."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from first_use import check_layers
from small import ALL, CHAINS, CLASSES, WHOLE, small_images, small_model
from torch import Tensor

import finetune.core.recompute
from finetune.config import OptimConf
from finetune.config.words.configuration import compose
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.optim import build_optimizer
from finetune.models import build_model
from finetune.models.layering.running import class_name
from finetune.models.layering.towers import CHAINS as REGISTRY

warnings.filterwarnings("ignore")

PRESETS = sorted(path.stem for path in (Path(__file__).parent.parent.parent / "conf" / "model").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cuts(model: LayeredModel) -> list[int]:
    return list(range(1, len(model.layers)))


@pytest.mark.parametrize("name", CHAINS)
def test_whole_and_split_equal_upstream_in_eval_mode(name: str) -> None:
    model, images = small_model(name).eval(), small_images(name)
    assert model.is_chain
    with torch.no_grad():
        expected = model.net(images)
        assert torch.equal(model(images), expected)
        h = images
        for k in cuts(model):
            h = model(h, start=k - 1, stop=k)
            assert isinstance(h, Tensor)
            assert torch.equal(model(h, start=k), expected), f"cut at {k}"


@pytest.mark.parametrize("name", CHAINS)
def test_whole_and_split_equal_upstream_in_train_mode(name: str) -> None:
    upstream, images = small_model(name).train(), small_images(name)
    for k in (None, *cuts(upstream)[:: max(1, len(cuts(upstream)) // 3)]):
        ours, theirs = copy.deepcopy(upstream), copy.deepcopy(upstream)
        torch.manual_seed(7)
        expected = theirs.net(images)
        drawn = torch.get_rng_state()
        torch.manual_seed(7)
        out = ours(images) if k is None else ours(ours(images, stop=k), start=k)
        assert torch.equal(out, expected)
        assert torch.equal(torch.get_rng_state(), drawn)
        for (key, mine), other in zip(ours.net.named_buffers(), theirs.net.buffers(), strict=True):
            assert torch.equal(mine, other), key


@pytest.mark.parametrize("name", WHOLE)
def test_others_run_whole_and_say_why_not_in_slices(name: str) -> None:
    model, images = small_model(name).eval(), small_images(name)
    assert not model.is_chain
    assert torch.equal(model(images), model.net(images))
    with pytest.raises(ValueError, match="runs only whole"):
        model(images, stop=1)


def test_a_rotary_tower_of_free_size_refuses_images_that_are_not_square() -> None:
    model = small_model("dinov3").eval()
    with pytest.raises(ValueError, match="square"):
        model(torch.randn(1, 3, 32, 64))
    assert torch.equal(model(torch.zeros(1, 3, 48, 48)), model.net(torch.zeros(1, 3, 48, 48)))


def gradients(model: LayeredModel, images: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(3)
    F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES).backward()
    return {name: parameter.grad for name, parameter in model.net.named_parameters()}


@pytest.mark.parametrize("name", ["vit", "eva02", "beit-shared-table", "convnext", "resnet", "tv-vit", "clip-resnet"])
@pytest.mark.parametrize("fix_layer", [-1, 1])
def test_gradient_checkpointing_changes_no_gradient(name: str, fix_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, images = small_model(name).train(), small_images(name)
    freeze(plain, fix_layer)
    model = copy.deepcopy(plain)
    model.recompute = True
    calls = []
    original = finetune.core.recompute.checkpoint

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(kwargs["use_reentrant"])
        return original(*args, **kwargs)

    monkeypatch.setattr(finetune.core.recompute, "checkpoint", counted)
    expected, found = gradients(plain, images), gradients(model, images)
    # Non-reentrant, and only in layers that learn: frozen layers store no activations for a backward pass.
    assert calls == [False] * (len(model.layers) - fix_layer - 1)
    for key, gradient in expected.items():
        assert (gradient is None) == (model.layer_ids[key] <= fix_layer)
        assert gradient is None or torch.equal(found[key], gradient), key
    for (key, mine), other in zip(model.net.named_buffers(), plain.net.buffers(), strict=True):
        assert torch.equal(mine, other), key


def step(model: LayeredModel, images: Tensor, conf: OptimConf) -> None:
    optimizer = build_optimizer(model, conf)
    F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["resnet", "efficientnet", "tv-resnet", "tv-efficientnet", "clip-resnet"])
def test_batch_statistics_of_frozen_layers_do_not_move(name: str) -> None:
    model = small_model(name)
    freeze(model, 2)
    model.train()
    before = {key: value.clone() for key, value in model.net.named_buffers()}
    step(model, small_images(name), OptimConf(fix_layer=2))
    means = [key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert any(model.layer_ids[key] <= 2 for key in means) and any(model.layer_ids[key] > 2 for key in means)
    for key, value in model.net.named_buffers():
        assert torch.equal(value, before[key]) == (model.layer_ids[key] <= 2 or key not in means), key


FAMILIES = [
    *("vit", "deit-distilled", "dinov3", "beit-own-tables", "convnext", "resnet", "efficientnet", "maxvit", "nfnet"),
    *("relpos", "tv-vit", "tv-swin", "tv-efficientnet", "clip-vit", "clip-resnet", "clip-timm-siglip"),
]


# Each of these takes seconds, and another family above has the same kind of layers.
LARGE = ("maxvit", "relpos", "clip-timm-siglip")


def without_dropped_paths(model: LayeredModel) -> LayeredModel:
    """Drop path in eval mode: a branch dropped for all images would have no gradient, and its parameters not move."""
    for module in model.modules():
        if type(module).__name__ in ("DropPath", "StochasticDepth"):
            module.eval()
    return model


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in FAMILIES])
def test_one_step_moves_what_is_above_fix_layer_and_nothing_else(name: str) -> None:
    images = small_images(name, batch=2)
    first = small_model(name)
    top = first.num_blocks + 1
    for fix_layer, layer_decay in [(-1, 0.5), (0, 1.0), (top // 2, 0.9), (top - 1, 0.65), (top, 0.75)]:
        model = copy.deepcopy(first)
        freeze(model, fix_layer)
        conf = OptimConf(lr=1e-2, layer_decay=layer_decay, fix_layer=fix_layer)
        torch.manual_seed(5)
        step(without_dropped_paths(model.train()), images, conf)
        old = dict(first.net.named_parameters())
        for key, parameter in model.net.named_parameters():
            moved = not torch.equal(parameter, old[key])
            assert moved == (model.layer_ids[key] > fix_layer), f"{key}, fix_layer={fix_layer}"


def test_the_families_are_enough() -> None:
    assert len(FAMILIES) >= 10 and set(FAMILIES) <= set(ALL)


def test_every_family_of_the_registry_has_a_small_network_here() -> None:
    """So the tests above take a new family too. If this fails, add a small network to `CHAINS` in tests/small.py."""
    tested = {class_name(module) for name in CHAINS for module in small_model(name).net.modules()}
    assert not REGISTRY.keys() - tested


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_is_cut_into_layers(preset: str) -> None:
    built = build_model(compose([f"model={preset}"]).model, ["a", "b"], device="meta")
    check_layers(built.model.net, list(built.model.layers))
    assert built.model.is_chain
