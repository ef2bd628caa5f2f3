"""Weights of transformers' networks in stages, and of SigLIP2's for images of any form, give the same outputs here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.build import BuiltModel
from finetune.system.errors import UserError

CLASSES = ["cat", "dog", "eel"]
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: row for row, name in enumerate(CLASSES)}}
TOLERANCE = 1e-5  # of the spread of the outputs
# What transformers 5 saves; a test compares it with transformers where that is installed.
NAMES = Path(__file__).parent.parent / "golden" / "transformers_stage_names.json"

SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
SWIN_TIMM = {
    **{"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "patch_size": 2}
}
CONVNEXT = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1]}
CONVNEXT_TIMM = {"dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8}
BEIT_TIMM = {"embed_dim": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2, "img_size": 32, "patch_size": 8}
NAFLEX_TIMM = {
    **{"embed_dim": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8, "pos_embed_grid_size": (4, 4)}
}
# The class there, its settings, the name here, and what makes timm's network as small.
NETWORKS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "swin": ("SwinForImageClassification", SWIN, "swin_tiny_patch4_window7_224", SWIN_TIMM),
    "swin_act": (
        *("SwinForImageClassification", {**SWIN, "hidden_act": "gelu_new"}),
        *("swin_tiny_patch4_window7_224", SWIN_TIMM),
    ),
    "convnext": ("ConvNextForImageClassification", CONVNEXT, "convnext_tiny", CONVNEXT_TIMM),
    "convnextv2": ("ConvNextV2ForImageClassification", CONVNEXT, "convnextv2_tiny", CONVNEXT_TIMM),
    "dinov3_convnext": ("DINOv3ConvNextModel", CONVNEXT, "convnext_tiny", CONVNEXT_TIMM),
    "beit_shared": (
        *("BeitForImageClassification", {**SMALL, "image_size": 32, "use_shared_relative_position_bias": True}),
        "beit_base_patch16_224",
        {**BEIT_TIMM, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "data2vec": (
        *("Data2VecVisionForImageClassification", {**SMALL, "image_size": 32, "use_relative_position_bias": True}),
        *("beit_base_patch16_224", BEIT_TIMM),
    ),
    "naflex": ("Siglip2VisionModel", {**SMALL, "num_patches": 16}, "naflexvit_base_patch16_siglip", NAFLEX_TIMM),
}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes timm build the small network of a layout, whatever the name's size is."""
    whole = timm.create_model

    def shrink(layout: str) -> None:
        args = NETWORKS[layout][3]
        monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **args}))

    return shrink


def theirs_of(transformers, layout: str) -> nn.Module:
    """A small network of transformers with random numbers of ordinary size in all its parameters."""
    kind, settings, _, _ = NETWORKS[layout]
    stem = kind.removesuffix("ForImageClassification").removesuffix("Model")
    config = getattr(transformers, f"{stem}Config")
    labels = LABELS if kind.endswith("Classification") else {}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(**settings, **labels))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = any(word in name for word in ("lambda", "layer_scale", "gamma"))
            parameter.add_(torch.randn_like(parameter) * (0.5 if is_scale else 0.15))
    return model.eval()


def ours_of(layout: str, place: Path, head: HeadKind) -> BuiltModel:
    name = NETWORKS[layout][2]
    conf = ModelConf(family=Family.vit, library=Library.timm, name=name, pretrained=str(place), head=head)
    return build_model(conf, CLASSES)


def of_patches(images: Tensor) -> dict[str, Tensor]:
    """What transformers' processor makes of images of 32 pixels: (batch, 16 patches, 8 * 8 * 3)."""
    count = len(images)
    patches = images.reshape(count, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(count, 16, -1)
    mask = torch.ones(count, 16, dtype=torch.long)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]] * count)}


@pytest.mark.parametrize("is_live", [False, True], ids=["saved", "live"])
@pytest.mark.parametrize("layout", NETWORKS)
def test_outputs_are_those_of_transformers(layout: str, is_live: bool, transformers, small_timm, tmp_path) -> None:
    theirs = theirs_of(transformers, layout)
    theirs.save_pretrained(tmp_path)
    if is_live:  # what `torch.save(model.state_dict())` writes
        (tmp_path / "model.safetensors").unlink()
        torch.save({"state_dict": theirs.state_dict(), "epoch": 1}, tmp_path / "trained.pth")
    small_timm(layout)
    classifies = NETWORKS[layout][0].endswith("Classification")
    built = ours_of(layout, tmp_path, HeadKind.keep if classifies else HeadKind.random)
    net = built.model.net.eval()
    side = 64 if "convnext" in layout else 32
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = theirs(**of_patches(images)) if layout == "naflex" else theirs(images)
        if classifies:
            expected, got = out.logits, built.model.eval()(images)
        else:
            expected, got = out.pooler_output, net.forward_head(net.forward_features(images), pre_logits=True)
    difference = (got - expected).abs().max().item()
    print(f"largest difference {difference:.1e} of outputs that spread by {expected.std():.2f}")
    assert difference <= TOLERANCE * expected.std() and expected.std() > 0.1
    assert "; in transformers' " in built.description and "left out" not in built.description
    assert ("gelu_tanh as its config.json says" in built.description) == (layout == "swin_act")


def recorded(transformers, layout: str) -> dict[str, list[int]]:
    """Names and shapes of what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        theirs_of(transformers, layout).save_pretrained(folder)
        return {name: list(tensor.shape) for name, tensor in load_file(f"{folder}/model.safetensors").items()}


def test_the_recorded_names_are_those_of_transformers(transformers, update_golden: bool) -> None:
    found = {layout: recorded(transformers, layout) for layout in NETWORKS}
    if update_golden:
        NAMES.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(NAMES.read_text(encoding="utf-8"))


def tensors_of(layout: str) -> dict[str, Tensor]:
    """Random numbers under the recorded names, in a large file's place; all different."""
    shapes = json.loads(NAMES.read_text(encoding="utf-8"))[layout]
    generator = torch.Generator().manual_seed(0)
    return {f"some.prefix.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("layout", NETWORKS)
def test_recorded_names_are_read_without_transformers(layout: str, small_timm, tmp_path: Path) -> None:
    tensors = tensors_of(layout)
    # A buffer that transformers 4 saved.
    index = "some.prefix.swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    extra = {index: torch.zeros(16, 16, dtype=torch.long)} if layout == "swin" else {}
    torch.save(tensors | extra, tmp_path / "w.pt")
    small_timm(layout)
    built = ours_of(layout, tmp_path / "w.pt", HeadKind.random)
    values = {value for tensor in tensors.values() for value in tensor.flatten().tolist()}
    for name, parameter in built.model.net.named_parameters():
        is_own = name.startswith("head.") and "norm" not in name
        assert is_own or {*parameter.flatten().tolist()} <= values, name


@pytest.mark.parametrize(("layout", "name"), [("swin", "blocks.0.layernorm_after.bias"), ("convnext", "1.dwconv.bias")])
def test_a_tensor_too_few_or_a_block_too_many_is_another_model(
    layout: str, name: str, small_timm, tmp_path: Path
) -> None:
    tensors, path = tensors_of(layout), tmp_path / "w.pt"
    full = next(each for each in tensors if each.endswith(name))
    torch.save({each: tensor for each, tensor in tensors.items() if each != full}, path)
    small_timm(layout)
    with pytest.raises(UserError, match=r"1 missing: .*check model\.name"):
        ours_of(layout, path, HeadKind.random)
    last = "encoder.layers.1.blocks.1" if layout == "swin" else "encoder.stages.1.layers.1"
    more = {each.replace(last, f"{last[:-1]}2"): tensor for each, tensor in tensors.items() if last in each}
    torch.save(tensors | more, path)
    with pytest.raises(UserError, match=r"unexpected: .*check model\.name"):
        ours_of(layout, path, HeadKind.random)
