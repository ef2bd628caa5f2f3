"""What a file of weights holds besides the network is told: code, numbers of other precision, keys, descriptions."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.upstream import glyphs
from finetune.models.upstream.weight_files import read_state_dict
from finetune.system.errors import UserError

CLASSES = ["ant", "bee", "cat"]


def build(path: Path, name: str = "resnet10t", library: Library = Library.timm, **changes: Any) -> str:
    settings = {"family": Family.vit, "library": library, "name": name, "pretrained": str(path), **changes}
    return build_model(ModelConf(**settings), CLASSES).description


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return timm.create_model("resnet10t", num_classes=3).state_dict()


class Calls:
    """An object whose pickle asks for a call."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Kind(enum.Enum):
    first = 1


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "old"])
def test_calls_that_run_programs_are_named_and_not_made(protocol: int, is_new: bool, tmp_path: Path, caplog) -> None:
    path, proof = tmp_path / "w.pt", tmp_path / "ran"
    evil = [Calls(os.system, f"touch {proof}"), Calls(eval, "1"), Calls(os.mkdir, str(proof))]
    content = {"w": torch.ones(2), "x": evil}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_new)
    with caplog.at_level("WARNING", logger="finetune"):
        assert read_state_dict(path)["w"].tolist() == [1, 1]
    (line,) = caplog.messages
    assert "w.pt holds calls of " in line and "eval, " in line and ".mkdir, " in line and ".system beside" in line
    assert not proof.exists()


def test_objects_of_a_training_program_are_no_warning(tmp_path: Path, caplog) -> None:
    beside = [Path("/"), Kind.first, functools.partial(int, base=2), argparse.Namespace(a=1), collections.deque([1])]
    torch.save({"w": torch.ones(2), "x": [*beside, os.stat_result(range(10)).__class__]}, tmp_path / "w.pt")
    torch.save({"w": torch.ones(2), "x": beside}, tmp_path / "w.pt")
    with caplog.at_level("INFO", logger="finetune"):
        read_state_dict(tmp_path / "w.pt")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.float64, "1 tensor of {} are in double precision (float64), and are rounded to single"),
        (torch.float8_e4m3fn, "1 tensor of {} have 8 bits a number (float8_e4m3fn) and no scales: they are taken"),
        (torch.float8_e5m2, "(float8_e5m2) and no scales"),
        (torch.float16, ""),
        (torch.bfloat16, ""),
    ],
)
def test_numbers_that_single_precision_changes_or_that_are_coarse(kind, words: str, tmp_path: Path, caplog) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.tensor([0.5, 2.0]).to(kind), "n": torch.tensor([7])}, path)
    with caplog.at_level("INFO", logger="finetune"):
        read = read_state_dict(path)
    assert read["w"].dtype == torch.float32 and read["w"].tolist() == [0.5, 2.0]
    assert len(caplog.messages) == bool(words) and words.format(path) in "".join(caplog.messages)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("teachr", r"under teacher\.backbone, student\.module\.backbone, and none there \(did you mean 'teacher'\?\)"),
        ("Student", r"did you mean 'student'"),
        ("teacher.bakbone", r"did you mean 'teacher\.backbone'"),
        ("ema", r"and none there$"),
    ],
)
def test_a_mistyped_key_names_the_nearest(key: str, words: str, state: dict, tmp_path: Path) -> None:
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in state.items()}
    student = {f"student.module.backbone.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save(teacher | student, tmp_path / "w.pt")
    with pytest.raises(UserError, match=words):
        build(tmp_path / "w.pt", pretrained_key=key)


def test_a_key_of_another_model_or_of_an_archive(tmp_path: Path) -> None:
    torch.save({"netG": {"deconv.weight": torch.ones(1)}, "epoch": 1}, tmp_path / "w.pt")
    words = r"nothing of this model there \(did you mean 'netG'\?\); its names begin with netG"
    with pytest.raises(UserError, match=words):
        build(tmp_path / "w.pt", pretrained_key="netg")
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(UserError, match=r"would be ignored: model\.pretrained=.*w\.npz is a JAX archive"):
        build(tmp_path / "w.npz", "vit_tiny_patch16_224", pretrained_key="params")


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams"])
def test_a_network_among_the_settings_of_a_program_is_none_of_its_weights(
    key: str, state: dict, tmp_path: Path
) -> None:
    before = {f"net.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({key: before, "state_dict": {f"net.{name}": each for name, each in state.items()}}, tmp_path / "w.pt")
    assert "read from state_dict.net; left out of the file: " + key in build(tmp_path / "w.pt")


def test_tables_for_images_of_another_size_are_said_to_be_resized(tmp_path: Path) -> None:
    def saved(name: str, **args: Any) -> Path:
        torch.save(timm.create_model(name, num_classes=3, **args).state_dict(), tmp_path / "w.pt")
        return tmp_path / "w.pt"

    line = build(saved("test_vit", img_size=32), "test_vit")
    assert "; resized: pos_embed (1, 5, 64) for (1, 101, 64)" in line
    assert "resized" not in build(tmp_path / "w.pt", "test_vit", image_size=32)
    assert "resized" not in build(saved("test_vit"), "test_vit", in_channels=1)
    assert "resized" not in build(saved("test_convnext"), "test_convnext")


def described(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("architecture", "args", "is_refused"),
    [
        ("resnet18", {}, False),
        ("resnet18.a1_in1k", {"num_classes": 3, "drop_rate": 0.1}, False),
        ("resnet18", {"global_pool": "max"}, True),
        ("resnet18d", {}, True),
        ("resnet_of_somebody", {}, False),
    ],
)
def test_torchvisions_networks_are_not_those_of_another_description(
    architecture: str, args: dict, is_refused: bool, tmp_path: Path
) -> None:
    tensors = timm.create_model("resnet18", num_classes=3).state_dict()
    folder = described(tmp_path, tensors, architecture=architecture, model_args=args)
    if not is_refused:
        build(folder, "resnet18", Library.torchvision)
        return
    words = rf"describes timm's {architecture}.*, and resnet18 is torchvision's; use model\.name=local-dir:"
    with pytest.raises(UserError, match=words):
        build(folder, "resnet18", Library.torchvision)


@pytest.mark.parametrize("changes", [{}, {"num_heads": 2}, {"act_layer": "quick_gelu"}])
def test_the_bundled_vit_is_not_a_network_of_another_description(changes: dict, tmp_path: Path) -> None:
    args = {**glyphs.read_bundle(glyphs.VIT).config["args"], "num_classes": 3}
    net = timm.create_model("vit_base_patch16_224", **args)
    folder = described(tmp_path, net.state_dict(), architecture="vit_base_patch16_224", model_args=args | changes)
    if not changes:
        build(folder, "glyph_vit", Library.auto)
        build(folder, "glyph_vit", Library.auto, image_size=48)
        return
    with pytest.raises(UserError, match=r"describes another network than glyph_vit, though its tensors fit"):
        build(folder, "glyph_vit", Library.auto)


@pytest.mark.parametrize(("channels", "is_refused"), [(1, True), (3, False)])
def test_weights_of_a_network_that_takes_images_apart_are_for_three_channels(
    channels: int, is_refused: bool, tmp_path: Path
) -> None:
    torch.save(timm.create_model("tresnet_m", num_classes=2).state_dict(), tmp_path / "w.pt")
    if not is_refused:
        build(tmp_path / "w.pt", "tresnet_m")
        return
    with pytest.raises(UserError, match=r"TResNet reads 16 channels, and no images, so its weights cannot be adapted"):
        build(tmp_path / "w.pt", "tresnet_m", in_channels=channels)
    build(tmp_path, "tresnet_m", in_channels=channels, pretrained="none")


CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, "mlp_ratio": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32, "mlp_ratio": 2}


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("place", ["", "state_dict.module.", "tower", "tower."])
def test_an_image_tower_of_open_clip_fits_timms(is_quick: bool, place: str, monkeypatch, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.CLIP(**CFG, quick_gelu=is_quick).eval()
    for parameter in clip.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **TIMM}))
    tensors = clip.visual.state_dict() if place.startswith("tower") else clip.state_dict()
    start = place.replace("tower.", "net.").removeprefix("tower")
    torch.save({f"{start}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "w.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CFG, "quick_gelu": is_quick}}))
    name = "vit_base_patch32_clip_224"  # whose activation is the other one where `is_quick`
    built = build_model(ModelConf(family=Family.vit, name=name, pretrained=str(tmp_path / "w.pt")), CLASSES)
    assert "in open_clip's layout" in built.description
    assert ("quick_gelu as its open_clip_config.json says" in built.description) == is_quick
    assert built.changes == ({"activation": "quick_gelu"} if is_quick else {})
    images, net = torch.randn(2, 3, 32, 32), built.model.net.eval()
    clip.visual.proj = None
    with torch.no_grad():
        got, expected = net.forward_head(net.forward_features(images), pre_logits=True), clip.visual(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    heads = {**CFG, "vision_cfg": {**CFG["vision_cfg"], "head_width": 16}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": heads}))
    with pytest.raises(UserError, match=r"open_clip_config\.json has 2 attention heads and this model has 4"):
        build(tmp_path / "w.pt", name, Library.auto)
    (tmp_path / "open_clip_config.json").unlink()
    words = "no open_clip_config.json beside them says their activation, so that of model.name is used"
    assert words in build(tmp_path / "w.pt", name, Library.auto, head=HeadKind.random)


@pytest.mark.parametrize("is_openais", [True, False])
def test_an_archive_of_openai_says_its_activation_and_another_does_not(is_openais: bool, monkeypatch, tmp_path) -> None:
    import open_clip

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = open_clip.CLIP(**CFG, quick_gelu=is_openais).eval().visual
            if is_openais:
                self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.visual(images)

    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **TIMM}))
    torch.jit.save(torch.jit.trace(Whole(), torch.randn(1, 3, 32, 32), check_trace=False), tmp_path / "w.pt")
    line = build(tmp_path / "w.pt", "vit_base_patch32_clip_224")
    assert ("; quick_gelu as its w.pt says" in line) == is_openais
    assert ("no open_clip_config.json beside them says their activation" in line) != is_openais


def test_a_resnet_of_open_clip_fits_timms_with_its_attention_pool(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": [3, 4, 6, 3], "width": 64, "image_size": 224, "patch_size": None}
    clip = open_clip.CLIP(1024, vision, CFG["text_cfg"]).eval()
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    settings = ModelConf(family=Family.vit, name="resnet50_clip", pretrained=str(tmp_path / "w.pt"))
    net, images = build_model(settings, CLASSES).model.net.eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        got, expected = clip.visual.attnpool.c_proj(features), clip.visual(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
