"""Stems of one and of many channels follow timm's rule, and grey images reach a model of one channel."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.__main__ import main
from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.data.loading.batches import in_channels
from finetune.models import build_model
from finetune.models.upstream.stems import first_convolution

CLASSES = ["a", "b", "c"]
NETS = {
    "timm": {"family": Family.vit, "name": "vit_tiny_patch16_224", "image_size": 32},
    "timm_conv": {"family": Family.vit, "name": "resnet10t"},
    "torchvision": {"family": Family.vit, "name": "resnet18", "library": Library.torchvision},
    "torchvision_vit": {"family": Family.vit, "name": "vit_b_32", "library": Library.torchvision, "image_size": 32},
    "glyph_vit": {"family": Family.vit, "name": "glyph_vit"},
    "glyph_clip": {"name": "glyph_clip", "head": HeadKind.random},
    "open_clip_conv": {"name": "RN50", "head": HeadKind.random, "image_size": 64},
}


def stem(net: nn.Module) -> torch.Tensor:
    return first_convolution(net)[1].weight


@pytest.mark.parametrize("layout", NETS)
def test_a_stem_is_adapted_both_ways(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conf = ModelConf(**{**NETS[layout], "pretrained": "none"})
    path = str(tmp_path / "rgb.safetensors")
    rgb = build_model(conf, CLASSES)
    save_file(rgb.model.net.state_dict(), path)
    plain = stem(rgb.model.net)
    grey = build_model(dataclasses.replace(conf, pretrained=path, in_channels=1), CLASSES)
    assert torch.equal(stem(grey.model.net), plain.sum(dim=1, keepdim=True))
    assert "its stem for 3 channels is adapted to 1" in grey.description
    assert grey.preprocess.channels == 1 and len({*grey.preprocess.mean}) == len({*grey.preprocess.std}) == 1
    five = build_model(dataclasses.replace(conf, pretrained=path, in_channels=5), CLASSES).model
    expected = plain[:, [0, 1, 2, 0, 1]] * (3 / 5)
    torch.testing.assert_close(stem(five.net), expected)
    size = grey.preprocess.size
    assert five.eval()(torch.randn(2, 5, size, size)).shape == (2, 3)
    same = torch.randn(2, 1, size, size)
    weights = {name: t for name, t in rgb.model.net.state_dict().items() if t.shape != plain.shape}
    grey.model.net.load_state_dict(weights, strict=False)  # the head too
    with torch.no_grad():
        got, expected = grey.model.eval()(same), rgb.model.eval()(same.expand(-1, 3, -1, -1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    path = str(tmp_path / "grey.safetensors")
    save_file(grey.model.net.state_dict(), path)
    again = build_model(dataclasses.replace(conf, pretrained=path, in_channels=1), CLASSES)
    assert torch.equal(stem(again.model.net), stem(grey.model.net)) and "is adapted" not in again.description
    back = build_model(dataclasses.replace(conf, pretrained=path), CLASSES)
    torch.testing.assert_close(stem(back.model.net), stem(grey.model.net).expand(-1, 3, -1, -1) / 3)
    assert "its stem for 1 channel is adapted to 3" in back.description


def test_grey_pixels_are_pillows() -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    images = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
    assert (in_channels(images, 1)[0, 0] - torch.tensor(expected)).abs().max() <= 0.51
    assert in_channels(images, 3) is images


@pytest.mark.parametrize("words", [["model=vit"], ["model=clip", "model.head=random", "optim.fix_layer=2"]])
def test_a_run_on_grey_images(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*words, "model.in_channels=1", f"hydra.run.dir={tmp_path}", "train.epochs=1", "device=cpu", "data.workers=0"]
    assert main(run) == 0, capsys.readouterr().err
    state = load_file(tmp_path / "checkpoints" / "best.safetensors")
    shapes = {tuple(tensor.shape) for tensor in state.values() if tensor.ndim == 4}
    assert {shape[1] for shape in shapes} == {1}


def test_images_have_no_fourth_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=vit", "model.in_channels=4", f"hydra.run.dir={tmp_path}", "device=cpu"]) == 1
    assert "model.in_channels=4: images come with three channels (RGB); use 3, or 1" in capsys.readouterr().err
    assert main(["describe", "model=vit", "model.in_channels=4"]) == 0
