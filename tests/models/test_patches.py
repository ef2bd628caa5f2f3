"""Patch embeddings as matrix products equal the convolution; `precision=auto` takes bfloat16 on fitting CPUs only."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_images, small_model
from torch import nn

from finetune.config import Precision
from finetune.core import device
from finetune.models.patches import PatchProduct, patches_as_products, products_dominate

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "kernel"), [((32, 32), 8), ((30, 37), 7), ((14, 14), 14)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_convolution(size: tuple[int, int], kernel: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 10, kernel, kernel, bias=bias)).double()
    product = copy.deepcopy(conv)
    patches_as_products(product)
    assert type(product[0]) is PatchProduct
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    first, second = conv(images), product(images)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    (first**2).sum().backward()
    (second**2).sum().backward()
    for name, parameter in conv.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(product.named_parameters())[name].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 3}, {"dilation": 2}, {"stride": 2}])
def test_other_convolutions_stay(options: dict) -> None:
    net = nn.Sequential(nn.Conv2d(3, 9, 4, **{"stride": 4, **options}))
    patches_as_products(net)
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize("name", ["vit", "clip-vit", "tv-vit", "eva02", "convnext"])
def test_whole_networks_and_their_keys(name: str) -> None:
    model = small_model(name).double().eval()
    product = copy.deepcopy(model)
    patches_as_products(product.net)
    assert any(isinstance(module, PatchProduct) for module in product.modules())
    assert list(product.state_dict()) == list(model.state_dict())
    images = small_images(name).double()
    torch.testing.assert_close(model(images), product(images), rtol=1e-10, atol=1e-10)


def test_which_models_are_wide() -> None:
    assert products_dominate(nn.Sequential(nn.Linear(300, 900), nn.Linear(900, 300)), 256)
    assert not products_dominate(nn.Sequential(nn.Linear(200, 900), nn.Linear(900, 200)), 256)
    assert not products_dominate(nn.Sequential(nn.Conv2d(512, 512, 3), nn.Linear(512, 512)), 256)
    assert not products_dominate(nn.Sequential(nn.Conv2d(3, 512, 16)), 256)


def test_auto_takes_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    assert device.pick_precision(Precision.auto, CPU, is_wide=True) == torch.bfloat16
    assert device.pick_precision(Precision.auto, CPU, is_wide=False) == torch.float32
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    assert device.pick_precision(Precision.auto, CPU, is_wide=True) == torch.float32
    assert device.pick_precision(Precision.bf16, CPU, is_wide=False) == torch.bfloat16
    for word in (Precision.tf32, Precision.fp16):
        with pytest.raises(ValueError, match=f"precision={word} needs a CUDA GPU"):
            device.pick_precision(word, CPU, is_wide=True)
