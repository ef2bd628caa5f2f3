"""Weights from files of every kind are read whole, or refused with the reason; no file runs code."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.upstream.clip_source import locate
from finetune.models.upstream.downloads import _reachable, downloads
from finetune.models.upstream.glyphs import CLIP, VIT, read_bundle
from finetune.models.upstream.jax_archives import WholeCopies
from finetune.models.upstream.weight_files import fitting, load_strictly, read_state_dict
from finetune.system.errors import UserError

CLASSES = ["a", "b", "c"]
STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2), "steps": torch.tensor(3)}


def same(state: dict, expected: dict = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


# Reading files.


@pytest.mark.parametrize(
    "content",
    [
        {"args": argparse.Namespace(lr=1), "epoch": 3, **STATE},
        {"best_top1": np.float64(0.5), "epoch": np.int64(3), **STATE},
        {**STATE, "note": "text beside the tensors"},
        {"conv": {"weight": STATE["conv.weight"], "bias": STATE["conv.bias"]}, "steps": STATE["steps"]},
    ],
)
def test_all_tensors_whatever_stands_beside_them(content: dict, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert same(read_state_dict(tmp_path / "w.pt"))


def test_two_tensors_of_one_name_are_refused_and_one_dictionary_in_many_places_is_read_once(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"two of its tensors are called a\.b"):
        read_state_dict(tmp_path / "w.pt")
    layer: dict = {"w": torch.ones(1)}
    for _ in range(7):
        layer = {str(index): layer for index in range(20)}  # a billion places
    torch.save(layer, tmp_path / "w.pt")
    assert list(read_state_dict(tmp_path / "w.pt")) == ["0.0.0.0.0.0.0.w"]


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    save_file({name: t.half() if t.is_floating_point() else t for name, t in STATE.items()}, tmp_path / "w.safetensors")
    state = read_state_dict(tmp_path / "w.safetensors")
    assert same(state) and state["conv.bias"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")
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


def test_a_pickle_that_would_run_code_does_not_run(tmp_path: Path) -> None:
    """Its tensors are read; a file that holds nothing else is refused."""
    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (marker,)

    for bomb in (Bomb(), Touch()):
        torch.save({"model": STATE, "extra": bomb}, tmp_path / "w.pt")
        assert read_state_dict(tmp_path / "w.pt").keys() == {f"model.{name}" for name in STATE}
        torch.save(bomb, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"holds no weights: expected tensors by name"):
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
        (pickle.dumps([1, 2], protocol=2), "damaged|not a dictionary"),
        (b"any other text", "no weights file"),
        (b"\x80\x02a(.", "damaged"),
    ],
)
def test_what_is_no_weights_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_state_dict(tmp_path / "w.pt")


def test_a_safetensors_file_may_begin_with_the_bytes_of_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for length in range(480, 640):  # a header of 640 bytes: the file begins with 0x80 0x02
        save_file({"weight": torch.ones(2)}, path, metadata={"note": "x" * length})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    assert read_state_dict(path)["weight"].tolist() == [1, 1]


def test_a_wrong_ending_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"is a safetensors file.*\.safetensors"):
        read_state_dict(tmp_path / "w.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"written by torch\.save.*\.pt"):
        read_state_dict(tmp_path / "w.safetensors")


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


def built_network(settings: dict) -> dict[str, torch.Tensor]:
    """All tensors of a network, in single precision: the bundled one, or a small one with random weights."""
    if settings.get("name") in (None, VIT):
        path = read_bundle(CLIP if settings["family"] == Family.clip else VIT).weights
        return read_state_dict(path)
    make = timm.create_model if settings["library"] == Library.timm else get_model
    return make(settings["name"]).state_dict()


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


def test_a_bare_tower_is_a_layout_of_open_clip_too(upstream_clip: nn.Module, tmp_path: Path) -> None:
    torch.save(upstream_clip.visual.state_dict(), tmp_path / "w.pt")
    conf = ModelConf(name="ViT-B-32", pretrained=str(tmp_path / "w.pt"))
    assert_tower(build_model(dataclasses.replace(conf, head=HeadKind.random), CLASSES).model, upstream_clip)
    with pytest.raises(ValueError, match=r"image tower only.*model\.head=random"):
        build_model(conf, CLASSES)


@pytest.mark.parametrize("name", ["visual.positional_embedding", "positional_embedding"])
def test_positions_that_cannot_be_resized_are_those_of_another_model(
    name: str, upstream_clip: nn.Module, tmp_path: Path
) -> None:
    state = upstream_clip.state_dict()
    torch.save({**state, name: torch.zeros(8, state[name].shape[1] + 4)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"of another shape: {name} .*check model\.name"):
        build_model(ModelConf(name="ViT-B-32", pretrained=str(tmp_path / "w.pt")), CLASSES)


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 8), "else": torch.zeros(1)}, tmp_path / "w.pt")
    for settings in ({"name": "vit_tiny_patch16_224"}, {"name": "vit_b_32", "library": Library.torchvision}):
        with pytest.raises(ValueError, match=r"missing: .* and \d+ more") as caught:
            build_model(ModelConf(family=Family.vit, pretrained=str(tmp_path / "w.pt"), **settings), CLASSES)
        assert "1 unexpected: " in str(caught.value) or "2 unexpected: " in str(caught.value)
        assert len(str(caught.value)) < 800 and "\n" not in str(caught.value)


def test_torch_hub_announces_no_download_that_cannot_happen(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.models.upstream.downloads._reachable", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    conf = ModelConf(family=Family.vit, name="convnext_tiny", library=Library.torchvision, pretrained="DEFAULT")
    with pytest.raises(FileNotFoundError, match=r"download\.pytorch\.org cannot be reached"):
        build_model(conf, CLASSES)
    assert capsys.readouterr() == ("", "")


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


# Every layout of a checkpoint: write it, build a model from it.

CLIP_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "resize_mode": "longest",
}


@pytest.fixture
def upstream_clip(monkeypatch) -> nn.Module:
    """A tiny CLIP under the name ViT-B-32."""
    import copy

    import open_clip

    torch.manual_seed(0)
    configs = {"ViT-B-32": CLIP_CFG, "ViT-B-32-quickgelu": {**CLIP_CFG, "quick_gelu": True}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(configs.get(name)))
    return open_clip.CLIP(**CLIP_CFG)


def assert_tower(model: nn.Module, upstream: nn.Module) -> None:
    for name, parameter in upstream.visual.named_parameters():
        assert torch.equal(model.net.get_parameter(f"visual.{name}"), parameter), name


def assert_zeroshot(built, upstream: nn.Module) -> None:
    """The model's logits are those of upstream's two towers."""
    from open_clip import get_tokenizer

    tokens = get_tokenizer("ViT-B-32")(["a", "b", "c"])
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected, _ = upstream.eval().get_logits(images, tokens)
        got = built.model.eval()(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layout", ["safetensors", "half", "state_dict", "module", "trainer", "torchscript"])
def test_every_layout_of_an_open_clip_file(layout: str, upstream_clip: nn.Module, tmp_path: Path) -> None:
    from open_clip.transformer import QuickGELU

    state = upstream_clip.state_dict()
    path = tmp_path / ("w.safetensors" if layout in ("safetensors", "half") else "w.pt")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "half":
        upstream_clip.half().float()
        state = upstream_clip.state_dict()
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    elif layout == "state_dict":
        torch.save(state, path)
    elif layout == "module":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif layout == "trainer":
        inner = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": inner, "optimizer": {}}, path)
    else:
        holder = nn.Module()
        for name, tensor in state.items():
            owner = holder
            *parts, last = name.split(".")
            for part in parts:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, tensor.half())
        for name in ("input_resolution", "context_length", "vocab_size"):
            holder.register_buffer(name, torch.tensor(1))
        torch.jit.script(holder).save(str(path))
    conf = ModelConf(name="ViT-B-32", pretrained=str(path), templates=["{}"])
    if layout == "torchscript":  # as OpenAI published it: half precision, quick GELU
        with pytest.raises(ValueError, match=r"quick GELU: model\.name=ViT-B-32-quickgelu"):
            build_model(conf, CLASSES)
        built = build_model(dataclasses.replace(conf, name="ViT-B-32-quickgelu"), CLASSES)
        assert QuickGELU in [type(module) for module in built.model.modules()]
        weight = built.model.net.visual.conv1.weight
        assert torch.equal(weight, upstream_clip.visual.conv1.weight.half().float()) and weight.dtype == torch.float32
        return
    built = build_model(conf, CLASSES)
    assert_tower(built.model, upstream_clip)
    assert_zeroshot(built, upstream_clip)
    assert built.preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_a_hub_folder_of_open_clip_brings_its_preprocessing(tmp_path: Path) -> None:
    import open_clip

    upstream = open_clip.CLIP(**CLIP_CFG)
    config = {"model_cfg": CLIP_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    conf = ModelConf(name=f"local-dir:{tmp_path}", templates=["{}"])
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        build_model(conf, CLASSES)
    save_file(upstream.state_dict(), tmp_path / "open_clip_model.safetensors")
    built = build_model(conf, CLASSES)
    assert_tower(built.model, upstream)
    assert (built.preprocess.mean, built.preprocess.interpolation, built.preprocess.resize) == (
        (0.1, 0.2, 0.3),
        "bilinear",
        "pad",
    )
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json not found"):
        build_model(ModelConf(name=f"local-dir:{tmp_path / 'nothing'}"), CLASSES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{" * 100_000,
        "[" * 200_000,
        '{"model_cfg": []}',
        '{"model_cfg": {"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}}',
        '{"model_cfg": {"embed_dim": 1, "vision_cfg": 3, "text_cfg": {}}}',
        '{"preprocess_cfg": {}}',
        '{"model_cfg": {"embed_dim": 1, "vision_cfg": {"layers": 1000000000}, "text_cfg": {}}}',
        '{"model_cfg": {"embed_dim": 1, "vision_cfg": {"layers": -1}, "text_cfg": {}}}',
        '{"model_cfg": ' + "9" * 5000 + "}",
        *(
            f'{{"model_cfg": {{"embed_dim": 1, "vision_cfg": {{}}, "text_cfg": {{}}}}, "preprocess_cfg": {images}}}'
            for images in ("[1]", '{"mean": "x"}', '{"mean": [0, 0]}', '{"std": [0, 0, 0]}', '{"resize_mode": "x"}')
        ),
    ],
)
def test_a_configuration_that_describes_no_model_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(UserError, match=r"open_clip_config\.json describes no open_clip model") as caught:
        locate(ModelConf(name=f"local-dir:{tmp_path}"), load=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "vision",
    [
        {"layerz": 3},
        {"layers": "x"},
        {"head_width": 0},
        {"width": -8},
        {"timm_model_name": "no_such_model"},
        {"width": []},
    ],
)
def test_a_configuration_with_senseless_entries_is_one_line(vision: dict, tmp_path: Path) -> None:
    config = {"model_cfg": {**CLIP_CFG, "vision_cfg": {**CLIP_CFG["vision_cfg"], **vision}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"describes no (model of open_clip|open_clip model)") as caught:
        build_model(ModelConf(name=f"local-dir:{tmp_path}", pretrained="none", head=HeadKind.random), CLASSES)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> Path:
    """A cache of the hub, with one repository of open_clip and one of timm, and no network."""
    import open_clip
    import timm
    from huggingface_hub import constants

    def repository(name: str) -> Path:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return folder / "snapshots" / ("0" * 40)

    monkeypatch.setattr("finetune.models.upstream.downloads._reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    folder = repository("somebody/clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CFG, "preprocess_cfg": PREPROCESS_CFG}))
    save_file(open_clip.CLIP(**CLIP_CFG).state_dict(), folder / "open_clip_model.safetensors")
    folder = repository("somebody/vit")
    args = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "num_classes": 3, "input_size": [3, 32, 32], "classifier": "head"}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "pretrained_cfg": pretrained_cfg,
        "model_args": args,
        "num_classes": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return tmp_path


def test_cached_hub_repositories_work_without_a_network(hub: Path) -> None:
    clip = build_model(ModelConf(name="hf-hub:somebody/clip", head=HeadKind.random), CLASSES)
    assert clip.preprocess.mean == (0.1, 0.2, 0.3) and clip.preprocess.size == 16
    for name in ("hf-hub:somebody/vit", "hf_hub:somebody/vit"):
        vit = build_model(ModelConf(family=Family.vit, name=name, head=HeadKind.keep), CLASSES)
        assert vit.preprocess.mean == (0.1, 0.2, 0.3) and vit.preprocess.size == 32
    assert torch.equal(
        vit.model.net.head.weight,
        build_model(ModelConf(family=Family.vit, name=name, head=HeadKind.keep), CLASSES).model.net.head.weight,
    )


def test_a_tokenizer_never_brings_code_of_its_own(tmp_path: Path, monkeypatch) -> None:
    """open_clip passes on what a stranger's configuration says, and transformers would run it."""
    asked: dict = {}

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, name: str, **options: object) -> "AutoTokenizer":
            asked.update(options)
            return cls()

        def __call__(self, texts: list[str], **_: object) -> "AutoTokenizer":
            self.input_ids = torch.zeros(len(texts), 77, dtype=torch.int64)
            return self

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=AutoTokenizer))
    text = {**CLIP_CFG["text_cfg"], "hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    config = {"model_cfg": {**CLIP_CFG, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    located = locate(ModelConf(name=f"local-dir:{tmp_path}"), load=False)
    located.tokenizer()(["a"])
    assert asked["trust_remote_code"] is False


def test_weights_of_a_hub_repository_for_a_built_in_name(hub: Path, upstream_clip: nn.Module) -> None:
    built = build_model(ModelConf(name="ViT-B-32", pretrained="hf-hub:somebody/clip", templates=["{}"]), CLASSES)
    assert_tower(built.model, upstream_clip)
    assert_zeroshot(built, upstream_clip)


def test_a_timm_folder(hub: Path) -> None:
    folder = hub / "models--somebody--vit" / "snapshots" / ("0" * 40)
    built = build_model(ModelConf(family=Family.vit, name=f"local-dir:{folder}"), CLASSES)
    assert built.preprocess.mean == (0.1, 0.2, 0.3) and built.preprocess.size == 32


def jax_arrays(net: Any, *, is_stacked: bool = False) -> dict[str, Any]:
    """The arrays of a ViT in the format of JAX: kernels transposed; query, key and value apart and split by heads."""
    arrays: dict[str, Any] = {}
    width, heads = net.embed_dim, net.blocks[0].attn.num_heads

    def put(name: str, tensor: torch.Tensor) -> None:
        arrays[name] = tensor.detach().numpy()

    put("embedding/kernel", net.patch_embed.proj.weight.permute(2, 3, 1, 0))
    put("embedding/bias", net.patch_embed.proj.bias)
    put("cls", net.cls_token)
    put("pos_embedding" if is_stacked else "Transformer/posembed_input/pos_embedding", net.pos_embed)
    put("Transformer/encoder_norm/scale", net.norm.weight)
    put("Transformer/encoder_norm/bias", net.norm.bias)
    put("head/kernel", net.head.weight.T)
    put("head/bias", net.head.bias)
    for index, block in enumerate(net.blocks):
        prefix = f"Transformer/encoderblock_{index}/"
        attention, second, mlp = (0, 1, 0) if is_stacked else (1, 2, 3)
        mha = f"{prefix}MultiHeadDotProductAttention_{attention}/"
        for number, norm in ((0, block.norm1), (second, block.norm2)):
            put(f"{prefix}LayerNorm_{number}/scale", norm.weight)
            put(f"{prefix}LayerNorm_{number}/bias", norm.bias)
        for part, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            put(f"{mha}{part}/kernel", weight.T.reshape(width, heads, -1))
            put(f"{mha}{part}/bias", bias.reshape(heads, -1))
        put(f"{mha}out/kernel", block.attn.proj.weight.T.reshape(heads, -1, width))
        put(f"{mha}out/bias", block.attn.proj.bias)
        for number, layer in ((0, block.mlp.fc1), (1, block.mlp.fc2)):
            put(f"{prefix}MlpBlock_{mlp}/Dense_{number}/kernel", layer.weight.T)
            put(f"{prefix}MlpBlock_{mlp}/Dense_{number}/bias", layer.bias)
    if is_stacked:
        first = "Transformer/encoderblock_0/"
        for name in [name for name in arrays if name.startswith(first)]:
            parts = [arrays.pop(name.replace("_0/", f"_{index}/", 1)) for index in range(len(net.blocks))]
            arrays[name.replace("_0/", "/", 1)] = np.stack(parts)
    return arrays


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_jax_archive_of_a_vit(is_stacked: bool, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    np.savez(tmp_path / "vit.npz", **jax_arrays(net, is_stacked=is_stacked))
    conf = ModelConf(
        family=Family.vit, name="vit_tiny_patch16_224", pretrained=str(tmp_path / "vit.npz"), image_size=32
    )
    built = build_model(conf, CLASSES)
    for name, tensor in net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(built.model.net.state_dict()[name], tensor), name
    (tmp_path / "vit.npz").write_bytes((tmp_path / "vit.npz").read_bytes()[:1000])
    with pytest.raises(ValueError) as caught:
        build_model(conf, CLASSES)
    assert "vit.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_jax_archive_of_a_deeper_vit_or_without_a_part_is_refused(is_stacked: bool, tmp_path: Path) -> None:
    import timm

    sizes: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "num_heads": 3, "img_size": 32}
    deeper = timm.models.VisionTransformer(**sizes, depth=13)
    np.savez(tmp_path / "vit.npz", **jax_arrays(deeper, is_stacked=is_stacked))
    conf = ModelConf(
        family=Family.vit, name="vit_tiny_patch16_224", pretrained=str(tmp_path / "vit.npz"), image_size=32
    )
    with pytest.raises(UserError, match=r"vit\.npz holds the weights of another model .* arrays too many"):
        build_model(conf, CLASSES)
    if not is_stacked:
        wide = {"patch_size": 14, "embed_dim": 384, "num_heads": 6, "img_size": 28}
        same = timm.models.VisionTransformer(**wide, depth=12, no_embed_class=True)
        np.savez(tmp_path / "vit.npz", **jax_arrays(same))
        registers = dataclasses.replace(conf, name="vit_small_patch14_reg4_dinov2", image_size=28)
        with pytest.raises(UserError, match=r"vit\.npz .* parameters missing: .*"):
            build_model(registers, CLASSES)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "{}",
        '{"architecture": 5}',
        '{"architecture": "../../etc/passwd"}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1000000000}}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": "os.system"}, "pretrained_cfg": {}}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": "x"}',
        '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"no_such": 1}}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 1000000000000}',
    ],
)
def test_a_folder_that_describes_no_model_of_timm_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        build_model(ModelConf(family=Family.vit, name=f"local-dir:{tmp_path}"), CLASSES, load=False, device="meta")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_torchvision_files_and_names(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    upstream = models.resnet18(num_classes=3)
    torch.save(upstream.state_dict(), tmp_path / "resnet18-abc.pth")
    conf = ModelConf(
        family=Family.vit, library=Library.torchvision, name="resnet18", pretrained=str(tmp_path / "resnet18-abc.pth")
    )
    built = build_model(conf, ["x", "y"])
    for name, tensor in upstream.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(built.model.net.state_dict()[name], tensor), name
    assert (built.preprocess.resize, built.preprocess.crop_fraction) == ("crop", 224 / 256)
    kept = build_model(dataclasses.replace(conf, head=HeadKind.keep), CLASSES)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(kept.model.eval()(images), upstream.eval()(images))


# Without a network.


@pytest.fixture
def offline(monkeypatch, tmp_path: Path) -> None:
    """No network and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr("finetune.models.upstream.downloads._reachable", lambda url: False)
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
    assert not _reachable("https://nowhere.invalid")
    assert not _reachable("http://127.0.0.1:9")


def test_downloads_leave_settings_and_loggers_as_they_were(monkeypatch) -> None:
    import logging
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr("finetune.models.upstream.downloads._reachable", lambda url: False)
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


# Whatever a library raises on a file that a person named is a line about that file.

ARCHIVES = {
    "foreign": {"a": np.ones(3), "b": np.ones((2, 2))},
    "right name, wrong shape": {"embedding/kernel": np.zeros(())},
    "dates": {"embedding/kernel": np.zeros((16, 16, 3, 192), "datetime64[s]")},
    "other byte order": {"embedding/kernel": np.zeros((16, 16, 3, 192), ">f4")},
    "long numbers": {"embedding/kernel": np.zeros((16, 16, 3, 192), np.longdouble)},
    "objects": {"embedding/kernel": np.array([{}], dtype=object)},
    "no arrays": {},
}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50x1_bit", "resnet18.a1_in1k"])
def test_a_jax_archive_of_something_else_is_named(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **ARCHIVES[kind])
    with pytest.raises(UserError, match=re.escape(str(path))):
        build_model(ModelConf(family=Family.vit, library=Library.timm, name=name, pretrained=str(path)), CLASSES)


def test_a_library_that_fails_in_a_way_of_its_own_is_a_line_about_the_file() -> None:
    for error in (ZeroDivisionError("x"), KeyError("head"), AttributeError(), StopIteration(), RecursionError("deep")):
        with pytest.raises(UserError, match=r"w\.pt does not fit model\.name=m: "), fitting("w.pt", "m"):
            raise error
    for kept in (UserError("as it is"), FileNotFoundError("as it is"), MemoryError("as it is")):
        with pytest.raises(type(kept), match=r"^as it is$"), fitting("w.pt", "m"):
            raise kept


def test_no_small_array_is_repeated_to_fill_a_large_one() -> None:
    large = nn.Parameter(torch.zeros(4, 2))
    with torch.no_grad(), WholeCopies():
        large.copy_(torch.ones(4, 2))
        for small in (torch.ones(()), torch.ones(1), torch.ones(2)):
            with pytest.raises(ValueError, match=r"stands for one of \(4, 2\)"):
                large.copy_(small)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "settings",
    [
        {"family": Family.clip},
        {"family": Family.clip, "head": HeadKind.random},
        {"family": Family.vit, "name": VIT},
        {"family": Family.vit, "name": "resnet18", "library": Library.torchvision},
        {"family": Family.vit, "name": "resnet18", "library": Library.timm},
    ],
)
def test_weights_that_are_not_finite_are_refused_with_the_tensor(value: float, settings: dict, tmp_path: Path) -> None:
    upstream = built_network(settings)
    name = next(name for name in upstream if name.endswith(("conv1.weight", "patch_embed.proj.weight")))
    upstream[name].view(-1)[1] = value
    torch.save(upstream, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt: 1 of the [\d,]+ numbers of {re.escape(name)} are NaN or infinite"):
        build_model(ModelConf(**settings, pretrained=str(tmp_path / "w.pt")), CLASSES)


def test_numbers_of_four_bits_are_refused_with_their_name(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(UserError, match=r"w\.safetensors (is refused: a holds float4|is damaged|cannot be read)"):
        read_state_dict(tmp_path / "w.safetensors")
