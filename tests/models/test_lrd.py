"""`param_groups_lrd`: the published rule, parameter by parameter, and the lines that people paste."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import finetune
from finetune import SchedulerConf, create_scheduler, param_groups_lrd
from finetune.config import Family, ModelConf, OptimConf
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.optim import build_optimizer
from finetune.models import build_model


def clip_whole() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    return open_clip.CLIP(24, vision, {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2})


def vit(**changes: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    args = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 5,
        "reg_tokens": 2,
    }
    return VisionTransformer(**{**args, **changes})


def layered() -> LayeredModel:
    return build_model(ModelConf(family=Family.vit, name="glyph_vit"), ["a", "b"]).model


# Ids as MKT, BEiT and MAE give them (L = 3, so final norm, proj and head are 4), written out by hand.
CLIP_IDS = {
    "class_embedding": 0,
    "positional_embedding": 0,
    "conv1.*": 0,
    "ln_pre.*": 0,
    "transformer.resblocks.0.*": 1,
    "transformer.resblocks.1.*": 2,
    "transformer.resblocks.2.*": 3,
    "ln_post.*": 4,
    "proj": 4,
}
VIT_IDS = {
    "cls_token": 0,
    "reg_token": 0,  # MKT and MAE, older than registers, would send these to the top
    "pos_embed": 0,
    "patch_embed.*": 0,
    "norm_pre.*": 0,
    "blocks.0.*": 1,
    "blocks.1.*": 2,
    "blocks.2.*": 3,
    "norm.*": 4,
    "head.*": 4,
}
# Never decayed: 1-D tensors, and these.
SPARED = ("class_embedding", "positional_embedding", "cls_token", "reg_token", "pos_embed")


@pytest.mark.parametrize(("model", "ids"), [(clip_whole().visual, CLIP_IDS), (vit(pre_norm=True), VIT_IDS)])
@pytest.mark.parametrize("fix_layer", [-1, 0, 2, 3])
def test_groups_equal_the_published_rule_parameter_by_parameter(model: nn.Module, ids: dict, fix_layer: int) -> None:
    groups, names = param_groups_lrd(model, fix_layer, 0.1, layer_decay=0.65)
    found = {}
    for key, group in zip(names, groups, strict=True):
        assert set(group) == {"params", "weight_decay", "lr_scale"}
        for name, parameter in zip(names[key]["params"], group["params"], strict=True):
            assert model.get_parameter(name) is parameter
            found[name] = (group["lr_scale"], group["weight_decay"])
    expected = {}
    for name, parameter in model.named_parameters():
        (layer_id,) = (value for glob, value in ids.items() if fnmatchcase(name, glob))
        if layer_id > fix_layer:
            decay = 0.0 if parameter.ndim == 1 or name in SPARED else 0.1
            expected[name] = (0.65 ** (4 - layer_id), decay)
    assert found == expected


def test_group_names_are_those_of_the_published_function() -> None:
    _, names = param_groups_lrd(vit())
    kinds = ("decay", "no_decay")
    assert sorted(names) == sorted(f"layer_{i}_{kind}" for i in range(5) for kind in kinds)
    assert names["layer_4_no_decay"]["params"] == ["norm.weight", "norm.bias", "head.bias"]


def test_arguments_may_be_given_by_position_as_the_published_function_takes_them() -> None:
    groups, names = param_groups_lrd(vit(), 0, 0.3, ["blocks.1.mlp.fc1.weight", "*.attn.proj.weight"], 0.5)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    spared = [name for key in names if key.endswith("no_decay") for name in names[key]["params"]]
    assert "blocks.1.mlp.fc1.weight" in spared and "blocks.2.attn.proj.weight" in spared
    assert "blocks.0.mlp.fc1.weight" not in spared
    assert "layer_0_decay" not in names
    assert groups[0]["lr_scale"] == 0.5**3


def test_with_lr_the_rates_are_baked_and_no_scale_is_left() -> None:
    groups, names = param_groups_lrd(vit(), layer_decay=0.5, lr=0.1)
    assert all("lr_scale" not in group for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=123.0)
    rates = {key: group["lr"] for key, group in zip(names, optimizer.param_groups, strict=True)}
    assert rates["layer_0_decay"] == 0.1 * 0.5**4
    assert rates["layer_4_decay"] == 0.1


@pytest.mark.parametrize("lr_given", [False, True])
def test_the_lines_that_people_paste_are_right_as_pasted(lr_given: bool) -> None:
    lr = 0.01
    groups, names = param_groups_lrd(clip_whole().visual, layer_decay=0.75, **({"lr": lr} if lr_given else {}))
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = create_scheduler(SchedulerConf(mode="cosine_pi"), optimizer, 10)
    scales = [0.75 ** (4 - int(key.split("_")[1])) for key in names]
    for epoch in range(10):
        factor = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * epoch / 10, dtype=torch.float64)).item()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * s * factor for s in scales])
        optimizer.step()
        scheduler.step()
    assert all("lr_scale" not in group for group in optimizer.param_groups)


def test_on_a_layered_model_the_same_groups_as_our_own_optimizer() -> None:
    model = layered()
    groups, names = param_groups_lrd(model, 2, 0.05, layer_decay=0.75, lr=1e-3)
    freeze(model, 2)
    own = build_optimizer(model, OptimConf(lr=1e-3, layer_decay=0.75, weight_decay=0.05)).param_groups
    ours = {id(p): (group["lr"], group["weight_decay"]) for group in own for p in group["params"]}
    theirs = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert ours == theirs
    known = dict(model.named_parameters())
    assert all(name in known for group in names.values() for name in group["params"])


def test_requires_grad_is_left_alone_and_frozen_parameters_enter_no_group() -> None:
    model = vit()
    model.blocks[2].attn.qkv.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    _, names = param_groups_lrd(model, 1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any("blocks.2.attn.qkv.weight" in group["params"] for group in names.values())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_models_keep_their_wrapped_names(prefix: str) -> None:
    bare = vit()
    wrapped: nn.Module = bare
    for name in reversed(prefix.rstrip(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    groups, names = param_groups_lrd(wrapped, 1)
    bare_groups, bare_names = param_groups_lrd(bare, 1)
    known = dict(wrapped.named_parameters())
    assert all(name in known for group in names.values() for name in group["params"])
    assert [g["lr_scale"] for g in groups] == [g["lr_scale"] for g in bare_groups]
    assert names["layer_2_decay"]["params"] == [prefix + name for name in bare_names["layer_2_decay"]["params"]]


def test_a_torch_compiled_model_is_known_by_its_inside() -> None:
    groups, names = param_groups_lrd(torch.compile(vit()), -1)
    assert names["layer_4_decay"]["params"] == ["_orig_mod.head.weight"]
    assert len(groups) == 10


def test_a_whole_clip_is_refused_because_its_blocks_are_the_text_towers() -> None:
    with pytest.raises(ValueError, match=r"CLIP holds two towers: pass its image tower, model\.visual"):
        param_groups_lrd(clip_whole())


def test_the_two_towers_of_a_custom_text_clip_are_told_apart_too() -> None:
    import open_clip

    vision = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match=r"model\.visual"):
        param_groups_lrd(open_clip.CustomTextCLIP(24, vision, text))


@pytest.mark.parametrize("fix_layer", [-2, 4, 10])
def test_fix_layer_beyond_a_bare_tower_names_the_range(fix_layer: int) -> None:
    with pytest.raises(ValueError, match=r"layers 0 \(stem\) to 4, so use -1 \(nothing frozen\) to 3"):
        param_groups_lrd(vit(), fix_layer)


def test_on_a_layered_model_the_head_alone_may_learn() -> None:
    model = layered()
    _, names = param_groups_lrd(model, model.num_blocks + 1)
    assert [name for group in names.values() for name in group["params"]] == ["net.head.weight", "net.head.bias"]
    with pytest.raises(ValueError, match="fix_layer"):
        param_groups_lrd(model, model.num_blocks + 2)


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.01])
def test_layer_decay_out_of_range_is_refused(layer_decay: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay=.*greater than 0 and at most 1"):
        param_groups_lrd(vit(), layer_decay=layer_decay)


def test_a_model_without_classifier_and_somebodys_subclass_are_towers_too() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class MaskedAutoencoderVit(VisionTransformer):
        """As MAE's and BEiT's repositories define theirs."""

    _, names = param_groups_lrd(vit(num_classes=0))
    assert names["layer_4_no_decay"]["params"] == ["norm.weight", "norm.bias"]
    model = MaskedAutoencoderVit(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    _, names = param_groups_lrd(model)
    assert names["layer_4_decay"]["params"] == ["head.weight"]


def test_the_three_names_are_importable_from_the_package() -> None:
    assert {"SchedulerConf", "create_scheduler", "param_groups_lrd"} <= set(finetune.__all__)
