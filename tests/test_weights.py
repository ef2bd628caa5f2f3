"""Weights from files of every kind: read whole, or refused with a line that says why; never run."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.config import Family, HeadKind, ModelConf
from finetune.models import build_model, weights
from finetune.models.weights import downloads, load_strictly, read_state_dict

CLASSES = ["a", "b", "c"]
STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2), "steps": torch.tensor(3)}


def same(state: dict, expected: dict = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


# Reading files.


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE},
        {"model": STATE, "optimizer": {"lr": 1.0}, "epoch": 3, "args": argparse.Namespace(lr=1)},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in STATE.items()}, "epoch": 1},
        {"state_dict": {name: torch.zeros_like(t) for name, t in STATE.items()}, "state_dict_ema": STATE},
        {**STATE, "note": "text beside the tensors"},
    ],
)
def test_whatever_a_training_program_wrapped_around_the_weights(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert same(read_state_dict(tmp_path / "w.pt"))


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    save_file({name: t.half() if t.is_floating_point() else t for name, t in STATE.items()}, tmp_path / "w.safetensors")
    state = read_state_dict(tmp_path / "w.safetensors")
    assert same(state) and state["conv.bias"].dtype == torch.float32


def test_a_torchscript_archive_gives_its_tensors(tmp_path: Path) -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(3, 2)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    model = Clip()
    torch.jit.script(model).save(str(tmp_path / "ViT.pt"))
    assert same(read_state_dict(tmp_path / "ViT.pt"), dict(model.conv.state_dict(prefix="conv.")))


class Bomb:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (marker,)

    for content in ({"model": STATE, "extra": Bomb()}, {"model": STATE, "extra": Touch()}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"refused: it is a pickle that would run .*safetensors"):
            read_state_dict(tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 10, 100, 1000])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_said_to_be_damaged(keep: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    big = {"weight": torch.randn(100, 100)}
    save_file(big, path) if suffix == ".safetensors" else torch.save(big, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError) as caught:
        read_state_dict(path)
    assert "damaged" in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (pickle.dumps([1, 2]), "damaged|not a dictionary"),
    ],
)
def test_what_is_no_weights_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_state_dict(tmp_path / "w.pt")


def test_a_file_without_tensors_says_what_it_found(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no weights: expected tensors by name, found epoch, lr"):
        read_state_dict(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_state_dict(tmp_path / "nothing.pt")


# Fitting weights to a model.


def test_missing_unexpected_and_misshapen_names_are_listed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {
        "0.weight": torch.zeros(4, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2, 2),
        "2.bias": torch.zeros(1),
    }
    with pytest.raises(ValueError) as caught:
        load_strictly(model, state, source="w.pt")
    for words in ("1 missing: 1.bias", "1 unexpected: 2.bias", "0.weight (4, 3) for (2, 3)"):
        assert words in str(caught.value)


def test_only_the_classifier_may_differ() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 5)})
    state = {"body.weight": torch.ones(2, 3), "body.bias": torch.ones(2), "head.weight": torch.ones(7, 2)}
    before = model["head"].weight.clone()
    load_strictly(model, state, source="w.pt", optional=("head.",))
    assert torch.equal(model["body"].weight, torch.ones(2, 3)) and torch.equal(model["head"].weight, before)


def clip_conf(path: Path, **changes: object) -> ModelConf:
    return ModelConf(pretrained=str(path), **changes)


def vit_conf(path: Path, **changes: object) -> ModelConf:
    return ModelConf(family=Family.vit, name="glyph_vit", pretrained=str(path), **changes)


def test_a_run_of_ours_is_a_starting_point_for_the_next(tmp_path: Path) -> None:
    for family, conf in (("clip", clip_conf), ("vit", vit_conf)):
        built = build_model(ModelConf(family=Family(family), name=f"glyph_{family}"), CLASSES)
        preprocess = {**built.preprocess.as_dict(), "mean": [0.1, 0.2, 0.3]}
        path = tmp_path / f"{family}.safetensors"
        with torch.no_grad():
            for parameter in built.model.parameters():
                parameter.add_(1)
        save_file(built.model.net.state_dict(), path, metadata={"preprocess": json.dumps(preprocess)})
        again = build_model(conf(path, head=HeadKind.random), [*CLASSES, "d"])
        for name, parameter in again.model.net.named_parameters():
            if not name.startswith("head."):
                assert torch.equal(parameter, built.model.net.get_parameter(name)), name
        assert again.preprocess.mean == (0.1, 0.2, 0.3)
        assert again.model.net.head.out_features == 4


def test_an_image_tower_alone_makes_no_zeroshot_head(tmp_path: Path) -> None:
    built = build_model(ModelConf(), CLASSES)
    save_file(built.model.net.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"image tower only.*model\.head=random"):
        build_model(clip_conf(tmp_path / "w.safetensors"), CLASSES)


def test_another_models_weights_are_refused_with_a_list(tmp_path: Path) -> None:
    save_file({"layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    for conf in (clip_conf, vit_conf):
        with pytest.raises(ValueError, match=r"missing: .*") as caught:
            build_model(conf(tmp_path / "w.safetensors"), CLASSES)
        assert "check model.name" in str(caught.value)


def test_a_timm_file_of_another_class_count_gives_its_tower(tmp_path: Path) -> None:
    import timm

    args = {"img_size": 32}
    upstream = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)
    torch.save({"state_dict": upstream.state_dict(), "epoch": 1}, tmp_path / "w.pth")
    conf = ModelConf(family=Family.vit, name="vit_tiny_patch16_224", pretrained=str(tmp_path / "w.pth"), image_size=64)
    built = build_model(conf, CLASSES)
    for name, tensor in upstream.state_dict().items():
        if not name.startswith(("head.", "pos_embed")):
            assert torch.equal(built.model.net.state_dict()[name], tensor), name
    assert built.model.net.pos_embed.shape[1] == 17 and built.preprocess.size == 64
    body = {name: tensor for name, tensor in upstream.state_dict().items() if not name.startswith("head.")}
    torch.save(body, tmp_path / "w.pth")
    assert torch.equal(build_model(conf, CLASSES).model.net.norm.weight, upstream.norm.weight)
    body.pop("norm.weight")
    torch.save(body, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        build_model(conf, CLASSES)


def test_openais_activation_comes_with_openais_weights(tmp_path: Path, monkeypatch) -> None:
    import open_clip
    from open_clip.transformer import QuickGELU

    clip = open_clip.CLIP(
        512, {"layers": 1, "width": 64, "patch_size": 32}, {"layers": 1, "width": 64, "vocab_size": 60}
    )
    save_file(clip.state_dict(), tmp_path / "w.safetensors")
    config = {"embed_dim": 512, "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32}, "text_cfg": {"layers": 1}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(config)))
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda cfg: str(tmp_path / "w.safetensors"))
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        built = build_model(ModelConf(name="ViT-B-32", pretrained=tag, head=HeadKind.random), CLASSES)
        kinds = [type(module) for module in built.model.modules()]
        assert (QuickGELU in kinds) == quick, tag


# Without a network.


@pytest.fixture
def offline(monkeypatch, tmp_path: Path) -> None:
    """No network, whatever this machine has, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(weights, "_reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "ViT-B-32", "pretrained": "openai"},
        {"name": "ViT-B-32", "pretrained": "hf-hub:somebody/something"},
        {"name": "hf-hub:somebody/something"},
        {"family": Family.vit, "name": "vit_tiny_patch16_224", "pretrained": "augreg_in21k"},
        {"family": Family.vit, "name": "hf_hub:somebody/something"},
    ],
)
def test_without_a_network_one_line_says_what_where_and_three_ways(settings: dict, offline: None) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        build_model(ModelConf(**settings), CLASSES)
    text = str(caught.value)
    for words in ("cannot be reached", "HF_HOME", "TORCH_HOME", "Three ways", "model.pretrained=PATH"):
        assert words in text
    assert "\n" not in text
    assert settings["name"].partition(":")[2] in text or settings["pretrained"] in text


def test_the_probe_finds_an_unreachable_hub_by_itself(monkeypatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not weights._reachable("https://nowhere.invalid")
    assert not weights._reachable("http://127.0.0.1:9")


def test_downloads_leave_settings_and_loggers_as_they_were(monkeypatch) -> None:
    import logging
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(weights, "_reachable", lambda url: False)
    before = (
        constants.HF_HUB_OFFLINE,
        socket.getdefaulttimeout(),
        list(logging.root.handlers),
        logging.root.manager.disable,
    )
    with pytest.raises(FileNotFoundError), downloads("this"):
        assert constants.HF_HUB_OFFLINE
        logging.warning("upstream's chatter")
        raise ConnectionError("no")
    after = (
        constants.HF_HUB_OFFLINE,
        socket.getdefaulttimeout(),
        list(logging.root.handlers),
        logging.root.manager.disable,
    )
    assert after == before
