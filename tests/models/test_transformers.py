"""Weights in the layouts of the package transformers give the same outputs in our networks."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.config import Family, HeadKind, ModelConf
from finetune.models import build_model

CLASSES = ["cat", "dog", "eel"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 0,
}
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32}
TOLERANCE = 1e-5
# What transformers 5 saves; a test compares it with transformers where that is installed.
NAMES = Path(__file__).parent.parent / "golden" / "transformers_names.json"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes timm build small networks, whatever the name's size is."""
    import timm

    whole = timm.create_model

    def shrink(**args: object) -> None:
        monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **args}))

    return shrink


def scrambled(model: nn.Module) -> nn.Module:
    """The model with random numbers of ordinary size in all its parameters, norms and biases included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "lambda1" in name else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def conf(name: str, folder: Path, **changes: object) -> ModelConf:
    family = Family.clip if name[0].isupper() else Family.vit
    return ModelConf(family=family, name=name, pretrained=str(folder), **changes)  # type: ignore[arg-type]


def assert_equal(got: Tensor, expected: Tensor) -> None:
    difference = (got - expected).abs().max().item()
    print(f"largest difference {difference:.1e} of values up to {expected.abs().max().item():.2f}")
    assert difference <= TOLERANCE
    assert expected.std() > 0.1


def live(model: nn.Module, folder: Path) -> None:
    """In the place of the saved weights, those that `torch.save(model.state_dict())` writes."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / "trained.pth")


BEIT = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1}
VITS = {
    "vit": ("ViT", "vit_base_patch16_224", {}, {"mlp_ratio": 2}),
    "vit_tanh": ("ViT", "vit_base_patch16_224", {"hidden_act": "gelu_new"}, {"mlp_ratio": 2}),
    "deit": ("DeiT", "deit_base_distilled_patch16_224", {}, {"mlp_ratio": 2}),
    "deit_plain": ("ViT", "deit_base_patch16_224", {}, {"mlp_ratio": 2}),
    "beit": ("Beit", "beit_base_patch16_224", BEIT, {"mlp_ratio": 2}),
    "beit_token": (
        *("Beit", "beit_base_patch16_224", {**BEIT, "use_mean_pooling": False, "hidden_act": "gelu_new"}),
        {"mlp_ratio": 2, "global_pool": "token"},
    ),
    "dinov2": ("Dinov2", "vit_base_patch14_dinov2", {"mlp_ratio": 2}, {"mlp_ratio": 2}),
    "dinov2_gated": (
        *("Dinov2", "vit_giant_patch14_dinov2", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
        {"mlp_ratio": 3},
    ),
    "dinov2_registers": (
        *("Dinov2WithRegisters", "vit_base_patch14_reg4_dinov2", {"mlp_ratio": 2}),
        {"mlp_ratio": 2},
    ),
    "dinov3": ("DINOv3ViT", "vit_base_patch16_dinov3_qkvb", {"num_register_tokens": 4}, {"mlp_ratio": 2}),
    "dinov3_gated": (
        *("DINOv3ViT", "vit_huge_plus_patch16_dinov3_qkvb"),
        {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        {"mlp_ratio": 2},
    ),
}


@pytest.mark.parametrize("is_live", [False, True], ids=["saved", "live"])
@pytest.mark.parametrize("layout", VITS)
def test_features_of_an_image_network(layout: str, is_live: bool, transformers, small_timm, tmp_path: Path) -> None:
    stem, name, settings, args = VITS[layout]
    theirs = getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**SMALL, **settings))
    scrambled(theirs).save_pretrained(tmp_path)
    if is_live:
        live(theirs, tmp_path)
    small_timm(**{**TIMM, **args})
    built = build_model(conf(name, tmp_path), CLASSES)
    with torch.no_grad():
        expected = theirs(images()).last_hidden_state
        got = built.model.net.eval().forward_features(images())
    assert_equal(got, expected)
    assert "; in transformers' " in built.description


@pytest.mark.parametrize("stem", ["ViT", "Siglip"])
def test_a_classifier_is_kept_with_its_class_names(stem: str, transformers, small_timm, tmp_path: Path) -> None:
    labels = {"num_labels": 3, "id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}
    config = transformers.ViTConfig(**SMALL, **labels)
    name, args = "vit_base_patch16_224", {}
    if stem == "Siglip":  # which classifies the mean of the patches
        config = transformers.SiglipConfig(vision_config=SMALL, text_config=TEXT, **labels)
        name, args = "vit_base_patch32_siglip_gap_256", {"fc_norm": False}
    theirs = scrambled(getattr(transformers, f"{stem}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    small_timm(**TIMM, mlp_ratio=2, **args)
    built = build_model(conf(name, tmp_path, head=HeadKind.keep), CLASSES)
    with torch.no_grad():
        assert_equal(built.model.eval()(images()), theirs(images()).logits)
    with pytest.raises(ValueError, match=r"other classes than the data, such as 'cat' for 'x'"):
        build_model(conf(name, tmp_path, head=HeadKind.keep), ["x", "y", "z"])


def recorded(transformers, stem: str, settings: dict) -> dict[str, list[int]]:
    """Names and shapes of what transformers saves for a model of one block."""
    import tempfile

    from safetensors.torch import load_file

    one = {"num_hidden_layers": 1}
    if stem in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{stem}Config")(
            vision_config=SMALL | one, text_config=TEXT | one, **({"projection_dim": 16} if stem == "CLIP" else {})
        )
    else:
        config = getattr(transformers, f"{stem}Config")(**SMALL | one, **settings)
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, f"{stem}Model")(config).save_pretrained(folder)
        return {name: list(tensor.shape) for name, tensor in load_file(f"{folder}/model.safetensors").items()}


PAIRS = {"clip": ("CLIP", "ViT-B-32", {}, {}), "siglip": ("Siglip", "ViT-B-16-SigLIP", {}, {})}


def test_the_recorded_names_are_those_of_transformers(transformers, update_golden: bool) -> None:
    found = {layout: recorded(transformers, *row[:1], row[2]) for layout, row in (VITS | PAIRS).items()}
    if update_golden:
        NAMES.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(NAMES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", VITS | PAIRS)
def test_recorded_names_are_read_without_transformers(
    layout: str, small_open_clip, small_timm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, name, _, args = (VITS | PAIRS)[layout]
    shapes = json.loads(NAMES.read_text(encoding="utf-8"))[layout]
    torch.manual_seed(0)
    state = {f"some.prefix.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "w.pt")
    small_timm(**{**TIMM, "mlp_ratio": 2, **args, "depth": 1})
    for tower in ("vision_cfg", "text_cfg"):
        monkeypatch.setitem(CLIP_CFG[tower], "layers", 1)
    monkeypatch.setitem(SIGLIP_CFG["text_cfg"], "layers", 1)
    monkeypatch.setattr(
        "finetune.models.upstream.clip_source._tokenizer", lambda *place: Tokens(64 + 13 * (layout == "clip"))
    )
    built = build_model(conf(name, tmp_path / "w.pt", templates=["{}"]), CLASSES)
    values = {value for tensor in state.values() for value in tensor.flatten().tolist()}
    assert "read from some.prefix" in built.description
    left = built.description.partition("left out of the file: ")[2].partition(";")[0]
    assert set(left.replace("some.prefix.", "").split(", ")) <= {"", "embeddings.mask_token", "pooler (2 tensors)"}
    if "registers" not in layout:
        assert all(
            parameter.flatten()[-1].item() in values
            for name, parameter in built.model.net.named_parameters()
            if not name.startswith(("head", "visual.proj"))
        )


CLIP_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32, "mlp_ratio": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2},
}
SIGLIP_CFG = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 100,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


@pytest.fixture
def small_open_clip(monkeypatch: pytest.MonkeyPatch, small_timm) -> None:
    import open_clip

    configs = {"ViT-B-32": CLIP_CFG, "ViT-B-16-SigLIP": SIGLIP_CFG}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(configs.get(name)))
    small_timm(**TIMM, mlp_ratio=2)


def pair(transformers, stem: str, **vision: object) -> nn.Module:
    """A small CLIP or SigLIP of transformers."""
    config = getattr(transformers, f"{stem}Config")
    changes = {"projection_dim": 16} if stem == "CLIP" else {}
    text = {**TEXT, **{name: value for name, value in vision.items() if name == "hidden_act"}}
    model = getattr(transformers, f"{stem}Model")(
        config(vision_config={**SMALL, **vision}, text_config=text, **changes)
    )
    with torch.no_grad():
        scrambled(model).logit_scale.fill_(1.5)
    return model


class Tokens:
    """Three texts that end with the highest number, as CLIP's do."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(1, 98, (3, length), generator=generator)
        self.tokens[:, -1] = 99

    def __call__(self, texts: list[str]) -> Tensor:
        return self.tokens[: len(texts)]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "default"])
@pytest.mark.parametrize(("stem", "name"), [("CLIP", "ViT-B-32"), ("Siglip", "ViT-B-16-SigLIP")])
def test_both_towers_of_a_pair(
    stem: str, name: str, act: str, transformers, small_open_clip, monkeypatch, tmp_path: Path
) -> None:
    theirs = pair(transformers, stem, **({} if act == "default" else {"hidden_act": act}))
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokens(77 if stem == "CLIP" else 64)
    monkeypatch.setattr("finetune.models.upstream.clip_source._tokenizer", lambda *place: tokenizer)
    built = build_model(conf(name, tmp_path, templates=["{}"]), CLASSES)
    with torch.no_grad():
        out = theirs(input_ids=tokenizer.tokens, pixel_values=images(), attention_mask=None)
        bias = theirs.logit_bias if stem == "Siglip" else 0
        expected = out.logits_per_image - bias
        got = built.model.eval()(images())
    assert_equal(got, expected)
    assert built.has_zeroshot


@pytest.mark.parametrize("kind", ["pair", "vision"])
@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("CLIP", "ViT-B-32"),
        ("Siglip", "ViT-B-16-SigLIP"),
        ("CLIP", "vit_base_patch16_clip_224"),
        ("Siglip", "vit_base_patch16_siglip_224"),
    ],
)
def test_the_image_tower_of_a_pair(
    stem: str, name: str, kind: str, transformers, small_open_clip, tmp_path: Path
) -> None:
    theirs = pair(transformers, stem)
    if kind == "vision":
        kinds = {"CLIP": "CLIPVisionModelWithProjection", "Siglip": "SiglipVisionModel"}
        changes = {"projection_dim": 16} if stem == "CLIP" else {}
        config = getattr(transformers, f"{stem}VisionConfig")(**SMALL, **changes)
        theirs = scrambled(getattr(transformers, kinds[stem])(config))
    theirs.save_pretrained(tmp_path)
    built = build_model(conf(name, tmp_path, head=HeadKind.random), CLASSES)
    net = built.model.net.eval()
    with torch.no_grad():
        if stem == "CLIP" and name[0].isupper():
            found = theirs(images()).image_embeds if kind == "vision" else theirs.get_image_features(images())
            expected = found if isinstance(found, Tensor) else found.pooler_output
            got = net.visual(images())
        else:
            tower = theirs.vision_model if kind == "pair" or stem == "CLIP" else theirs
            out = tower(images())
            expected = out.pooler_output
            if name[0].isupper():
                got = net.visual(images())
            else:
                got = net.forward_head(net.forward_features(images()), pre_logits=True)
    assert_equal(got, expected)


def test_an_image_tower_makes_no_zeroshot_head(transformers, small_open_clip, tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**SMALL, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image tower only"):
        build_model(conf("ViT-B-32", tmp_path), CLASSES)


def test_what_the_configuration_says_is_checked(transformers, small_timm, tmp_path: Path) -> None:
    theirs = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    theirs.save_pretrained(tmp_path)
    small_timm(**TIMM, mlp_ratio=2)
    place = tmp_path / "config.json"
    config = json.loads(place.read_text())
    for change, words in (
        ({"num_attention_heads": 8}, r"config\.json has 8 attention heads and this model has 4"),
        ({"hidden_act": "relu"}, r"hidden_act=relu is none of the activations gelu"),
        ({"hidden_act": "silu"}, r"hidden_act=silu and this model has gelu"),
        ({"layer_norm_eps": "no"}, r"config\.json cannot be used"),
    ):
        place.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=words):
            build_model(conf("vit_base_patch16_224", tmp_path), CLASSES)
    place.unlink()
    text = build_model(conf("vit_base_patch16_224", tmp_path), CLASSES).description
    assert "no config.json beside them says their activation" in text


def test_changes_and_preprocessing_travel_with_the_weights_of_a_run(transformers, small_timm, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = scrambled(transformers.ViTModel(transformers.ViTConfig(**SMALL, hidden_act="quick_gelu")))
    theirs.save_pretrained(tmp_path / "hub")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(processor))
    small_timm(**TIMM, mlp_ratio=2)
    built = build_model(conf("vit_base_patch16_224", tmp_path / "hub"), CLASSES)
    assert built.changes == {"activation": "quick_gelu", "norm_eps": 1e-12}
    assert "quick_gelu, norms with epsilon 1e-12 as its config.json says" in built.description
    assert (built.preprocess.mean, built.preprocess.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    metadata = {"changes": json.dumps(built.changes), "preprocess": json.dumps(built.preprocess.as_dict())}
    save_file(built.model.net.state_dict(), tmp_path / "best.safetensors", metadata=metadata)
    again = build_model(conf("vit_base_patch16_224", tmp_path / "best.safetensors"), CLASSES)
    with torch.no_grad():
        features = [each.model.net.eval().forward_features(images()) for each in (built, again)]
    assert torch.equal(*features) and again.changes == built.changes
    assert again.preprocess == dataclasses.replace(built.preprocess)


def test_a_deeper_network_is_another_model(transformers, small_timm, tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 3})).save_pretrained(tmp_path)
    small_timm(**TIMM, mlp_ratio=2)
    with pytest.raises(ValueError, match=r"unexpected: encoder\.layer\.2.*check model\.name"):
        build_model(conf("vit_base_patch16_224", tmp_path), CLASSES)
