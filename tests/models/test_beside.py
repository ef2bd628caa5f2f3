"""What stands beside weights under a network's own names is read: class names, preprocessing, activation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.core.preprocess import Preprocess
from finetune.models import build_model
from finetune.models.upstream.beside import Beside, read_beside
from finetune.models.upstream.class_names import names_of
from finetune.models.upstream.layouts import Wanted
from finetune.models.upstream.stems import check_archive_stem
from finetune.models.upstream.transformers_config import Network
from finetune.models.upstream.transformers_tables import transformers_layouts
from finetune.system.errors import UserError

CLASSES = ["ant", "bee", "cat"]
THEIRS = ["cat", "ant", "bee"]
ROWS = [1, 2, 0]  # of the checkpoint, for CLASSES
IMAGES = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "crop_pct": 0.9,
    "interpolation": "bilinear",
    "input_size": [3, 176, 176],  # that of resnet10t
}
NAMED = [{"label_names": THEIRS}, {"label_names": dict(enumerate(THEIRS))}, {"id2label": dict(enumerate(THEIRS))}]
# Small networks of each library that reads a file of weights; the bundled one has 16 pixels a side.
MODELS = {
    "resnet10t": (Library.timm, "fc"),
    "glyph_vit": (Library.timm, "head"),
    "resnet18": (Library.torchvision, "fc"),
}


def saved(name: str, folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights with a classifier for three classes, under the network's own names, and a config.json beside them."""
    library, _ = MODELS[name]
    torch.manual_seed(0)
    net = build_model(ModelConf(family=Family.vit, library=library, name=name, pretrained="none"), THEIRS).model.net
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return net.state_dict()


def conf(name: str, place: Path, **changes: Any) -> ModelConf:
    return ModelConf(family=Family.vit, library=MODELS[name][0], name=name, pretrained=str(place), **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("names", NAMED, ids=["list", "numbered", "id2label"])
def test_rows_of_a_kept_classifier_follow_the_names_beside_it(name: str, names: dict, tmp_path: Path) -> None:
    state = saved(name, tmp_path, names)
    head = MODELS[name][1]
    built = build_model(conf(name, tmp_path, head=HeadKind.keep), CLASSES)
    assert torch.equal(built.model.net.get_submodule(head).weight, state[f"{head}.weight"][ROWS])
    assert "; class names as the files beside them say" in built.description


@pytest.mark.parametrize("config", [{"pretrained_cfg": IMAGES}, {"architecture": "resnet10t", **IMAGES}])
@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_preprocessing_of_a_timm_folder_is_that_of_the_folder_as_a_model(
    config: dict, place: str, tmp_path: Path
) -> None:
    config = {"architecture": "resnet10t", "num_classes": 3, **copy.deepcopy(config)}
    config.get("pretrained_cfg", config).update(classifier="fc", first_conv="conv1.0")  # as timm writes it
    saved("resnet10t", tmp_path, config)
    built = build_model(conf("resnet10t", tmp_path / place), CLASSES)
    folder = build_model(ModelConf(family=Family.vit, name=f"local-dir:{tmp_path}"), CLASSES)
    assert built.preprocess == folder.preprocess
    assert built.preprocess.mean == (0.1, 0.2, 0.3) and built.preprocess.crop_fraction == 0.9
    assert "does not say its preprocessing" not in built.description


def test_another_size_of_images_is_a_question(tmp_path: Path) -> None:
    saved("glyph_vit", tmp_path, {"pretrained_cfg": {**IMAGES, "input_size": [3, 64, 64]}})
    with pytest.raises(UserError, match=r"config\.json: its input_size is 64 x 64 pixels .* model\.image_size=64 \(as"):
        build_model(conf("glyph_vit", tmp_path), CLASSES)
    assert build_model(conf("glyph_vit", tmp_path, image_size=64), CLASSES).preprocess.size == 64


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained_cfg": {"mean": "x"}},
        {"pretrained_cfg": {"std": [0, 1, 1]}},
        {"pretrained_cfg": {"crop_pct": 7}},
        {"pretrained_cfg": {"crop_mode": "fold"}},
        {"pretrained_cfg": {"input_size": [3, 8]}},
        {"label_names": 3},
        [],
    ],
    ids=str,
)
def test_senseless_entries_are_a_line_about_the_file(config: Any, tmp_path: Path) -> None:
    saved("glyph_vit", tmp_path, config)
    with pytest.raises(UserError, match=r"config\.json cannot be used: ") as caught:
        build_model(conf("glyph_vit", tmp_path), CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [["cat", "ant"], [*THEIRS, "dog"], {"1": "cat", "2": "ant", "3": "bee"}])
def test_other_numbers_of_names_than_rows_are_refused(names: Any, tmp_path: Path) -> None:
    saved("glyph_vit", tmp_path, {"label_names": names})
    known = 2 if len(names) == 2 else 4
    with pytest.raises(UserError, match=rf"into 3 classes and {known} names are known of them .*, so nothing says"):
        build_model(conf("glyph_vit", tmp_path, head=HeadKind.keep), CLASSES)
    build_model(conf("glyph_vit", tmp_path, head=HeadKind.random), CLASSES)


def test_transformers_files_say_network_names_and_images(tmp_path: Path) -> None:
    program = next(iter(transformers_layouts(Wanted.by(timm.create_model("vit_tiny_patch16_224"))))).program
    net = torch.nn.Sequential(torch.nn.GELU(), torch.nn.LayerNorm(3))
    own = Preprocess(16, (0.5,) * 3, (0.5,) * 3)
    path = tmp_path / "model.safetensors"
    assert "no config.json beside them" in read_beside(path, program, net, Beside()).note
    config = {"hidden_act": "quick_gelu", "layer_norm_eps": 0.5, "id2label": {"1": "bee", "0": "ant"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    found = read_beside(path, program, net, Beside())
    assert found.network == Network("quick_gelu", 0.5) and net[1].eps == 0.5
    assert [*found.named.values()] == [["ant", "bee"]]
    expected = Preprocess(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert found.preprocess(own, 0) == expected
    assert found.note == "; quick_gelu, norms with epsilon 0.5 as its config.json says"


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": True, "rescale_factor": 0.00392156862745098},
        {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
        {"image_mean": [127.5] * 3, "image_std": [60.0] * 3, "do_rescale": False},
        {"image_mean": [0.1] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    ],
    ids=str,
)
def test_pixels_are_those_of_transformers_processor(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = read_beside(tmp_path / "w.pt", "", torch.nn.GELU(), Beside()).preprocess(
        Preprocess(16, (0.9,) * 3, (0.9,) * 3), 0
    )
    pixel = 100.0  # the steps of transformers' processors, in their order
    expected = pixel * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else pixel
    expected -= settings.get("rescale_offset", 0)
    if settings.get("do_normalize", True):
        expected = (expected - settings["image_mean"][0]) / settings["image_std"][0]
    assert (pixel / 255 - found.mean[0]) / found.std[0] == pytest.approx(expected, rel=1e-5)


def test_names_by_number() -> None:
    assert names_of({"1": "b", "0": "a"}) == ["a", "b"] and names_of({"2": "c", "0": "a"}) == ["a", "", "c"]
    assert names_of({"10": "k", "9": "j"}) == [""] * 9 + ["j", "k"]
    assert names_of({"x": "a", "1": "b"}) == [] == names_of({"9999999": "a"})
    assert names_of(None) is names_of({}) is names_of({"0": "LABEL_0", "1": "LABEL_1"}) is None


CLIP_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub folder of open_clip without its configuration; the name ViT-B-32 builds the same network."""
    import open_clip

    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(CLIP_CFG))
    save_file(open_clip.CLIP(**CLIP_CFG).state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def clip_config(folder: Path, **changes: Any) -> None:
    images = {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "longest"}
    config = {"model_cfg": {**CLIP_CFG, **changes}, "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def test_preprocessing_of_an_open_clip_folder(clip_folder: Path) -> None:
    clip_config(clip_folder)
    for name in ("ViT-B-32", f"local-dir:{clip_folder}"):
        built = build_model(ModelConf(name=name, pretrained=str(clip_folder), head=HeadKind.random), CLASSES)
        found = built.preprocess
        assert (found.mean, found.interpolation, found.resize) == ((0.1, 0.2, 0.3), "bilinear", "pad")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quick_gelu": True}, "has quick_gelu=True and ViT-B-32 has False"),
        ({"vision_cfg": {**CLIP_CFG["vision_cfg"], "image_size": 24}}, "has image_size=24 and ViT-B-32 has 16"),
    ],
)
def test_an_open_clip_folder_of_another_model_is_refused(changes: dict, words: str, clip_folder: Path) -> None:
    clip_config(clip_folder, **changes)
    file = clip_folder / "open_clip_model.safetensors"
    for place in (clip_folder, file):
        with pytest.raises(UserError, match=rf"{words}; use model\.name=local-dir:{clip_folder}, without"):
            build_model(ModelConf(name="ViT-B-32", pretrained=str(place), head=HeadKind.random), CLASSES)
    if "quick_gelu" in changes:
        build_model(ModelConf(name=f"local-dir:{clip_folder}", head=HeadKind.random), CLASSES)


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"head_width": 16}, r"resblocks\.0\.attn\.num_heads is 2 there and 4 here"),
        ({"pool_type": "avg"}, r"pool_type is avg there and tok here"),
        ({"act_kwargs": {"approximate": "tanh"}}, r"gelu\.type is gelu_tanh there and gelu here"),
        ({"norm_kwargs": {"eps": 1e-6}}, r"eps is 1e-06 there and 1e-05 here"),
        ({"patch_dropout": 0.5, "image_size": [16, 16], "mlp_ratio": 4.0, "timm_drop_path": 0.1}, ""),
    ],
    ids=str,
)
def test_towers_of_other_heads_pooling_or_activation(vision: dict, words: str, clip_folder: Path) -> None:
    clip_config(clip_folder, vision_cfg={**CLIP_CFG["vision_cfg"], **vision})
    settings = ModelConf(name="ViT-B-32", pretrained=str(clip_folder), head=HeadKind.random, image_size=16)
    if not words:
        build_model(settings, CLASSES)
        return
    with pytest.raises(UserError, match=rf"{words}.*use model\.name=local-dir:{clip_folder}, without"):
        build_model(settings, CLASSES)


TINY = {"embed_dim": 48, "depth": 1, "img_size": 32}


@pytest.mark.parametrize(
    ("architecture", "args", "words"),
    [
        ("vit_tiny_patch16_224", {"num_heads": 4}, r"blocks\.0\.attn\.num_heads is 4 there and 3 here"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, r"act\.type is quick_gelu there and gelu here"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, r"global_pool is avg there and token here"),
        ("vit_tiny_patch16_224.augreg_in21k", {}, ""),
        ("deit_tiny_patch16_224", {"drop_path_rate": 0.1, "num_classes": 3}, ""),
        ("vit_tiny_patch16_224", {"num_heads": 3, "dynamic_img_size": True, "act_layer": "gelu"}, ""),
        ("vit_of_somebody", {"num_heads": 4}, ""),
        ("vit_tiny_patch16_224", {"embed_dim": "wide"}, "describes no model of timm"),
    ],
    ids=str,
)
def test_a_timm_folder_of_another_network(
    architecture: str, args: dict, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**TINY, **given}))
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": args}))
    settings = ModelConf(family=Family.vit, name="vit_tiny_patch16_224", pretrained=str(tmp_path), image_size=32)
    if not words:
        build_model(settings, CLASSES)
        return
    with pytest.raises(UserError, match=words):
        build_model(settings, CLASSES)


@pytest.mark.parametrize("args", [{}, {"num_heads": 4, "global_pool": "avg"}, {"drop_path_rate": 0.1, "img_size": 48}])
def test_folders_that_timm_writes_fit_their_own_model(args: dict, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=3, **args)
    timm.models.save_for_hf(net, str(tmp_path), model_config={"label_names": THEIRS}, safe_serialization=True)
    size = {"image_size": args["img_size"]} if "img_size" in args else {}
    names = [f"local-dir:{tmp_path}"] + ["test_vit"] * ("num_heads" not in args)
    for name in names:
        pretrained = str(tmp_path) if name == "test_vit" else "bundled"
        build_model(ModelConf(family=Family.vit, name=name, pretrained=pretrained, **size), CLASSES)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "resnetv2_50x1_bit"])
def test_a_jax_archive_with_another_first_kernel_is_refused(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    out, read, height, width = next(
        module.weight.shape for module in net.modules() if isinstance(module, torch.nn.Conv2d)
    )
    check_archive_stem({"bias": (out,), "img/embedding/kernel": (height, width, read, out)}, net, tmp_path)
    check_archive_stem({"img/embedding/kernel": (height, width, 1, out)}, net, tmp_path)
    np.savez(tmp_path / "w.npz", **{"embedding/kernel": np.zeros((2 * height, 2 * width, read, out), np.float32)})
    settings = ModelConf(family=Family.vit, library=Library.timm, name=name, pretrained=str(tmp_path / "w.npz"))
    with pytest.raises(UserError, match=r"w\.npz holds the weights of another model .* check model\.name"):
        build_model(settings, CLASSES)
