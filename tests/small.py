"""Small networks with random weights: one or more of every family that runs layer by layer, and some that do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn
from torchvision.models import convnext, efficientnet, resnet, swin_transformer, vision_transformer

from finetune.core.layers import LayeredModel
from finetune.models.heads.head import Head, TowerWithHead
from finetune.models.layering.towers import open_clip_layers, timm_layers, torchvision_layers, tower_with_head_layers

CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
NOISE = {"drop_rate": 0.1, "drop_path_rate": 0.3}
VIT_NOISE = {**NOISE, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}

Build = Callable[[], LayeredModel]


def _timm(name: str, **args: Any) -> LayeredModel:
    net = timm.create_model(name, **{"num_classes": CLASSES, **args})
    return LayeredModel(net, timm_layers(net))


def _torchvision(net: nn.Module) -> LayeredModel:
    return LayeredModel(net, torchvision_layers(net))


def _tower(visual: nn.Module, features: int) -> LayeredModel:
    net = TowerWithHead(visual, Head(features, CLASSES))
    return LayeredModel(net, tower_with_head_layers(open_clip_layers(visual)))


def _clip(**vision: Any) -> LayeredModel:
    cfg = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32, **vision}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return _tower(open_clip.CLIP(16, cfg, text).visual, 16)


def _wrapped(name: str, pool: str, proj: str, features: int = 16, **args: Any) -> LayeredModel:
    visual = TimmModel(name, 16, pool=pool, proj=proj, drop=0.1, **args)
    if "vit" in name:
        visual.set_input_size(64)  # a sixth of the tokens of its own 160 pixels
    return _tower(visual, features)


def _tv_convnext() -> nn.Module:
    setting = convnext.CNBlockConfig
    return convnext.ConvNeXt(
        [setting(16, 32, 2), setting(32, None, 1)], stochastic_depth_prob=0.3, num_classes=CLASSES, layer_scale=0.5
    )


def _tv_swin(**args: Any) -> nn.Module:
    return swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], dropout=0.1, stochastic_depth_prob=0.3, num_classes=CLASSES, **args
    )


def _tv_swin_v2() -> nn.Module:
    parts = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    return _tv_swin(**parts)


def _tv_vit(**args: Any) -> nn.Module:
    return vision_transformer.VisionTransformer(32, 8, 3, 2, 32, 64, dropout=0.1, num_classes=CLASSES, **args)


def _tv_efficientnet() -> nn.Module:
    setting = functools.partial(efficientnet.MBConvConfig, width_mult=0.25, depth_mult=1.0)
    settings = [setting(1, 3, 1, 32, 32, 1), setting(4, 3, 2, 32, 64, 2)]
    return efficientnet.EfficientNet(settings, dropout=0.1, stochastic_depth_prob=0.3, num_classes=CLASSES)


_eva = functools.partial(_timm, **VIT, **VIT_NOISE)

CHAINS: dict[str, tuple[Build, int]] = {
    "vit": (functools.partial(_timm, "vit_tiny_patch16_224", **VIT, **VIT_NOISE), 32),
    "vit-reg-avg": (functools.partial(_timm, "test_vit3", img_size=64, **NOISE), 64),
    "deit-distilled": (functools.partial(_timm, "deit_tiny_distilled_patch16_224", **VIT, **VIT_NOISE), 32),
    "eva-abs": (functools.partial(_eva, "eva_giant_patch14_224"), 32),
    "eva02": (functools.partial(_eva, "eva02_tiny_patch14_224"), 32),
    "eva02-clip": (functools.partial(_eva, "eva02_base_patch16_clip_224"), 32),
    "dinov3": (functools.partial(_eva, "vit_small_patch16_dinov3"), 32),
    "rope-mixed": (functools.partial(_eva, "vit_small_patch16_rope_mixed_224"), 32),
    "perception-encoder": (functools.partial(_eva, "vit_pe_core_base_patch16_224", attn_pool_num_heads=3), 32),
    "beit-own-tables": (functools.partial(_eva, "beit_base_patch16_224"), 32),
    "beit-shared-table": (
        functools.partial(_eva, "beitv2_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
        32,
    ),
    "convnext": (functools.partial(_timm, "test_convnext", **NOISE), 64),
    "convnext-norm-first": (functools.partial(_timm, "test_convnext2", head_norm_first=True, **NOISE), 64),
    "convnext-hidden": (functools.partial(_timm, "test_convnext3", head_hidden_size=20, **NOISE), 64),
    "resnet": (functools.partial(_timm, "test_resnet", **NOISE), 64),
    "tv-vit": (lambda: _torchvision(_tv_vit()), 32),
    "tv-vit-hidden": (lambda: _torchvision(_tv_vit(representation_size=24)), 32),
    "tv-convnext": (lambda: _torchvision(_tv_convnext()), 32),
    "tv-resnet": (lambda: _torchvision(resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=CLASSES)), 64),
    "tv-swin": (lambda: _torchvision(_tv_swin()), 64),
    "tv-swin-v2": (lambda: _torchvision(_tv_swin_v2()), 64),
    "clip-vit": (functools.partial(_clip, patch_dropout=0.3), 32),
    "clip-resnet": (lambda: _tower(ModifiedResNet([1, 2, 1, 1], 16, 2, image_size=64, width=8), 16), 64),
    "clip-timm-vit": (functools.partial(_wrapped, "test_vit", "", "linear", drop_path=0.3), 64),
    "clip-timm-vit-own-head": (functools.partial(_wrapped, "test_vit", "token", ""), 64),
    "clip-timm-siglip": (functools.partial(_wrapped, "test_vit4", "map", "none", features=96), 64),
    "clip-timm-convnext-mlp": (functools.partial(_wrapped, "test_convnext", "", "mlp", drop_path=0.3), 64),
    "clip-timm-convnext-attention": (functools.partial(_wrapped, "test_convnext", "rot_attn", ""), 160),
}
WHOLE: dict[str, tuple[Build, int]] = {
    "efficientnet": (functools.partial(_timm, "test_efficientnet", **NOISE), 64),
    "nfnet": (functools.partial(_timm, "test_nfnet", **NOISE), 64),
    "maxvit": (functools.partial(_timm, "test_maxvit", **NOISE), 160),
    "relpos": (functools.partial(_timm, "test_vit_relpos", img_size=64, **NOISE), 64),
    "tv-efficientnet": (lambda: _torchvision(_tv_efficientnet()), 64),
}
ALL = {**CHAINS, **WHOLE}


def small_model(name: str, seed: int = 0) -> LayeredModel:
    """A small network with noise on every parameter: one that starts at 0 would hide the gradients before it."""
    torch.manual_seed(seed)
    model = ALL[name][0]()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def small_images(name: str, batch: int = 3) -> torch.Tensor:
    side = ALL[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
