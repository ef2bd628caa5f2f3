"""Files whose names a library itself changes: what it drops is said, and a deeper network is another model."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.config import Family, HeadKind, ModelConf
from finetune.models import build_model
from finetune.models.upstream.tracing import traced

CLASSES = ["a", "b", "c"]
TRUNK = {"img_size": 32, "depth": 2}
CFG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_base_mci_224",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 100,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "no_causal_mask": False,
    },
    "custom_text": True,
}
# open_clip's names, then those in Apple's file of MobileCLIP-B.
BLOCK = [
    ("norm1.", "pre_norm_mha.0."),
    ("ln_1.", "pre_norm_mha.0."),
    ("attn.qkv.", "pre_norm_mha.1.qkv_proj."),
    ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
    ("attn.proj.", "pre_norm_mha.1.out_proj."),
    ("attn.out_proj.", "pre_norm_mha.1.out_proj."),
    ("norm2.", "pre_norm_ffn.0."),
    ("ln_2.", "pre_norm_ffn.0."),
    ("mlp.fc1.", "pre_norm_ffn.1."),
    ("mlp.c_fc.", "pre_norm_ffn.1."),
    ("mlp.fc2.", "pre_norm_ffn.4."),
    ("mlp.c_proj.", "pre_norm_ffn.4."),
]
IMAGE = [
    (".conv.weight", ".block.conv.weight"),
    (".bn.", ".block.norm."),
    ("patch_embed.backbone.", "patch_emb."),
    ("blocks.", "transformer."),
    ("pos_embed", "pos_embed.pos_embed.pos_embed"),
]
TEXT = [
    ("resblocks.", ""),
    ("token_embedding", "embedding_layer"),
    ("text_projection", "projection_layer"),
    ("ln_final", "final_layer_norm"),
    ("positional_embedding", "positional_embedding.pos_embed.pos_embed"),
]


def apples(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a MobileCLIP of open_clip under Apple's names."""
    found = {"logit_scale": state["logit_scale"]}
    for name, tensor in state.items():
        tower, _, rest = name.partition(".")
        rest = rest.removeprefix("trunk.")
        for ours, theirs in [*BLOCK, *(IMAGE if tower == "visual" else TEXT)]:
            rest = rest.replace(ours, theirs)
        rest = re.sub(r"^norm\.", "post_transformer_norm.", rest)
        if tower == "visual" and rest != "head.bias":
            if rest == "head.weight":
                rest, tensor = "classifier.proj", tensor.T
            found[f"image_encoder.model.{rest}"] = tensor[None] if "pos_embed" in rest else tensor
        elif tower == "text":
            found[f"text_encoder.{rest}"] = tensor
    return found


@pytest.fixture
def mobile_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Writes `w.pt`, the file of a MobileCLIP of the given depths; open_clip's own has two blocks a tower."""
    import open_clip
    import timm

    whole = timm.create_model

    def write(image: int = 2, text: int = 2) -> dict[str, Tensor]:
        monkeypatch.setattr(
            timm, "create_model", lambda name, **given: whole(name, **{**given, **TRUNK, "depth": image})
        )
        cfg = copy.deepcopy(CFG)
        del cfg["custom_text"]
        cfg["text_cfg"]["layers"] = text  # type: ignore[index]
        state = open_clip.CustomTextCLIP(**cfg).state_dict()
        torch.save(apples(state), tmp_path / "w.pt")
        monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **TRUNK}))
        return state

    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(CFG))
    monkeypatch.setattr("finetune.models.upstream.clip_source._tokenizer", lambda *place: tokens)
    return write


def tokens(texts: list[str]) -> Tensor:
    return torch.randint(1, 98, (len(texts), 77))


def clip(path: Path, head: HeadKind = HeadKind.random) -> ModelConf:
    return ModelConf(name="MobileCLIP-B", pretrained=str(path / "w.pt"), head=head, templates=["{}"])


def test_apples_names_are_read(mobile_clip, tmp_path: Path) -> None:
    state = mobile_clip()
    built = build_model(clip(tmp_path), CLASSES)
    for name, tensor in built.model.net.state_dict().items():
        if name.startswith("visual.trunk.") and name != "visual.trunk.head.bias":
            assert torch.equal(tensor, state[name]), name
    assert "; left out of the file: logit_scale, text_encoder (" in built.description
    assert "left out" not in build_model(clip(tmp_path, HeadKind.zeroshot), CLASSES).description


@pytest.mark.parametrize(("image", "text"), [(3, 2), (2, 3)])
def test_a_deeper_mobile_clip_is_another_model(image: int, text: int, mobile_clip, tmp_path: Path) -> None:
    mobile_clip(image, text)
    tower = "image_encoder.model" if image > 2 else "text_encoder"
    with pytest.raises(ValueError, match=rf"deeper model .*unexpected: {tower}\.transformer\.2.*check model\.name"):
        build_model(clip(tmp_path, HeadKind.zeroshot), CLASSES)
    if image == 2:
        build_model(clip(tmp_path), CLASSES)  # without the text tower


@pytest.mark.parametrize("depth", [2, 3])
def test_metas_names_of_a_convnext(depth: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    whole, depths, dims = timm.create_model, (1, depth, 1, 1), (8, 8, 16, 16)
    theirs = whole("convnext_nano", depths=depths, dims=dims, num_classes=0).state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        for ours, meta in [
            (r"^stem\.", "downsample_layers.0."),
            (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"stages\.(\d)\.blocks\.(\d)\.", r"stages.\1.\2."),
            ("conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"),
            (r"^head\.norm", "norm"),
        ]:
            name = re.sub(ours, meta, name)
        state[name] = tensor
    torch.save({"model": {**state, "projectors.0.weight": torch.ones(2)}}, tmp_path / "w.pt")
    args = {"depths": (1, 2, 1, 1), "dims": dims}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: whole(name, **{**given, **args}))
    settings = ModelConf(family=Family.vit, name="convnext_nano", pretrained=str(tmp_path / "w.pt"))
    if depth > 2:
        with pytest.raises(ValueError, match=r"check model\.name"):
            build_model(settings, CLASSES)
        return
    built = build_model(settings, CLASSES)
    assert torch.equal(built.model.net.get_parameter("stages.3.blocks.0.gamma"), theirs["stages.3.blocks.0.gamma"])
    assert "; read from model; left out of the file: model.projectors" in built.description


def test_tensors_are_traced_through_what_is_done_to_them() -> None:
    group = {name: torch.randn(2, 2) for name in "abcdefg"}
    group["z"] = group["a"]

    def make() -> list[Tensor]:
        table = torch.zeros(3, 2)
        table[0] = group["d"][1].flatten()
        filled = torch.empty(2, 2).copy_(group["e"])
        group["f"].sum()
        return [torch.cat([group["a"].T, group["b"] * 2]), copy.deepcopy(group["c"]), table, filled.detach()]

    _, used = traced(group, make, lambda made: made)
    assert used == set("abcdez")
