"""Ids and scales equal the published rules, parameter by parameter. The rules stand here a second time, by hand.

Sources: MKT (arXiv:2207.01887) utils/lr_decay.py; BEiT (arXiv:2106.08254) optim_factory.py; MAE (arXiv:2111.06377)
util/lr_decay.py; FT-CLIP (arXiv:2212.06138) optim_factory.py; timm 1.0 param_groups_layer_decay; open_clip's trainer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch

from finetune.config import LayerRule, OptimConf
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.optim import param_groups
from finetune.models.heads.head import Head, TowerWithHead
from finetune.models.layering.towers import open_clip_layers, spared_names, timm_layers, tower_with_head_layers

warnings.filterwarnings("ignore")

Published = Callable[[str, int], int]


def by_prefix(*stem: str, blocks: str) -> Published:
    """Id 0 for these beginnings, i + 1 for block i, and L + 1 for whatever is left: the shape of all four rules."""

    def layer_id(name: str, num_blocks: int) -> int:
        if name.startswith(stem):
            return 0
        match = re.match(rf"{blocks}\.(\d+)\.", name)
        return int(match[1]) + 1 if match else num_blocks + 1

    return layer_id


MKT_CLIP = by_prefix(
    *("class_embedding", "positional_embedding", "conv1", "ln_pre", "cls_token", "pos_embed", "patch_embed"),
    blocks=r"transformer\.resblocks",
)
MKT_VIT = by_prefix("cls_token", "pos_embed", "patch_embed", blocks="blocks")
BEIT = by_prefix("cls_token", "mask_token", "pos_embed", "patch_embed", blocks="blocks")
MAE = by_prefix("cls_token", "pos_embed", "patch_embed", blocks="blocks")
FT_CLIP = by_prefix(
    *("class_embedding", "cls_token", "mask_token", "pos_embed", "positional_embedding", "patch_embed", "conv1"),
    "ln_pre",
    blocks=r"(?:transformer\.resblocks|blocks)",
)

# The four exceptions. The published rules send these to the top, at the head's rate: tokens and a norm that stand
# ahead of the first block, and a table that every block reads, so that no prefix could be frozen below it.
EXCEPTIONS = ("reg_token", "dist_token", "norm_pre", "rel_pos_bias")


def on_meta(name: str) -> tuple[LayeredModel, str]:
    """The model, and what stands ahead of its tower's own names."""
    with torch.device("meta"):
        if name.startswith("ViT-"):
            clip: Any = open_clip.create_model(name, device="meta")
            net: Any = TowerWithHead(clip.visual, Head(clip.visual.output_dim, 10))
            layers, prefix = tower_with_head_layers(open_clip_layers(clip.visual)), "visual."
        else:
            shared = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False} if name.startswith("beit") else {}
            net = timm.create_model(name, num_classes=10, **shared)
            layers, prefix = timm_layers(net), ""
    return LayeredModel(net, layers, no_weight_decay=spared_names(net)), prefix


CASES = [
    ("vit_base_patch16_224", 12, [MKT_VIT, BEIT, MAE, FT_CLIP]),
    ("vit_base_patch16_clip_224", 12, [MKT_VIT, BEIT, MAE]),
    ("vit_small_patch14_reg4_dinov2", 12, [MKT_VIT, BEIT, MAE]),
    ("deit_tiny_distilled_patch16_224", 12, [MKT_VIT, BEIT, MAE]),
    ("beit_base_patch16_224", 12, [MKT_VIT, BEIT, MAE]),
    ("ViT-B-16", 12, [MKT_CLIP, FT_CLIP]),
    ("ViT-L-14", 24, [MKT_CLIP, FT_CLIP]),
]
EACH = [
    pytest.param(name, blocks, rule, id=f"{name}-{n}") for name, blocks, rules in CASES for n, rule in enumerate(rules)
]


@pytest.mark.parametrize(("name", "num_blocks", "published"), EACH)
def test_ids_and_scales_are_the_published_ones(name: str, num_blocks: int, published: Published) -> None:
    model, prefix = on_meta(name)
    assert model.num_blocks == num_blocks
    decay, lr = 0.65, 3e-4
    groups = param_groups(model, OptimConf(lr=lr, layer_decay=decay))
    found = {key: group for group in groups for key in group["param_names"]}
    assert set(found) == {key for key, _ in model.net.named_parameters()}
    excepted = set()
    for key, group in found.items():
        tower_name = key.removeprefix(prefix)
        theirs = published(tower_name, num_blocks)
        if tower_name.startswith(EXCEPTIONS):
            excepted.add(tower_name.partition(".")[0])
            assert (theirs, group["layer_id"]) == (num_blocks + 1, 0)
            continue
        # They have one id for all that follows the blocks; the head's own is above it here, at the same rate.
        assert min(group["layer_id"], num_blocks + 1) == theirs, key
        assert group["scale"] == decay ** (num_blocks + 1 - theirs), key
        assert group["lr"] == lr * group["scale"]
    wanted = {
        "vit_base_patch16_clip_224": {"norm_pre"},
        "vit_small_patch14_reg4_dinov2": {"reg_token"},
        "deit_tiny_distilled_patch16_224": {"dist_token"},
    }
    assert excepted == wanted.get(name, {"rel_pos_bias"} if name.startswith("beit") else set())


def test_a_table_computed_by_hand() -> None:
    """ViT-B/16 at decay 0.65 and ViT-L/14 at 0.75: 1, d, d^2 ... d^(L+1), worked out apart from the code."""
    wanted = {
        "ViT-B-16": (
            0.65,
            {
                "conv1.weight": 0.0036972,
                "class_embedding": 0.0036972,
                "positional_embedding": 0.0036972,
                "ln_pre.bias": 0.0036972,
                "transformer.resblocks.0.attn.in_proj_weight": 0.0056880,
                "transformer.resblocks.5.mlp.c_fc.weight": 0.0490222,
                "transformer.resblocks.10.ln_1.weight": 0.4225,
                "transformer.resblocks.11.ln_2.bias": 0.65,
                "ln_post.weight": 1.0,
                "proj": 1.0,
            },
        ),
        "ViT-L-14": (
            0.75,
            {
                "conv1.weight": 0.00075254,
                "transformer.resblocks.0.ln_1.weight": 0.0010034,
                "transformer.resblocks.22.ln_1.weight": 0.5625,
                "transformer.resblocks.23.ln_1.weight": 0.75,
                "ln_post.bias": 1.0,
                "proj": 1.0,
            },
        ),
    }
    for name, (decay, table) in wanted.items():
        model, prefix = on_meta(name)
        scales = scales_of(model, LayerRule.beit, decay)
        for key, scale in table.items():
            assert scales[prefix + key] == pytest.approx(scale, rel=1e-4), key
        assert scales["head.weight"] == 1.0


def scales_of(model: LayeredModel, rule: LayerRule, decay: float = 0.65) -> dict[str, float]:
    groups = param_groups(model, OptimConf(layer_decay=decay, layer_rule=rule))
    return {name: group["scale"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_clip_224", "ViT-B-16"])
def test_timms_rule_moves_the_final_norm_one_step_down_and_nothing_else(name: str) -> None:
    """Also the rule of open_clip's own trainer: the final norm with the last block, `proj` at the top."""
    model, prefix = on_meta(name)
    beit, timms = scales_of(model, LayerRule.beit), scales_of(model, LayerRule.timm)
    norm = "ln_post" if prefix else "norm"
    changed = {f"{prefix}{norm}.weight", f"{prefix}{norm}.bias"}
    assert {key for key in beit if beit[key] != timms[key]} == changed
    assert {timms[key] for key in changed} == {0.65}


def test_timms_rule_leaves_what_is_frozen_alone() -> None:
    for fix_layer in (-1, 0, 5, 12, 13):
        frozen = []
        for rule in LayerRule:
            model, _ = on_meta("vit_base_patch16_224")
            freeze(model, fix_layer)
            groups = param_groups(model, OptimConf(fix_layer=fix_layer, layer_rule=rule))
            frozen.append({key for group in groups for key in group["param_names"]})
            names = [group["name"] for group in groups]
            assert len(set(names)) == len(names)
        assert frozen[0] == frozen[1]


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "ViT-B-16"])
def test_decay_embeddings_is_mkts_weight_decay(name: str) -> None:
    """MKT passes no list of names, so all but 1-D parameters are decayed."""
    model, _ = on_meta(name)
    groups = param_groups(model, OptimConf(weight_decay=0.05, decay_embeddings=True))
    decayed = {key: group["weight_decay"] for group in groups for key in group["param_names"]}
    for key, parameter in model.net.named_parameters():
        assert decayed[key] == (0.0 if parameter.ndim == 1 else 0.05), key


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "ViT-B-16"])
def test_weight_decay_is_beits_without_it(name: str) -> None:
    """1-D parameters, position and class embeddings are spared: the lists of BEiT, MAE and FT-CLIP together."""
    model, _ = on_meta(name)
    groups = param_groups(model, OptimConf(weight_decay=0.05))
    decayed = {key: group["weight_decay"] for group in groups for key in group["param_names"]}
    spared = ("pos_embed", "cls_token", "positional_embedding", "class_embedding")
    for key, parameter in model.net.named_parameters():
        assert decayed[key] == (0.0 if parameter.ndim == 1 or key.endswith(spared) else 0.05), key


UPSTREAM = ["xcit_nano_12_p16_224", "edgenext_xx_small", "hiera_tiny_224", "hiera_small_abswin_256", "coat_tiny"]


@pytest.mark.parametrize(
    "name", [*UPSTREAM, "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tnt_s_patch16_224"]
)
def test_weight_decay_is_that_of_timms_own_optimizers(name: str) -> None:
    """Names and globs of the network's `no_weight_decay()`, and none of the modules inside it (XCA's temperature)."""
    from timm.optim import param_groups_weight_decay

    model, _ = on_meta(name)
    net: Any = model.net
    listed = net.no_weight_decay() if name != "edgenext_xx_small" else ()  # which has no such method
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=listed)
    theirs = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    ours = {key for group in param_groups(model, OptimConf()) if group["weight_decay"] for key in group["param_names"]}
    assert ours == {key for key, parameter in net.named_parameters() if id(parameter) in theirs}


def test_beits_tables_decay_as_in_its_authors_code_and_those_of_swin_do_not() -> None:
    for name in ("beit_base_patch16_224", "beitv2_base_patch16_224"):
        with torch.device("meta"):
            net = timm.create_model(name, num_classes=10)
        model = LayeredModel(net, timm_layers(net), no_weight_decay=spared_names(net))
        tables = [key for key, _ in net.named_parameters() if key.endswith("relative_position_bias_table")]
        groups = param_groups(model, OptimConf())
        found = {key: group["weight_decay"] > 0 for group in groups for key in group["param_names"]}
        assert len(tables) == 12 and all(found[key] for key in tables)
    from torchvision.models import swin_t

    with torch.device("meta"):
        swin = swin_t()
    spared = spared_names(swin)
    assert len(spared) == 12 and all(key.endswith("relative_position_bias_table") for key in spared)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "ViT-B-16"])
def test_decay_all_decays_every_parameter_but_those_of_the_user(name: str) -> None:
    model, _ = on_meta(name)
    for globs in ([], ["*ln_1.bias", "*head.weight"] if name == "ViT-B-16" else ["pos_embed"]):
        groups = param_groups(model, OptimConf(decay_all=True, no_weight_decay=globs))
        found = {key: group["weight_decay"] for group in groups for key in group["param_names"]}
        spared = {key for key, decay in found.items() if decay == 0.0}
        assert len(found) == len(list(model.net.named_parameters()))
        assert spared == {key for key in found if key.endswith(tuple(glob.lstrip("*") for glob in globs) or "\n")}


def test_user_globs_spare_embeddings_from_mkts_decay_too() -> None:
    model, _ = on_meta("vit_base_patch16_224")
    groups = param_groups(model, OptimConf(decay_embeddings=True, no_weight_decay=["pos_*"]))
    decayed = {key: group["weight_decay"] for group in groups for key in group["param_names"]}
    assert decayed["pos_embed"] == 0.0 and decayed["cls_token"] > 0
