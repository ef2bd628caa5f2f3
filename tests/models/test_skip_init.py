"""A network whose weights come from a file is built without random values, and equals one built with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.upstream.skip_init import SkipInit, built_from_weights

VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize("name", [VIT, "beit_base_patch16_224", "eva02_tiny_patch14_224", "convnext_atto", "resnet18"])
def test_no_parameter_of_a_network_is_drawn(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with SkipInit():
        net = timm.create_model(name, num_classes=3)
    assert torch.equal(torch.get_rng_state(), before)
    random = [p for p in net.parameters() if p.isnan().any()]
    assert random and all(p.isnan().all() for p in random)
    assert sum(p.numel() for p in random) > 0.9 * sum(p.numel() for p in net.parameters())


def test_outside_everything_is_as_ever() -> None:
    with SkipInit():
        nn.Linear(3, 3)
    torch.manual_seed(0)
    one = nn.Linear(3, 3).weight
    torch.manual_seed(0)
    assert torch.equal(one, nn.Linear(3, 3).weight) and one.isfinite().all()


def test_what_was_set_after_it_was_drawn_can_be_changed() -> None:
    with SkipInit():
        weight = nn.Linear(3, 3).weight
        with torch.no_grad():
            weight.fill_(1.0).mul_(0.5)
    assert (weight == 0.5).all()


def test_what_the_weights_leave_at_random_is_random() -> None:
    """If the weights leave parameters out, the network is built again with random values."""
    built = 0

    def build() -> nn.Module:
        nonlocal built
        built += 1
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
        return net

    torch.manual_seed(0)
    net = built_from_weights(build)
    assert built == 2 and all(p.isfinite().all() for p in net.parameters())
    assert built_from_weights(lambda: net) is net


@pytest.mark.parametrize("head", [HeadKind.keep, HeadKind.random])
def test_a_model_from_a_file_has_the_files_values(tmp_path: Path, head: HeadKind) -> None:
    torch.manual_seed(3)
    state = timm.create_model(VIT, num_classes=3).state_dict()
    path = tmp_path / "w.safetensors"
    save_file(dict(state), path)
    conf = ModelConf(family=Family.vit, library=Library.timm, name=VIT, pretrained=str(path), head=head)
    torch.manual_seed(0)
    for name, tensor in build_model(conf, ["a", "b", "c"]).model.net.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, state[name]) or (head == HeadKind.random and name.startswith("head."))
