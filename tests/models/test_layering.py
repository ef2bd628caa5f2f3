"""In every architecture each parameter belongs to one layer, and layers follow the order of the forward pass."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
from first_use import check_layers, out_of_order, torchvision_on_meta
from timm.optim import param_groups_layer_decay
from torch import nn

from finetune.config import LayerRule, OptimConf
from finetune.core.layers import Layer, LayeredModel
from finetune.core.optim import param_groups
from finetune.core.ownership import assign_layers
from finetune.models.layering.rules import Rule, ordered_layers
from finetune.models.layering.timm_networks import MATCHERS
from finetune.models.layering.towers import open_clip_layers, timm_layers, torchvision_layers
from finetune.models.upstream import from_torchvision

warnings.filterwarnings("ignore")

# One network of each kind of rule; the slow tests below take every name of the three libraries.
TIMM = [
    "vit_base_patch16_clip_224", "vit_srelpos_small_patch16_224", "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224", "vit_small_patch16_rope_mixed_224", "swin_tiny_patch4_window7_224", "convnext_atto",
    "resnet18", "efficientnet_b0", "cait_xxs24_224", "poolformer_s12", "pit_ti_distilled_224", "efficientvim_m1",
    "vgg11_bn", "selecsls42", "densenet121", "naflexvit_base_patch16_gap",
]  # fmt: skip
OPEN_CLIP = [
    "ViT-B-16", "RN50", "coca_ViT-B-32", "EVA02-B-16", "ViT-B-16-SigLIP", "convnext_base",
    "vit_medium_patch16_gap_256",
]  # fmt: skip
TORCHVISION = [
    "convnext_tiny", "efficientnet_b0", "maxvit_t", "regnet_y_400mf", "resnet18", "swin_t", "vit_b_16",
]  # fmt: skip


def timm_on_meta(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def visual_on_meta(name: str) -> Any:
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta").visual


def tv_on_meta(name: str) -> Any:
    with torchvision_on_meta():
        return torchvision.models.get_model(name, weights=None)


def images_for(*size: int) -> torch.Tensor:
    return torch.empty(2, *size, device="meta")


def check_timm(name: str, *, order: bool = True) -> LayeredModel | None:
    net = timm_on_meta(name)
    layers = timm_layers(net)
    ids = check_layers(net, layers)
    assert not order or not out_of_order(net, ids, images_for(*net.pretrained_cfg["input_size"])), name
    if layers[-1].name != "head":
        return None  # an encoder, without a classifier of its own
    model = LayeredModel(net, layers)
    if type(net).__name__ == "Cait" or type(net).__name__ not in MATCHERS:
        assert scales_of(model, LayerRule.timm) == timm_scales(net), name
    return model


def scales_of(model: LayeredModel, rule: LayerRule) -> dict[str, float]:
    groups = param_groups(model, OptimConf(layer_decay=0.5, layer_rule=rule))
    return {name: group["scale"] for group in groups for name in group["param_names"]}


def timm_scales(net: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = param_groups_layer_decay(net, layer_decay=0.5)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def check_tower(name: str) -> None:
    visual = visual_on_meta(name)
    size = visual.image_size if isinstance(visual.image_size, (tuple, list)) else [visual.image_size] * 2
    ids = check_layers(visual, open_clip_layers(visual))
    assert not out_of_order(visual, ids, images_for(3, *size)), name


def check_torchvision(name: str) -> None:
    net = tv_on_meta(name)
    ids = check_layers(net, torchvision_layers(net))
    assert not out_of_order(net, ids, images_for(3, 224, 224)), name


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_covered_in_order_and_timms_scales_are_reproduced(name: str) -> None:
    check_timm(name)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_towers_are_covered_in_order(name: str) -> None:
    check_tower(name)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_are_covered_in_order(name: str) -> None:
    check_torchvision(name)


@pytest.mark.registry
@pytest.mark.timeout(0)
def test_all_of_timm(capsys: pytest.CaptureFixture[str]) -> None:
    names, start, structures = timm.list_models(), time.monotonic(), set()
    for name in names:
        # Networks whose names differ only in numbers differ only in depth and width: one forward pass for all.
        net = timm_on_meta(name)
        structure = (type(net), frozenset(re.sub(r"\d+", "#", key) for key in net.state_dict()))
        check_timm(name, order=structure not in structures)
        structures.add(structure)
    report(capsys, f"timm: {len(names)} of {len(names)} covered, {len(structures)} structures run", start)


@pytest.mark.registry
@pytest.mark.timeout(0)
def test_all_of_open_clip(capsys: pytest.CaptureFixture[str]) -> None:
    names, start, skipped = open_clip.list_models(), time.monotonic(), []
    for name in names:
        try:
            check_tower(name)
        except (RuntimeError, ImportError) as error:
            if "transformers" not in str(error):
                raise
            skipped.append(name)
    covered = len(names) - len(skipped)
    left_out = f"left out, as transformers is not installed: {', '.join(skipped)}"
    report(capsys, f"open_clip: {covered} of {covered} covered; {left_out}", start)


@pytest.mark.registry
@pytest.mark.timeout(0)
def test_all_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    names, start = from_torchvision.names(), time.monotonic()
    for name in names:
        check_torchvision(name)
    report(capsys, f"torchvision: {len(names)} of {len(names)} covered", start)


def report(capsys: pytest.CaptureFixture[str], text: str, start: float) -> None:
    with capsys.disabled():
        print(f"\n{text} ({time.monotonic() - start:.0f} s)")


# Leaf modules run in the order of the layers too, also those without parameters.


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), "resnet18", "levit_128s"])
def test_leaf_modules_run_in_the_order_of_layers(name: str) -> None:
    net = timm.create_model(name).eval()
    layers = timm_layers(net)
    owners = {owned: number for number, layer in enumerate(layers) for owned in layer.owns}
    ran: list[tuple[int, str]] = []
    for path, module in net.named_modules():
        beside = path.endswith("flatten") or "head_dist" in path  # an Identity behind the classifier, a second head
        if path and not any(True for _ in module.children()) and not beside:
            parts = path.split(".")
            (number,) = {owners[p] for end in range(1, len(parts) + 1) if (p := ".".join(parts[:end])) in owners}
            module.register_forward_pre_hook(lambda *_, number=number, path=path: ran.append((number, path)))
    with torch.no_grad():
        net(torch.randn(1, *net.pretrained_cfg["input_size"]))
    assert ran == sorted(ran, key=lambda step: step[0])


def owners_of(layers: list[Layer], net: nn.Module) -> dict[str, str]:
    return {name: layers[number].name for name, number in assign_layers(net, layers).items()}


def test_tokens_and_pre_norm_are_stem_and_the_final_norm_is_readout() -> None:
    net = timm_on_meta("vit_base_patch16_clip_224")
    owner = owners_of(timm_layers(net), net)
    assert {owner[f"norm_pre.{part}"] for part in ("weight", "bias")} == {"stem"}
    assert owner["norm.weight"] == "readout"
    net = timm_on_meta("vit_small_patch14_reg4_dinov2.lvd142m")
    assert owners_of(timm_layers(net), net)["reg_token"] == "stem"


def test_tables_that_all_blocks_share_are_stem() -> None:
    for name, table in [
        ("vit_srelpos_small_patch16_224", "shared_rel_pos.mlp.fc1.weight"),
        ("vit_small_patch16_rope_mixed_224", "rope.freqs"),
    ]:
        net = timm_on_meta(name)
        assert owners_of(timm_layers(net), net)[table] == "stem"
    with torch.device("meta"):
        net = timm.create_model("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False)
    assert owners_of(timm_layers(net), net)["rel_pos_bias.relative_position_bias_table"] == "stem"


def test_downsampling_belongs_to_the_block_that_it_leads_into() -> None:
    net = timm_on_meta("convnext_atto")
    owner = owners_of(timm_layers(net), net)
    assert owner["stages.1.downsample.0.weight"] == owner["stages.1.blocks.0.conv_dw.weight"] == "block.3"
    net = tv_on_meta("convnext_tiny")
    owner = owners_of(torchvision_layers(net), net)
    assert owner["features.2.1.weight"] == owner["features.3.0.block.0.weight"] == "block.4"


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
        ("levit_128s", {"head.linear", "head_dist.linear"}),
        ("convnext_atto", {"head.fc"}),
        ("efficientvim_m1", {"weights", "heads"}),
        ("vgg11_bn", {"head.fc"}),
    ],
)
def test_the_head_is_the_classifier_alone(name: str, heads: set[str]) -> None:
    assert set(timm_layers(timm_on_meta(name))[-1].owns) == heads


def test_a_bare_tower_ends_with_its_readout() -> None:
    with torch.device("meta"):
        net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    assert [layer.name for layer in timm_layers(net)][-2:] == ["block.12", "readout"]


def test_the_text_tower_and_the_logit_scale_are_no_image_layers() -> None:
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-32", device="meta")
    with pytest.raises(ValueError, match=r"model\.visual"):
        open_clip_layers(clip)
    assert not any("logit_scale" in name for layer in open_clip_layers(clip.visual) for name in layer.owns)


def test_a_parameter_that_no_rule_places_is_an_error_that_names_it() -> None:
    net = timm_on_meta("test_vit")
    net.adapter = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match=r"'adapter\.weight' and 1 more"):
        timm_layers(net)
    with pytest.raises(ValueError, match=r"'bias'"):
        ordered_layers(nn.Linear(2, 2), Rule({"stem": "weight", "blocks": r"blocks\.(\d+)"}))


def test_networks_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="group_matcher"):
        timm_layers(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="torchvision"):
        torchvision_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="image tower"):
        open_clip_layers(nn.Linear(2, 2))
