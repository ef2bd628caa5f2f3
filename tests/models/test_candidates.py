"""The weights of a network are found in whatever a training program left around them, or the choice is asked for."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.upstream.candidates import find_weights
from finetune.models.upstream.layouts import Layout, Wanted

CLASSES = ["a", "b", "c"]
ARGS = {"img_size": 32}


@pytest.fixture(scope="module")
def states() -> list[dict]:
    """The tensors of two trainings of one network, without a classifier."""
    import timm

    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGS).state_dict())
    return found


def at(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def conf(path: Path, **changes: object) -> ModelConf:
    return ModelConf(
        family=Family.vit,
        name="vit_tiny_patch16_224",
        pretrained=str(path),
        image_size=32,
        **changes,  # type: ignore[arg-type]
    )


def assert_built(content: dict, expected: dict, path: Path, **changes: object) -> str:
    """The model built from a file with `content` has the tensors `expected`. Returns its description."""
    torch.save(content, path)
    built = build_model(conf(path, **changes), CLASSES)
    state = built.model.net.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    return built.description


def inner(state: dict, part: str) -> dict:
    """The names with a wrapper around each block."""
    return {name.replace("blocks.", "blocks.").replace(".attn.", f".{part}.attn."): t for name, t in state.items()}


LEFT = {
    "decoder_embed.weight": torch.ones(3, 4),
    "decoder_blocks.0.norm1.weight": torch.ones(4),
    "mask_token": torch.ones(4),
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: at("module.", s),
        lambda s: at("_orig_mod.module.", s),
        lambda s: at("module._orig_mod.model.encoder.", s),
        lambda s: {"model": at("_orig_mod.", s), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 1},
        lambda s: {"ema_state_dict": {"state_dict": at("net.", s)}},
        lambda s: {"model": {**s, **LEFT}},
        lambda s: {
            "state_dict": {**at("module.base_encoder.", s), **at("module.predictor.", {"0.weight": torch.ones(2, 2)})}
        },
        lambda s: {
            **at("teacher.backbone.", s),
            "head.mlp.0.weight": torch.ones(3, 3),
            "head.last_layer.weight_g": torch.ones(3, 1),
        },
        lambda s: {
            "teacher": {**at("backbone.", s), "head.mlp.0.weight": torch.ones(3, 3)},
            "dino_loss": {"center": torch.ones(1, 3)},
        },
        lambda s: {**at("module.", s), "n_averaged": torch.tensor(3)},
        lambda s: {
            **at("online_encoder.net.", s),
            "queue": torch.ones(3, 5),
            "queue_ptr": torch.zeros(1),
            "step": torch.tensor(1),
        },
        lambda s: {"state_dict": {**at("some.name.that.nobody.listed.", s), "criterion.weight": torch.ones(3)}},
        lambda s: {"visual": {"trunk": s}},
        lambda s: inner(s, "_checkpoint_wrapped_module"),
        lambda s: {"module": inner(s, "module._orig_mod")},
        lambda s: {"model": s, "state_dict": {name: tensor.clone() for name, tensor in s.items()}},  # the same twice
        lambda s: {"model": s, "optim": {"exp_avg": {name: torch.zeros_like(t) for name, t in s.items()}}},
    ],
)
def test_the_prefix_under_which_the_names_fit_is_found(wrap, states: list[dict], tmp_path: Path) -> None:
    assert_built(wrap(states[0]), states[0], tmp_path / "w.pt")


def test_what_is_left_out_is_said(states: list[dict], tmp_path: Path) -> None:
    content = {"teacher": {**at("backbone.", states[0]), **at("head.", LEFT)}, "optimizer": {"a": torch.ones(2)}}
    text = assert_built(content, states[0], tmp_path / "w.pt")
    assert "; read from teacher.backbone; left out of the file: optimizer.a, teacher.head (3 tensors)" in text.replace(
        "optimizer, ", "optimizer.a, "
    )
    assert "left out" not in assert_built(states[0], states[0], tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("places", "keys"),
    [
        (("state_dict", "state_dict_ema"), ("state_dict", "state_dict_ema")),
        (("model", "model_ema.module"), ("model", "model_ema")),
        (("student.module.backbone", "teacher.backbone"), ("student", "teacher.backbone")),
        (("", "ema"), (".", "ema")),
        (("student.module.backbone", "teacher._orig_mod.backbone"), ("student.backbone", "teacher.backbone")),
        (("module.encoder_q", "module.encoder_k"), ("encoder_q", "module.encoder_k")),
    ],
)
def test_several_candidates_are_told_apart_by_the_key(places, keys, states: list[dict], tmp_path: Path) -> None:
    content: dict = {}
    for place, state in zip(places, states, strict=True):
        content |= at(f"{place}." if place else "", state)
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 different sets of weights .*model\.pretrained_key=") as caught:
        build_model(conf(tmp_path / "w.pt"), CLASSES)
    for place in places:
        assert (place or ".") in str(caught.value)
    for key, state in zip(keys, states, strict=True):
        assert_built(content, state, tmp_path / "w.pt", pretrained_key=key)
    with pytest.raises(ValueError, match=r"model\.pretrained_key=techer: .*(under|has no)"):
        build_model(conf(tmp_path / "w.pt", pretrained_key="techer"), CLASSES)


def test_a_key_that_fits_the_only_candidate_changes_nothing_and_another_is_refused(
    states: list[dict], tmp_path: Path
) -> None:
    assert_built({"model": states[0]}, states[0], tmp_path / "w.pt", pretrained_key="model")
    with pytest.raises(ValueError, match=r"pretrained_key=modle: .* under model.*did you mean 'model'"):
        build_model(conf(tmp_path / "w.pt", pretrained_key="modle"), CLASSES)


def test_a_larger_network_beside_the_wanted_one_is_no_candidate(states: list[dict], tmp_path: Path) -> None:
    import timm

    teacher = timm.create_model("vit_small_patch16_224", num_classes=0, depth=14, **ARGS).state_dict()
    assert_built({**at("student.", states[0]), **at("teacher.", teacher)}, states[0], tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.12.norm1.weight": torch.ones(192)}, r"unexpected: .*blocks\.12"),
        ({"blocks.0.ls1.gamma": torch.ones(192)}, r"unexpected: .*ls1\.gamma"),
        ({"reg_token": torch.ones(1, 4, 192)}, r"unexpected: .*reg_token"),
        ({"norm_pre.weight": torch.ones(192)}, r"unexpected: .*norm_pre"),
    ],
)
def test_a_part_that_the_model_lacks_is_no_leftover(
    change: dict, words: str, states: list[dict], tmp_path: Path
) -> None:
    torch.save({"model": {**states[0], **change}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=words):
        build_model(conf(tmp_path / "w.pt"), CLASSES)


def test_a_near_candidate_is_named_with_its_size(states: list[dict], tmp_path: Path) -> None:
    import timm

    small = timm.create_model("vit_small_patch16_224", num_classes=0, **ARGS).state_dict()
    torch.save({"state_dict": at("module.", small)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"under state_dict\.module.*12 blocks of width 384.*12 blocks of width 192"):
        build_model(conf(tmp_path / "w.pt"), CLASSES)
    short = {name: tensor for name, tensor in states[0].items() if not name.startswith("blocks.11.")}
    torch.save({"state_dict": short}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"12 missing: blocks\.11.*11 blocks of width 192, and .*12 blocks"):
        build_model(conf(tmp_path / "w.pt"), CLASSES)


@pytest.mark.parametrize("patch", [8, 32])
def test_patches_of_another_size_are_another_model(patch: int, tmp_path: Path) -> None:
    import timm

    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, patch_size=patch, **ARGS).state_dict()
    torch.save({"model": state}, tmp_path / "w.pt")
    words = rf"patch_embed\.proj\.weight \(192, 3, {patch}, {patch}\) for \(192, 3, 16, 16\)"
    with pytest.raises(ValueError, match=words):
        build_model(conf(tmp_path / "w.pt"), CLASSES)


def test_patches_of_another_size_in_the_authors_layout_are_another_model(tmp_path: Path) -> None:
    import timm

    name = "vit_small_patch14_reg4_dinov2"
    state = timm.create_model(name, num_classes=0, img_size=32, patch_size=16).state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "w.pt")
    settings = ModelConf(family=Family.vit, name=name, pretrained=str(tmp_path / "w.pt"), image_size=28)
    with pytest.raises(ValueError, match=r"weights of another model"):
        build_model(settings, CLASSES)


def test_a_deeper_network_beside_the_wanted_one_is_no_candidate(states: list[dict], tmp_path: Path) -> None:
    import timm

    deeper = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=14, **ARGS).state_dict()
    content = {"student": states[0], "teacher": deeper}
    assert_built(content, states[0], tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"pretrained_key=teacher: .* under student, and none there"):
        assert_built(content, deeper, tmp_path / "w.pt", pretrained_key="teacher")


def test_blocks_in_groups_as_the_training_of_dinov2_leaves_them(states: list[dict], tmp_path: Path) -> None:
    def grouped(state: dict) -> dict:
        return {re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 4}.{m[1]}", n): t for n, t in state.items()}

    content = {"teacher": {**at("backbone.", grouped(states[0])), "dino_head.mlp.0.weight": torch.ones(3, 3)}}
    assert_built(content, states[0], tmp_path / "w.pt")
    extra = {**grouped(states[0]), "blocks.3.12.norm1.weight": torch.ones(192)}
    with pytest.raises(ValueError, match=r"unexpected: blocks\.3\.12"):
        assert_built({"teacher": extra}, states[0], tmp_path / "w.pt")


def test_adapters_of_lora_are_no_leftovers(states: list[dict], tmp_path: Path) -> None:
    adapters = {"blocks.0.attn.qkv.lora_A.default.weight": torch.ones(4, 192)}
    torch.save(at("base_model.model.", {**states[0], **adapters}), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"LoRA adapters.*merge_and_unload"):
        build_model(conf(tmp_path / "w.pt"), CLASSES)


CHANGED = {
    "VPT": ({"prompt_embeddings": (1, 5, 192), "deep_prompt_embeddings": (11, 5, 192)}, "prompts .*prompt_embeddings"),
    "VPT inside": ({"blocks.0.prompt": (5, 192)}, r"prompts .*blocks\.0\.prompt"),
    "L2P": ({"e_prompt.prompt_key": (10, 192)}, "prompts .*e_prompt"),
    "CoOp": ({"prompt_learner.ctx": (4, 192), "prompt_learner.token_prefix": (2, 1, 192)}, "prompts .*prompt_learner"),
    "CoOp alone": ({"ctx": (4, 192)}, r"prompts .*ctx\)"),
    "MaPLe": ({"prompt_learner.compound_prompts_text.0": (2, 192)}, "prompts .*compound_prompts_text"),
    "visual": ({"Prompt_Tokens": (1, 5, 192)}, "prompts .*Prompt_Tokens"),
    "CLIP-Adapter": ({"adapter.fc.0.weight": (48, 192)}, r"adapters.*adapter\.fc"),
    "AdaptFormer": ({"blocks.3.adaptmlp.down_proj.weight": (8, 192)}, r"adapters.*adaptmlp.*save a file without"),
    "SSF": ({"ssf_scale_1": (192,)}, "adapters.*ssf_scale_1"),
    "VeRA": ({"blocks.0.attn.qkv.vera_lambda_d": (8,)}, "adapters.*vera"),
    "FSDP": ({"_fsdp_wrapped_module._flat_param": (1000,)}, "FSDP.*FULL_STATE_DICT"),
    "bitsandbytes": ({"blocks.0.attn.qkv.SCB": (576,)}, "few bits .*SCB.*dequantize"),
    "four bits": ({"blocks.0.attn.qkv.weight.quant_state.bitsandbytes__nf4": (9,)}, "few bits .*dequantize"),
    "eight bits of real numbers": ({"blocks.0.attn.qkv.weight_scale": (1,)}, "few bits .*weight_scale"),
    "quantization in training": ({"blocks.0.attn.qkv.weight_fake_quant.scale": (1,)}, "few bits .*fake_quant"),
}


@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.parametrize("prefix", ["", "model.module."])
def test_a_part_that_changes_the_network_is_no_leftover(
    case: str, prefix: str, states: list[dict], tmp_path: Path
) -> None:
    shapes, words = CHANGED[case]
    extra = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, content in {"beside": states[0] | extra, "around": {**at("image_encoder.", states[0]), **extra}}.items():
        save_file(at(prefix, content), tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words) as caught:
            build_model(conf(tmp_path / f"{name}.safetensors"), CLASSES)
        assert "another model" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_sounds_like_a_change_is_left_out(states: list[dict], tmp_path: Path) -> None:
    extra = {
        "prompt_encoder.point_embeddings.0.weight": torch.ones(1, 4),  # SAM's, for clicks
        "prompt_ids": torch.ones(3, dtype=torch.int64),
        "impromptu.weight": torch.ones(2),
        "head.last_layer.weight_g": torch.ones(3, 1),
    }
    text = assert_built({**at("image_encoder.", states[0]), **extra}, states[0], tmp_path / "w.pt")
    assert "left out of the file: head, impromptu" in text.replace("head.last_layer.weight_g", "head").replace(
        "impromptu.weight", "impromptu"
    )


def apart(state: dict, names: tuple[str, str, str]) -> dict:
    """The state with a matrix and a bias each for query, key and value."""
    found = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            parts = zip(names, tensor.chunk(3), strict=True)
            found |= {name.replace("qkv", part): third.clone() for part, third in parts}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("names", [("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value")])
def test_matrices_apart_are_told_from_joined_ones(names, states: list[dict], tmp_path: Path) -> None:
    torch.save({"model": apart(states[0], names)}, tmp_path / "w.pt")
    words = rf"apart \(blocks\.0\.attn\.{names[0]}\.weight\).*in one \(blocks\.0\.attn\.qkv\.bias\).*torch\.cat"
    with pytest.raises(ValueError, match=words):
        build_model(conf(tmp_path / "w.pt"), CLASSES)


def test_joined_matrices_are_told_from_those_apart() -> None:
    wanted = Wanted({f"b.0.attn.{part}.weight": torch.Size([2, 2]) for part in ("q", "k", "v", "proj")})
    tensors = {"b.0.attn.qkv.weight": torch.ones(6, 2), "b.0.attn.proj.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"w\.pt holds query, key and value in one .*has them apart .*chunk"):
        find_weights(tensors, wanted, [Layout.own(wanted)], key=None, source="w.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, t: {name: torch.empty(0)}, "without numbers, as ZeRO 3 leaves them.*zero_to_fp32"),
        (lambda name, t: {f"{name}_orig": t, f"{name}_mask": t} if t.ndim == 2 else {name: t}, "pruning.*prune.remove"),
        (
            lambda name, t: (
                {name.replace("weight", "parametrizations.weight.original0"): t} if t.ndim == 2 else {name: t}
            ),
            "normalisation.*remove_parametrizations",
        ),
        (lambda name, t: {name: t.to(torch.uint8)} if t.ndim == 2 else {name: t}, "in few bits.*torch.uint8"),
    ],
)
def test_a_form_that_no_network_takes_is_named(change, words: str, states: list[dict], tmp_path: Path) -> None:
    content = {new: each.clone() for name, t in states[0].items() for new, each in change(name, t).items()}
    save_file(at("module.", content), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        build_model(conf(tmp_path / "w.safetensors"), CLASSES)
    assert "another model" not in str(caught.value)


def test_the_classifier_comes_along_and_another_kind_of_head_does_not(states: list[dict], tmp_path: Path) -> None:
    head = {"head.weight": torch.randn(3, 192), "head.bias": torch.randn(3)}
    torch.save({"model": at("module.", {**states[0], **head})}, tmp_path / "w.pt")
    kept = build_model(conf(tmp_path / "w.pt", head=HeadKind.keep), CLASSES)
    assert torch.equal(kept.model.net.head.weight, head["head.weight"])
    probe = {
        "head.0.running_mean": torch.zeros(192),
        "head.1.weight": torch.randn(3, 192),
        "head.1.bias": torch.zeros(3),
    }
    assert "left out of the file: head" in assert_built({**states[0], **probe}, states[0], tmp_path / "w.pt")
    wide = {"head.weight": torch.randn(3, 384), "head.bias": torch.randn(3)}
    assert_built({**states[0], **wide}, states[0], tmp_path / "w.pt")


def test_the_authors_own_layout_is_read_by_timm_under_any_prefix(tmp_path: Path) -> None:
    """DINOv2's registers: one name differs, and the position of the class token is apart in timm."""
    import timm

    torch.manual_seed(0)
    name, args = "vit_small_patch14_reg4_dinov2", {"img_size": 28}
    net = timm.create_model(name, num_classes=0, **args)
    nn.init.normal_(net.reg_token)
    state = dict(net.state_dict())
    theirs = {**state, "register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 384)}
    del theirs["reg_token"]
    position = torch.randn(1, 1, 384)
    theirs["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    theirs["cls_token"] = state["cls_token"] - position[:, 0]
    settings = ModelConf(family=Family.vit, name=name, pretrained=str(tmp_path / "w.pt"), image_size=28)
    for content in (theirs, {"teacher": {**at("backbone.", theirs), "dino_head.mlp.0.weight": torch.ones(2, 2)}}):
        torch.save(content, tmp_path / "w.pt")
        built = build_model(settings, CLASSES).model.net.state_dict()
        for key, tensor in state.items():
            torch.testing.assert_close(built[key], tensor, msg=key)
    other = {key: tensor + 1 for key, tensor in theirs.items()}
    torch.save({"teacher": theirs, "student": other}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 different sets .* student, teacher"):
        build_model(settings, CLASSES)
    built = build_model(dataclasses.replace(settings, pretrained_key="student"), CLASSES)
    torch.testing.assert_close(built.model.net.norm.weight, state["norm.weight"] + 1)


def test_batch_norm_without_its_counters_under_a_prefix(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    state = models.resnet18().state_dict()
    plain = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": at("module.encoder_q.", plain), "queue": torch.ones(3)}, tmp_path / "w.pth")
    for library in (Library.torchvision, Library.timm):
        settings = ModelConf(family=Family.vit, name="resnet18", library=library, pretrained=str(tmp_path / "w.pth"))
        built = build_model(settings, CLASSES)
        assert torch.equal(built.model.net.layer4[0].bn1.running_var, state["layer4.0.bn1.running_var"])


def test_names_of_our_own_bundled_models_under_a_prefix(tmp_path: Path) -> None:
    for family in ("clip", "vit"):
        settings = ModelConf(family=Family(family), name=f"glyph_{family}", head=HeadKind.random)
        built = build_model(settings, CLASSES)
        save_file(at("model.", built.model.net.state_dict()), tmp_path / "w.safetensors")
        again = build_model(dataclasses.replace(settings, pretrained=str(tmp_path / "w.safetensors")), CLASSES)
        for name, parameter in again.model.net.named_parameters():
            if not name.startswith("head."):
                assert torch.equal(parameter, built.model.net.get_parameter(name)), name


def test_a_key_without_a_file_would_be_ignored() -> None:
    with pytest.raises(
        ValueError, match=r"pretrained_key=teacher would be ignored: model\.pretrained=bundled is no file"
    ):
        build_model(ModelConf(pretrained_key="teacher"), CLASSES)


def test_one_backbone_with_and_without_its_classifier_is_one_candidate(states: list[dict], tmp_path: Path) -> None:
    head = {"head.weight": torch.randn(3, 192), "head.bias": torch.randn(3)}
    torch.save({"backbone": states[0], "model": {**states[0], **head}}, tmp_path / "w.pt")
    kept = build_model(conf(tmp_path / "w.pt", head=HeadKind.keep), CLASSES)
    assert torch.equal(kept.model.net.head.weight, head["head.weight"])
    other = {name: tensor + 1 for name, tensor in head.items()}
    torch.save({"ema": {**states[0], **other}, "model": {**states[0], **head}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 different sets"):
        build_model(conf(tmp_path / "w.pt", head=HeadKind.keep), CLASSES)
    torch.save({"backbone": states[0], **head}, tmp_path / "w.pt")  # a classifier beside the backbone
    kept = build_model(conf(tmp_path / "w.pt", head=HeadKind.keep), CLASSES)
    assert torch.equal(kept.model.net.head.bias, head["head.bias"])


def test_weights_in_eight_bits_are_no_weights(states: list[dict], tmp_path: Path) -> None:
    small = {name: (tensor * 100).to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in states[0].items()}
    save_file(small, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"torch\.int8 for real numbers and 47 more.*dequantized"):
        build_model(conf(tmp_path / "w.safetensors"), CLASSES)


# The search alone.


def test_nothing_fits_lists_what_is_missing() -> None:
    wanted = Wanted.by(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"w\.pt holds the weights of another model .*4 missing: .*1 unexpected: x"):
        find_weights({"x": torch.ones(1)}, wanted, [Layout.own(wanted)], key=None, source="w.pt")


# Folders.


def test_a_folder_is_looked_into(states: list[dict], tmp_path: Path) -> None:
    import json

    def build(folder: Path) -> None:
        built = build_model(conf(folder), CLASSES).model.net.state_dict()
        assert torch.equal(built["norm.weight"], states[0]["norm.weight"])
        assert torch.equal(built["blocks.3.attn.qkv.weight"], states[0]["blocks.3.attn.qkv.weight"])

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match="no weights in this folder"):
        build_model(conf(folder("empty")), CLASSES)
    one = folder("one")
    save_file(states[0], one / "model.safetensors")
    torch.save({"state": {}}, one / "optimizer.pt")
    torch.save([1], one / "training_args.bin")
    build(one)
    torch.save(states[0], one / "pytorch_model.bin")  # the same, as transformers keeps it
    build(one)
    torch.save(states[1], one / "epoch3.pth")
    with pytest.raises(ValueError, match=r"3 files of weights: epoch3\.pth, model\.safetensors, pytorch_model\.bin"):
        build_model(conf(one), CLASSES)
    build(one / "model.safetensors")
    for name in ("pytorch_model.bin", "checkpoint.pth", "open_clip_pytorch_model.bin", "last.ckpt"):
        torch.save(states[0], folder(f"of_{name}") / name)
        build(tmp_path / f"of_{name}")
    sharded, names = folder("sharded"), list(states[0])
    for ending, write in ((".safetensors", save_file), (".bin", torch.save)):
        stem = "model" if ending == ".safetensors" else "pytorch_model"
        shards = {f"{stem}-0000{k + 1}-of-00002{ending}": names[k::2] for k in range(2)}
        for file, own in shards.items():
            write({name: states[0][name] for name in own}, sharded / file)
        index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
        (sharded / f"{stem}{ending}.index.json").write_text(json.dumps(index))
        build(sharded)
        build(sharded / f"{stem}{ending}.index.json")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of its 2 files are missing: model-00002"):
        build_model(conf(sharded), CLASSES)


def sharded(folder: Path, states: list[dict]) -> tuple[dict, dict]:
    """Two shards in a folder without an index, as file -> tensors, and their index."""
    names = list(states[0])
    shards = {
        f"model-0000{k + 1}-of-00002.safetensors": {name: states[0][name] for name in names[k::2]} for k in range(2)
    }
    for file, own in shards.items():
        save_file(own, folder / file)
    return shards, {"weight_map": {name: file for file, own in shards.items() for name in own}}


def test_shards_without_their_index_are_named(states: list[dict], tmp_path: Path) -> None:
    shards, _ = sharded(tmp_path, states)
    with pytest.raises(ValueError, match=r"2 of 2 shards of one set of weights.*model\.safetensors\.index\.json"):
        build_model(conf(tmp_path), CLASSES)
    first, second = (tmp_path / file for file in shards)
    with pytest.raises(ValueError, match=r"is one of 2 files that hold one set of weights"):
        build_model(conf(first), CLASSES)
    second.unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards"):
        build_model(conf(tmp_path), CLASSES)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("twice", r"norm\.weight stands in model-0000\d-of-00002\.safetensors too"),
        ("elsewhere", r"norm\.weight (is not in|stands in) model-0000\d-of-00002\.safetensors"),
        ("unlisted", r"norm\.weight in model-0000\d-of-00002\.safetensors is not in the index"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_named(
    fault: str, words: str, states: list[dict], tmp_path: Path
) -> None:
    import json

    shards, index = sharded(tmp_path, states)
    file = index["weight_map"]["norm.weight"]
    other = next(each for each in shards if each != file)
    if fault == "twice":
        save_file({**shards[other], "norm.weight": states[1]["norm.weight"] + 1}, tmp_path / other)
    elif fault == "elsewhere":
        index["weight_map"]["norm.weight"] = other
    else:
        del index["weight_map"]["norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words + r".*fetch the index and its files again") as caught:
        build_model(conf(tmp_path), CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("latest", "global_step5/mp_rank_00_model_states.pt"), "DeepSpeed.*zero_to_fp32"),
        (("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed.*zero_to_fp32"),
        (("zero_pp_rank_0_mp_rank_00_model_states.pt",), "DeepSpeed.*zero_to_fp32"),
        ((".metadata", "__0_0.distcp", "__1_0.distcp"), r"torch\.distributed\.checkpoint.*dcp_to_torch"),
        (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"), "pytorch_model_fsdp_0.*dcp_to_torch"),
        (("saved_model.pb", "variables/variables.index"), "TensorFlow"),
    ],
)
def test_a_folder_of_pieces_is_named(files: tuple[str, ...], words: str, states: list[dict], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"PK")
    with pytest.raises(ValueError, match=words) as caught:
        build_model(conf(tmp_path), CLASSES)
    assert "\n" not in str(caught.value)
    save_file(states[0], tmp_path / "model.safetensors")  # as transformers' trainer keeps them beside the pieces
    assert torch.equal(build_model(conf(tmp_path), CLASSES).model.net.norm.weight, states[0]["norm.weight"])


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {"a": "../w.pt"}}', '{"weight_map": {}}', '{"weight_map": 1}']
)
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of shards"):
        build_model(conf(tmp_path), CLASSES)


def test_a_run_of_ours_holds_two_files(tmp_path: Path, states: list[dict]) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_file(states[0], tmp_path / "checkpoints" / "best.safetensors")
    assert torch.equal(build_model(conf(tmp_path), CLASSES).model.net.norm.weight, states[0]["norm.weight"])
    save_file(states[1], tmp_path / "checkpoints" / "last.safetensors")
    with pytest.raises(ValueError, match=r"checkpoints/best\.safetensors, checkpoints/last\.safetensors"):
        build_model(conf(tmp_path), CLASSES)
