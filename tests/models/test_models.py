"""A layered model gives upstream's bits, whole and at every split; `build_model` builds it or says why it cannot."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.models import build_model
from finetune.models.heads.head import Head, TowerWithHead
from finetune.models.layering.towers import layered, open_clip_layers, timm_layers, tower_with_head_layers

CLASSES = [str(digit) for digit in range(10)]

CLIP_VARIANTS = {
    "plain": {},
    "average": {"pool_type": "avg"},
    "average_then_norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "token_then_norm": {"final_ln_after_pool": True},
    "unpooled": {"pool_type": "none"},
    "no_ln_pre": {"no_ln_pre": True},
    "sin_cos": {"pos_embed_type": "sin_cos_2d"},
    "layer_scale": {"ls_init_value": 0.1},
    "patch_dropout": {"patch_dropout": 0.5},
    "attentional": {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5},
    "attentional_average": {
        "attentional_pool": True,
        "pool_type": "avg",
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 5,
    },
    # open_clip runs the next two only if width and output_dim are equal
    "parallel": {"output_dim": 32, "attentional_pool": "parallel", "attn_pooler_heads": 4, "attn_pooler_queries": 5},
    "cascade": {"output_dim": 32, "attentional_pool": "cascade", "attn_pooler_heads": 4, "attn_pooler_queries": 5},
    "custom_block": {"qk_norm": True, "scale_attn": True, "scale_fc": True},
    "no_proj": {"proj": None},
}

VIT_VARIANTS = {
    "plain": {},
    "average": {"global_pool": "avg"},
    "average_no_fc_norm": {"global_pool": "avg", "fc_norm": False},
    "token_fc_norm": {"fc_norm": True},
    "maximum": {"global_pool": "max"},
    "map": {"global_pool": "map", "class_token": False},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers_not_embedded": {"reg_tokens": 4, "no_embed_class": True},
    "no_embed_class": {"no_embed_class": True},
    "no_positions": {"pos_embed": "none"},
    "pre_norm": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "dynamic_size": {"dynamic_img_size": True},
    "all_dropouts": {
        "drop_rate": 0.2,
        "pos_drop_rate": 0.1,
        "patch_drop_rate": 0.5,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.5,
    },
}


def clip_tower(**changes: object) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    args = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "heads": 4, "mlp_ratio": 2.0, "output_dim": 24}
    without_proj = "proj" in changes
    changes.pop("proj", None)
    tower = VisionTransformer(**{**args, **changes})
    if without_proj:
        tower.proj = None
    return tower


def vit_tower(**changes: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    args = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_classes": 7,
    }
    return VisionTransformer(**{**args, **changes})


def clip_model(**changes: object) -> tuple[LayeredModel, nn.Module]:
    tower = clip_tower(**dict(changes))
    head = Head(tower.output_dim if tower.proj is not None else 32, 7)
    net = TowerWithHead(tower, head)
    return layered(net, tower_with_head_layers(open_clip_layers(tower))), tower


def vit_model(**changes: object) -> LayeredModel:
    net = vit_tower(**changes)
    return layered(net, timm_layers(net))


def models() -> Iterator[object]:
    for name, changes in CLIP_VARIANTS.items():
        yield pytest.param(lambda changes=changes: clip_model(**changes)[0], id=f"clip-{name}")
    for name, changes in VIT_VARIANTS.items():
        yield pytest.param(lambda changes=changes: vit_model(**changes), id=f"vit-{name}")


every_model = pytest.mark.parametrize("make", list(models()))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def seeded(function, *args):
    """The result of a call that starts from a fixed state of the global generator."""
    torch.manual_seed(7)
    return function(*args)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_whole_and_split_equal_upstream_bit_for_bit(make, training: bool) -> None:
    model = make().train(training)
    x = images()
    expected = seeded(model.net, x)
    assert torch.equal(seeded(model, x), expected)
    for stop in range(1, len(model.layers)):
        torch.manual_seed(7)
        hidden = model(x, stop=stop)
        assert isinstance(hidden, Tensor)
        assert torch.equal(model(hidden, start=stop), expected), f"split at {stop}"
    torch.manual_seed(7)
    for index in range(len(model.layers)):
        x = model(x, start=index, stop=index + 1)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("name", CLIP_VARIANTS)
def test_readout_of_a_clip_tower_is_upstreams_own_features(name: str) -> None:
    model, tower = clip_model(**CLIP_VARIANTS[name])
    model.eval()
    assert torch.equal(model(images(), stop=len(model.layers) - 1), tower(images()))


@pytest.mark.parametrize("name", VIT_VARIANTS)
def test_readout_of_a_vit_is_upstreams_own_features(name: str) -> None:
    model = vit_model(**VIT_VARIANTS[name]).eval()
    net = model.net
    expected = net.forward_head(net.forward_features(images()), pre_logits=True)
    assert torch.equal(model(images(), stop=len(model.layers) - 1), expected)


@every_model
def test_every_parameter_is_owned_once_and_by_the_layer_that_uses_it(make) -> None:
    model = make().eval()
    assert set(model.layer_ids) >= {name for name, _ in model.net.named_parameters()}
    assert [layer.name for layer in model.layers] == ["stem", "block.1", "block.2", "readout", "head"]
    # The output of layer k depends on the parameters of layer k and of no other layer.
    x = images()
    for index in range(len(model.layers)):
        hidden = model(x, stop=index).detach() if index else x
        for parameter in model.net.parameters():
            parameter.requires_grad_(True)
        model.zero_grad()
        out = model(hidden, start=index, stop=index + 1)
        if out.requires_grad:
            out.square().sum().backward()
        touched = {name for name, p in model.net.named_parameters() if p.grad is not None}
        assert all(model.layer_ids[name] == index for name in touched)


@every_model
def test_copies_and_pickles_take_their_layers_along(make) -> None:
    model = make().eval()
    expected = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images()), expected)  # the copy has its own tensors
    loaded = pickle.load(io.BytesIO(pickle.dumps(twin)))
    assert torch.equal(loaded(images()), expected)


def test_a_frozen_stem_drops_no_patches() -> None:
    model, tower = clip_model(patch_dropout=0.5)
    tokens = tower.positional_embedding.shape[0]
    model.train()
    assert model(images(), stop=1).shape[1] < tokens
    freeze(model, 0)
    model.train()
    assert model(images(), stop=1).shape[1] == tokens


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = vit_model()
        model.recompute = recompute
        freeze(model, 0)
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.net.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        assert (grad is None and other is None) or torch.equal(grad, other), name


def test_upstreams_own_exceptions_from_weight_decay_are_kept() -> None:
    assert clip_model()[0].no_weight_decay == {"visual.class_embedding", "visual.positional_embedding"}
    assert vit_model(reg_tokens=2).no_weight_decay == {"cls_token", "pos_embed", "reg_token"}


def test_keys_are_upstreams_own() -> None:
    import open_clip

    cfg = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 16}
    clip = open_clip.CLIP(24, cfg, {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1})
    model = layered(TowerWithHead(clip.visual, Head(24, 3)), tower_with_head_layers(open_clip_layers(clip.visual)))
    upstream = {name for name in clip.state_dict() if name.startswith("visual.")}
    assert set(model.net.state_dict()) == upstream | {"head.weight", "head.bias"}
    assert set(vit_model().net.state_dict()) == set(vit_tower().state_dict())


def test_a_subclass_has_ids_but_no_slices() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class Other(VisionTransformer):
        pass

    net = Other(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    assert [layer.name for layer in timm_layers(net)] == ["stem", "block.1", "block.2", "readout"]
    assert all(layer.run is None for layer in timm_layers(net))


# The bundled models, by `build_model`.


@pytest.mark.parametrize("family", list(Family)[:2])
def test_bundled_models_build_and_run_at_their_size(family: Family) -> None:
    built = build_model(ModelConf(family=family, name=f"glyph_{family}"), CLASSES)
    size = built.preprocess.size
    assert built.model.training
    assert built.model(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert built.has_zeroshot == (family == "clip")
    assert "bundled" in built.description and "model.pretrained=" in built.description
    assert "\n" not in built.description
    assert all(p.dtype == torch.float32 and p.requires_grad for p in built.model.parameters())


@pytest.mark.parametrize("family", list(Family)[:2])
def test_another_image_size_resizes_positions_and_preprocessing_follows(family: Family) -> None:
    built = build_model(ModelConf(family=family, name=f"glyph_{family}", image_size=64), CLASSES)
    assert built.preprocess.size == 64
    assert built.model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("family", list(Family)[:2])
def test_the_same_seed_gives_the_same_random_head(family: Family) -> None:
    def head(seed: int) -> Tensor:
        torch.manual_seed(seed)
        conf = ModelConf(family=family, name=f"glyph_{family}", head=HeadKind.random)
        return build_model(conf, CLASSES).model.net.head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("family", list(Family)[:2])
def test_without_weights_the_same_shapes_and_no_file(family: Family, monkeypatch) -> None:
    from finetune.models.upstream import weight_files

    conf = ModelConf(family=family, name=f"glyph_{family}")
    shapes = {name: tensor.shape for name, tensor in build_model(conf, CLASSES).model.state_dict().items()}

    def no_reading(path):
        raise AssertionError(path)

    monkeypatch.setattr(weight_files, "read_state_dict", no_reading)
    for device in ("cpu", "meta"):
        built = build_model(conf, CLASSES, load=False, device=device)
        assert {name: tensor.shape for name, tensor in built.model.state_dict().items()} == shapes
        assert {p.device.type for p in built.model.parameters()} == {device}
        assert not built.has_zeroshot


def test_drop_path_reaches_every_block_of_a_vit_and_is_refused_where_it_would_be_ignored() -> None:
    built = build_model(ModelConf(family=Family.vit, name="glyph_vit", drop_path=0.5), CLASSES)
    rates = [
        block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0 for block in built.model.net.blocks
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match=r"model\.drop_path=0\.5 would be ignored"):
        build_model(ModelConf(drop_path=0.5), CLASSES)


ERRORS = [
    ({"name": "ViT-B16", "pretrained": "openai"}, "did you mean 'ViT-B-16'"),
    ({"name": "ViT-B-16"}, "model.pretrained=bundled: only glyph_clip and glyph_vit are bundled"),
    ({"name": "ViT-B-16"}, "openai, laion400m_e31"),
    ({"name": "ViT-B-32", "pretrained": "opnai"}, "did you mean 'openai'"),
    ({"name": "vit_tiny_patch16_224", "pretrained": "none"}, "use model=vit"),
    ({"name": "glyph_vit"}, "use model=vit"),
    ({"name": "glyph_clip", "pretrained": "openai"}, "model.name=ViT-B-16"),
    ({"image_size": 65}, "multiple of the patch size, 8"),
    ({"family": Family.vit, "name": "glyph_clip"}, "use model=clip"),
    ({"family": Family.vit, "name": "ViT-B-16"}, "use model=clip"),
    ({"family": Family.vit, "name": "glyph_vit", "head": HeadKind.zeroshot}, "model.head=zeroshot needs a text tower"),
    ({"family": Family.vit, "name": "glyph_vit", "image_size": 65}, "multiple of the patch size, 8"),
    ({"family": Family.vit, "name": "glyph_vit", "pretrained": "openai"}, "weights bundled, none"),
    (
        {"family": Family.vit, "name": "vit_tiny_patch16_22", "pretrained": "none"},
        "did you mean 'vit_tiny_patch16_224'",
    ),
    ({"family": Family.vit, "name": "vit_tiny_patch16_224"}, "augreg_in21k, augreg_in21k_ft_in1k"),
    ({"family": Family.vit, "name": "vit_tiny_patch16_224", "pretrained": "augreg_in1"}, "did you mean 'augreg_in21k'"),
    (
        {"family": Family.vit, "name": "vit_tiny_patch16_224", "pretrained": "none", "image_size": 100},
        "patch size, 16: 96 is",
    ),
    ({"family": Family.vit, "name": "vit_tiny_patch16_224.augreg_in21k", "pretrained": "x"}, "name different weights"),
    ({"family": Family.vit, "name": "hf-hub:a/b", "pretrained": "c"}, "would be ignored"),
    ({"name": "hf-hub:a/b", "pretrained": "c"}, "would be ignored"),
]


@pytest.mark.parametrize(("settings", "words"), ERRORS)
def test_a_wrong_setting_ends_in_one_line_that_says_what_to_do(settings, words, monkeypatch) -> None:
    from finetune.models.upstream import clip_source

    monkeypatch.setattr(clip_source, "_read_hub_config", lambda repository: {"model_cfg": {}, "preprocess_cfg": {}})
    with pytest.raises(ValueError) as caught:
        build_model(ModelConf(**settings), CLASSES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Other families, and the library that a name belongs to.


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("timm", "convnext_atto"),
        ("timm", "resnet10t"),
        ("timm", "deit_tiny_distilled_patch16_224"),
        ("timm", "tf_efficientnet_lite0"),
        ("torchvision", "resnet18"),
        ("torchvision", "efficientnet_b0"),
    ],
)
def test_other_families_classify_train_and_freeze(library: str, name: str) -> None:
    conf = ModelConf(family=Family.vit, library=Library(library), name=name, pretrained="none", image_size=64)
    built = build_model(conf, CLASSES)
    model = built.model
    freeze(model, model.num_blocks)
    model.train()
    logits = model(torch.randn(4, 3, 64, 64))
    assert isinstance(logits, Tensor) and logits.shape == (4, 10)
    logits.sum().backward()
    learning = {parameter for parameter in model.parameters() if parameter.grad is not None}
    assert learning <= {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert built.preprocess.size == 64 and library in built.description


@pytest.mark.parametrize(
    "name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "ViT-L-14-CLIPA", "EVA02-B-16", "convnext_base"]
)
def test_other_towers_of_open_clip_build_without_their_text_tower(name: str) -> None:
    built = build_model(ModelConf(name=name, pretrained="none", head=HeadKind.random), CLASSES, device="meta")
    assert all(key.startswith(("visual.", "head.")) for key in built.model.net.state_dict())
    size = built.preprocess.size
    assert built.model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_vit_88m_enc",
        pytest.param("mobilenetv5_300m_enc", marks=pytest.mark.slow),
        pytest.param("deepseek_vit_412m_enc", marks=pytest.mark.slow),
    ],
)
def test_encoders_without_a_classifier_get_one(name: str) -> None:
    conf = ModelConf(family=Family.vit, name=name, pretrained="none", head=HeadKind.random)
    built = build_model(conf, CLASSES, device="meta")
    size = built.preprocess.size
    assert built.model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)
    assert built.model.layers[-1].owns == ("head",)


def test_torchvisions_maxvit_is_cut_for_its_image_size() -> None:
    conf = ModelConf(family=Family.vit, name="maxvit_t", pretrained="none", image_size=448)
    built = build_model(conf, ["a", "b"], device="meta")
    assert built.model(torch.empty(2, 3, 448, 448, device="meta")).shape == (2, 2)
    with pytest.raises(ValueError, match=r"image_size=100: maxvit_t takes multiples of 224"):
        build_model(dataclasses.replace(conf, image_size=100), ["a", "b"], device="meta")


def test_torchvisions_regnet_builds_without_memory() -> None:
    conf = ModelConf(family=Family.vit, name="regnet_y_400mf", pretrained="none")
    model = build_model(conf, CLASSES, device="meta").model
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_a_model_for_a_checkpoint_that_follows_needs_no_file_of_its_own() -> None:
    for conf in (ModelConf(), ModelConf(family=Family.vit, name="glyph_vit")):
        conf.pretrained = "gone.safetensors"
        assert build_model(conf, CLASSES, load=False).model.num_blocks == 6


def test_what_upstream_holds_fixed_stays_fixed() -> None:
    model, tower = clip_model(pos_embed_type="sin_cos_2d")
    freeze(model, 0)
    freeze(model, -1)
    assert "visual.positional_embedding" not in dict(model.net.named_parameters())
    assert "visual.positional_embedding" in model.net.state_dict()
    assert tower.positional_embedding.abs().sum() > 0


LIBRARIES = [
    ({"name": "resnet18", "pretrained": "none"}, "say model.library=timm or torchvision"),
    ({"name": "vit_b_16", "pretrained": "IMAGENET1K_V9"}, "did you mean 'IMAGENET1K_V1'"),
    ({"name": "vit_b_16"}, "IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1"),
    ({"name": "vit_b_16", "library": Library.timm}, "torchvision does: leave model.library out"),
    ({"name": "vit_tiny_patch16_224", "library": Library.open_clip}, "model=clip"),
    ({"name": "ViT-B-16", "library": Library.timm, "family": Family.clip}, "expected open_clip"),
    ({"name": "vit_b_16", "pretrained": "none", "drop_path": 0.1}, "would be ignored"),
    ({"name": "vit_b_16", "pretrained": "none", "image_size": 50}, "multiple of the patch size, 16: 48 is"),
    (
        {"name": "resnet18", "library": Library.timm, "pretrained": "none", "head": HeadKind.keep},
        "no classifier to keep",
    ),
    ({"name": "squeezenet1_0", "pretrained": "none"}, "older model of torchvision; use one of timm's with model.libr"),
    ({"name": "mobilenet_v3_small", "library": Library.torchvision}, "did you mean 'mobilenetv3_small_100'"),
    ({"name": "densenet121", "library": Library.torchvision}, "did you mean 'densenet121'"),
]


@pytest.mark.parametrize(("settings", "words"), LIBRARIES)
def test_a_name_that_several_libraries_know_is_the_users_to_decide(settings, words) -> None:
    with pytest.raises(ValueError) as caught:
        build_model(ModelConf(**{"family": Family.vit, **settings}), CLASSES, device="meta")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_library_says_itself_where_only_one_knows_the_name() -> None:
    conf = ModelConf(family=Family.vit, name="vit_b_16", pretrained="none", image_size=32)
    built = build_model(conf, CLASSES, device="meta")
    assert "torchvision" in built.description and built.model.is_chain
    assert built.preprocess.mean == pytest.approx((0.485, 0.456, 0.406)) and built.preprocess.size == 32
