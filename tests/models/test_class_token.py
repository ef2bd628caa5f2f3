"""The shorter last block gives the logits and gradients of the whole block; other networks have no shorter block."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from small import ALL, CLASSES, VIT, small_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.models import vision_transformer

import finetune.core.recompute
from finetune.config import ModelConf, OptimConf, TrainConf
from finetune.config.words.configuration import compose
from finetune.config.words.settings import SETTINGS, convert
from finetune.core.cost import count_flops, estimate_memory
from finetune.core.freezing import freeze, set_up_layers
from finetune.core.layers import LayeredModel
from finetune.models import build_model
from finetune.models.heads.head import Head, TowerWithHead
from finetune.models.layering.towers import open_clip_layers, timm_layers, torchvision_layers, tower_with_head_layers
from finetune.runs.earlier import ROUNDING, Change

warnings.filterwarnings("ignore")

PLAIN = "vit_tiny_patch16_224"
EVA = "eva02_base_patch16_clip_224"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _timm(name: str = PLAIN, **args: object) -> LayeredModel:
    net = timm.create_model(name, **{**VIT, **args})
    return LayeredModel(net, timm_layers(net))


def _clip(**vision: object) -> LayeredModel:
    cfg = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32, **vision}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    visual = open_clip.CLIP(16, cfg, text).visual
    return LayeredModel(TowerWithHead(visual, Head(16, CLASSES)), tower_with_head_layers(open_clip_layers(visual)))


def _torchvision(**args: object) -> LayeredModel:
    net = vision_transformer.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES, **args)
    return LayeredModel(net, torchvision_layers(net))


class _OddBlock(Block):
    """A subclass of a known block."""


class _Unfused(timm.layers.Attention):
    """A subclass of a known attention."""


class _MixingNorm(nn.Module):
    """A norm that mixes tokens."""

    def __init__(self, dim: int, **_: object) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True) * self.scale if x.ndim == 3 else x * self.scale


def _without_fused_attention() -> LayeredModel:
    model = _timm()
    model.net.blocks[-1].attn.fused_attn = False
    return model


class _MixingMlp(timm.layers.Mlp):
    """An MLP that mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=1, keepdim=True))


def _gated() -> LayeredModel:
    net = timm.create_model(PLAIN, **VIT)
    net.blocks[-1].attn = timm.layers.Attention(48, num_heads=3, qkv_bias=True, gated=True)
    return LayeredModel(net, timm_layers(net))


Build = Callable[[], LayeredModel]
# Networks with a shorter last block. None has dropout in that block; some have drop path.
CAN: dict[str, Build] = {
    "plain": _timm,
    "registers": functools.partial(_timm, reg_tokens=2, no_embed_class=True),
    "layer-scale": functools.partial(_timm, init_values=0.5, drop_path_rate=0.5),
    "norms-everywhere": functools.partial(_timm, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "no-biases": functools.partial(_timm, qkv_bias=False, proj_bias=False, pre_norm=True),
    "norm-behind-the-pool": functools.partial(_timm, fc_norm=True, drop_path_rate=0.5),
    "unfused-attention": _without_fused_attention,
    "gated-mlp": functools.partial(_timm, mlp_layer=timm.layers.SwiGLU),
    "head-dropout": functools.partial(_timm, drop_rate=0.5, pos_drop_rate=0.2, patch_drop_rate=0.2),
    "bare": functools.partial(_timm, num_classes=0),
    "distilled": functools.partial(_timm, "deit_tiny_distilled_patch16_224", drop_path_rate=0.5),
    "distilled-bare": functools.partial(_timm, "deit_tiny_distilled_patch16_224", num_classes=0),
    "eva": functools.partial(_timm, "eva_giant_patch14_clip_224", drop_path_rate=0.5, init_values=0.5),
    "eva02": functools.partial(_timm, EVA),
    "eva-fused-biases": functools.partial(_timm, EVA, qkv_fused=True, qk_norm=True),
    "rotary-mixed": functools.partial(_timm, "vit_small_patch16_rope_mixed_224", drop_path_rate=0.5),
    "shared-keys": functools.partial(_timm, EVA, attn_type="rope", num_kv_heads=1, qkv_fused=False),
    "gated": _gated,
    "open_clip": _clip,
    "open_clip-layer-scale": functools.partial(_clip, ls_init_value=0.5, final_ln_after_pool=True, patch_dropout=0.3),
    "torchvision": _torchvision,
    "torchvision-hidden": functools.partial(_torchvision, representation_size=24),
    "wrapped": lambda: small_model("clip-timm-vit"),
}
# Networks without one: they read patch tokens, or a part is unknown.
CANNOT: dict[str, Build] = {
    "mean": functools.partial(_timm, global_pool="avg"),
    "maximum": functools.partial(_timm, global_pool="max"),
    "attention-pool": functools.partial(_timm, global_pool="map", class_token=False),
    "no-class-token": functools.partial(_timm, global_pool="avg", class_token=False),
    "eva-mean": functools.partial(_timm, EVA, global_pool="avg"),
    "subclassed-block": functools.partial(_timm, block_fn=_OddBlock),
    "subclassed-attention": functools.partial(_timm, attn_layer=_Unfused),
    "differential-attention": functools.partial(_timm, attn_layer="diff", num_heads=4),
    "parallel-block": functools.partial(_timm, block_fn=timm.models.vision_transformer.ParallelScalingBlock),
    "mixing-norm": functools.partial(_timm, norm_layer=_MixingNorm),
    "mixing-mlp": functools.partial(_timm, mlp_layer=_MixingMlp),
    "eva-post-norm": functools.partial(_timm, "eva02_enormous_patch14_clip_224"),
    "open_clip-mean": functools.partial(_clip, pool_type="avg"),
    "open_clip-attention-pool": functools.partial(_clip, attentional_pool=True, attn_pooler_heads=2),
    "open_clip-tokens": functools.partial(_clip, output_tokens=True),
    "open_clip-own-attention": functools.partial(_clip, qk_norm=True),
    **{name: functools.partial(small_model, name) for name in ("vit-reg-avg", "resnet", "tv-swin", "tv-efficientnet")},
    **{name: functools.partial(small_model, name) for name in ("beit-own-tables", "perception-encoder", "dinov3")},
}


def made(build: Build, dtype: torch.dtype = torch.float64) -> LayeredModel:
    """The model, with noise on every parameter: a parameter that starts at 0 would hide gradients."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(dtype)


def images_of(name: str, dtype: torch.dtype = torch.float64, batch: int = 4) -> Tensor:
    side = {"wrapped": 64, "vit-reg-avg": 64, "resnet": 64, "tv-swin": 64, "tv-efficientnet": 64}.get(name, 32)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def twins(model: LayeredModel) -> tuple[LayeredModel, LayeredModel]:
    """The model with the whole last block, and a copy with the shorter one."""
    other = copy.deepcopy(model)
    other.class_token_only = True
    return model, other


def has_shorter_run(model: LayeredModel) -> bool:
    return any(layer.run_class_token is not None for layer in model.layers)


def behind_blocks(model: LayeredModel) -> int:
    return [layer.name for layer in model.layers].index("readout")


def backward(model: LayeredModel, images: Tensor, start: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits, gradients by name, and the state of the random generator after the forward pass, from a fixed seed."""
    torch.manual_seed(3)
    logits = model(images, start=start)
    drawn = torch.get_rng_state()
    F.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1]).backward()
    return logits, {name: p.grad for name, p in model.net.named_parameters() if p.grad is not None}, drawn


def assert_same(found: object, expected: object, tolerance: float) -> None:
    """Logits and gradients are close, relative to their size, and the same random numbers were drawn."""
    (logits, gradients, drawn), (logits0, gradients0, drawn0) = found, expected  # type: ignore[misc]
    assert torch.equal(drawn, drawn0)
    assert gradients.keys() == gradients0.keys()
    assert (logits - logits0).norm() <= tolerance * logits0.norm()
    largest = max(gradient.norm() for gradient in gradients0.values())
    for name, gradient in gradients0.items():
        # The gradient of a key's bias is 0 but for rounding, so its error is measured against the largest gradient.
        assert (gradients[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3 * largest), name


@pytest.mark.parametrize("name", CAN)
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_every_gradient_are_those_of_the_whole_block(name: str, training: bool) -> None:
    model, short = twins(made(CAN[name]).train(training))
    assert has_shorter_run(model)
    images = images_of(name)
    with torch.no_grad():
        torch.manual_seed(5)
        whole = model(images, stop=behind_blocks(model))
        torch.manual_seed(5)
        few = short(images, stop=behind_blocks(model))
        kept = 2 if "distilled" in name else 1
        assert few.shape == (len(images), kept, whole.shape[2])
        assert (few - whole[:, :kept]).norm() <= 1e-12 * whole.norm()
    assert_same(backward(short, images), backward(model, images), 1e-12)


@pytest.mark.parametrize("name", ["plain", "open_clip", "torchvision", "eva02", "distilled"])
def test_single_precision_differs_by_rounding_only(name: str) -> None:
    model, short = twins(made(CAN[name], torch.float32).train())
    images = images_of(name, torch.float32)
    assert_same(backward(short, images), backward(model, images), 5e-6)


RUNNING = [name for name in (*CAN, *CANNOT) if name != "open_clip-tokens"]  # no classifier takes a tuple


@pytest.mark.parametrize("name", RUNNING)
def test_by_default_the_forward_pass_is_upstreams_to_the_bit(name: str) -> None:
    build = {**CAN, **CANNOT}[name]
    model, images = made(build, torch.float32).eval(), images_of(name, torch.float32)
    assert not model.class_token_only
    assert torch.equal(model(images), model.net(images))


@pytest.mark.parametrize("name", CANNOT)
def test_where_patches_are_read_or_a_part_is_unknown_the_run_is_the_ordinary_one(name: str) -> None:
    model, short = twins(made(CANNOT[name], torch.float32).train())
    assert not has_shorter_run(model)
    if name in RUNNING:
        images = images_of(name, torch.float32)
        assert_same(backward(short, images), backward(model, images), 0.0)


DROPPING: dict[str, Build] = {
    "attention": functools.partial(_timm, attn_drop_rate=0.2),
    "projection": functools.partial(_timm, proj_drop_rate=0.2),
    "eva": functools.partial(_timm, EVA, proj_drop_rate=0.2),
    "torchvision": functools.partial(_torchvision, dropout=0.2),
    "torchvision-attention": functools.partial(_torchvision, attention_dropout=0.2),
}


@pytest.mark.parametrize("name", DROPPING)
def test_active_dropout_draws_for_every_token_so_the_run_is_the_ordinary_one(name: str) -> None:
    model, short = twins(made(DROPPING[name], torch.float32).train())
    images = images_of(name, torch.float32)
    assert_same(backward(short, images), backward(model, images), 0.0)
    assert short(images, stop=short.num_blocks + 1).shape[1] == 17
    short.eval()
    assert short(images, stop=short.num_blocks + 1).shape[1] == 1
    # A frozen block is in eval mode, so its dropout is not active.
    freeze(short.train(), short.num_blocks)
    assert short(images, stop=short.num_blocks + 1).shape[1] == 1


def test_a_wrapper_in_the_blocks_place_sees_its_own_forward_call() -> None:
    model, short = twins(made(_timm, torch.float32).eval())
    images = images_of("plain", torch.float32)
    seen: list[torch.Size] = []

    class Sharded(Block):
        def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            seen.append(x.shape)
            return super().forward(x, *args, **kwargs)

    short.net.blocks[-1].__class__ = Sharded  # as FSDP2 does with a module that it shards
    assert torch.equal(short(images), model(images))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["layer-scale", "eva", "rotary-mixed", "open_clip", "torchvision", "distilled"])
@pytest.mark.parametrize("fix_layer", [-1, 1])
def test_recomputing_gives_the_same_bits(name: str, fix_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = twins(made(CAN[name], torch.float32))
    freeze(model, fix_layer)
    model.train()
    again = copy.deepcopy(model)
    again.recompute = True
    calls = []
    original = finetune.core.recompute.checkpoint
    monkeypatch.setattr(finetune.core.recompute, "checkpoint", lambda *a, **k: calls.append(a) or original(*a, **k))
    images = images_of(name, torch.float32)
    assert_same(backward(again, images), backward(model, images), 0.0)
    assert len(calls) == len(model.layers) - fix_layer - 1


@pytest.mark.parametrize("name", ["plain", "distilled", "eva02", "open_clip", "torchvision", "wrapped"])
def test_slices_are_the_whole_to_the_bit(name: str) -> None:
    _, model = twins(made(CAN[name], torch.float32).eval())
    images = images_of(name, torch.float32)
    with torch.no_grad():
        expected = model(images)
        for k in range(1, len(model.layers)):
            assert torch.equal(model(model(images, stop=k), start=k), expected), f"cut at {k}"


@pytest.mark.parametrize("name", ["plain", "eva02", "open_clip", "torchvision"])
def test_behind_a_frozen_last_block_stands_the_class_token_alone(name: str) -> None:
    for fix_layer, tokens in ((-1, 17), (0, 17), (1, 1)):  # only in the last case is the last block frozen
        model, short = twins(made(CAN[name]))
        for one in (model, short):
            freeze(one, model.num_blocks - 1 + fix_layer)
            one.train()
        cut, images = short.num_frozen, images_of(name)
        with torch.no_grad():
            h = short(images, stop=cut)
            assert h.shape[:2] == (len(images), tokens)
            whole = model(images, stop=cut)
        assert not h.requires_grad
        assert_same(backward(short, h, cut), backward(model, whole, cut), 1e-12)


@pytest.mark.parametrize("name", ["plain", "norms-everywhere", "eva02", "rotary-mixed", "open_clip", "torchvision"])
def test_mixed_precision_is_as_close_as_its_rounding(name: str) -> None:
    model, short = twins(made(CAN[name], torch.float32).eval())
    images = images_of(name, torch.float32)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (whole, of_whole, _), (few, of_few, _) = backward(model, images), backward(short, images)
    assert few.dtype == whole.dtype
    assert (few - exact).norm() <= 2 * (whole - exact).norm() + 1e-3 * exact.norm()
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in of_few.values())
    assert of_few.keys() == of_whole.keys()


def test_the_setting_is_off_where_it_makes_no_difference() -> None:
    conf = compose(["train.class_token_only=off"])
    short, whole = (made(build, torch.float32) for build in (_timm, functools.partial(_timm, global_pool="avg")))
    set_up_layers(short, conf.optim, train=conf.train)
    assert not short.class_token_only
    set_up_layers(short, OptimConf(), train=TrainConf())
    set_up_layers(whole, OptimConf(), train=TrainConf())
    assert short.class_token_only and not whole.class_token_only


def test_the_setting_may_change_on_resume_and_a_bare_off_in_yaml_is_explained() -> None:
    change = Change("train.class_token_only", "auto", "off")
    assert change.is_allowed and change.key in ROUNDING
    with pytest.raises(ValueError, match=r"expected one of auto, off .*write 'off'"):
        convert(SETTINGS["train.class_token_only"], False)


@pytest.mark.parametrize(
    "name", ["rotary-mixed", "open_clip", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "torchvision"))]
)
def test_it_compiles_into_one_graph(name: str) -> None:
    _, model = twins(made(CAN[name], torch.float32).eval())
    images = images_of(name, torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_both_bundled_models_have_it_and_their_cost_is_that_of_the_run(family: str) -> None:
    conf = compose([f"model={family}"])
    names = [str(index) for index in range(10)]
    meta = build_model(conf.model, names, device="meta").model
    real = build_model(conf.model, names, device="cpu").model
    before = count_flops(meta, 32)
    for model in (meta, real):
        set_up_layers(model, conf.optim, train=conf.train)
        assert model.class_token_only
    assert 0.85 * before.forward < count_flops(meta, 32).forward < 0.9 * before.forward  # nearly one block of six
    own = {tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = real(torch.randn(6, 3, 32, 32))
    expected = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert logits.shape == (6, 10)
    assert estimate_memory(meta, 32, batch_size=6, dtype=torch.float32).activations == expected


def test_a_pool_chosen_by_the_configuration_reads_patches() -> None:
    names = ["a", "b"]
    for words in (["model=clip", "model.pool=mean"], ["model=vit", "model.pool=mean"]):
        conf: ModelConf = compose(words).model
        assert not has_shorter_run(build_model(conf, names, device="meta").model)


def test_the_small_networks_that_can_are_these() -> None:
    found = {name for name in ALL if has_shorter_run(small_model(name))}
    assert found == {
        *("vit", "deit-distilled", "eva02-clip", "rope-mixed", "tv-vit", "tv-vit-hidden", "clip-vit"),
        *("clip-timm-vit", "clip-timm-vit-own-head"),
    }
