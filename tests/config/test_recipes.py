"""Recipes: the rate for this batch, the warmup in this run's steps, pooling and heads as published; presets compose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.app.rate_plan import batch_notice, peak_optim, run_curve, short_epoch_notice
from finetune.config import Conf, DataConf, Family, HeadKind, Interval, ModelConf, Pool, SchedulerConf, find_problems
from finetune.config.words.configuration import compose
from finetune.core.freezing import freeze
from finetune.core.optim import param_groups
from finetune.core.sched import Curve, lr_factor
from finetune.data.loading.order import in_whole_steps
from finetune.models import build_model

NAMES = ["a", "b", "c"]


def test_the_rate_follows_the_batch_and_the_conf_stays() -> None:
    conf = Conf(data=DataConf(batch_size=128))
    conf.optim.lr, conf.optim.lr_base_batch, conf.train.accumulate = 5e-4, 256, 8
    assert peak_optim(conf).lr == pytest.approx(5e-4 * 1024 / 256)  # MAE's blr at its own batch
    assert peak_optim(conf).lr_base_batch == 0
    assert conf.optim.lr == 5e-4
    conf.optim.lr_base_batch = 0
    assert peak_optim(conf).lr == 5e-4


def test_another_batch_than_the_recipes_is_said_with_the_scaled_rate() -> None:
    conf = Conf(data=DataConf(batch_size=32))
    conf.optim.lr = 6e-4
    assert batch_notice(conf) is None
    conf.optim.recipe_batch = 2048
    notice = batch_notice(conf)
    assert notice is not None
    for words in ("32 images a step", "2048", "still 0.0006", "optim.lr_base_batch=2048", "9.37e-06", "accumulate=64"):
        assert words in notice
    conf.optim.lr_base_batch = 2048
    notice = batch_notice(conf)
    assert notice is not None and "peak 9.37e-06" in notice
    conf.train.accumulate = 64
    assert batch_notice(conf) is None


def test_a_step_of_more_images_than_an_epoch_has_is_said() -> None:
    conf = Conf()
    conf.train.accumulate = 20
    assert short_epoch_notice(conf, 1280) is None
    notice = short_epoch_notice(conf, 1279)
    assert notice is not None and "1,280 images" in notice and "an epoch has 1,279" in notice and "scale" not in notice
    conf.optim.lr_base_batch = 256
    assert "as if it had 1,280" in str(short_epoch_notice(conf, 100))
    conf.train.accumulate = 1
    assert short_epoch_notice(conf, 40) is None  # a small set in one batch is no mistake


def test_a_warmup_in_epochs_counts_the_steps_of_this_run() -> None:
    sched = SchedulerConf(interval=Interval.step, warmup_epochs=2.5)
    curve = Curve.of_run(sched, epochs=4, steps_per_epoch=7)
    assert curve.sched == SchedulerConf(interval=Interval.step, warmup=round(2.5 * 7))
    assert sched.warmup_epochs == 2.5
    assert curve.num_units == len(curve.factors()) == 28
    assert Curve.of_run(SchedulerConf(), epochs=4, steps_per_epoch=7).num_units == 4
    for changes, words in (
        ({"warmup_epochs": 0.07}, r"sched\.warmup_epochs=0\.07 would be ignored: .*half a step, of 7 an epoch"),
        ({"warmup": 28}, r"sched\.warmup=28: 28 steps of warmup, and the run has 28"),
        ({"warmup": 30, "cycle": 50}, r"sched\.warmup=30: 30 steps of warmup, and the run has 28"),
        ({"warmup_epochs": 2, "cycle": 14}, r"sched\.warmup_epochs=2: 14 steps of warmup, and the curve has 14"),
    ):
        with pytest.raises(ValueError, match=words):
            Curve.of_run(SchedulerConf(interval=Interval.step, **changes), epochs=4, steps_per_epoch=7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sched.warmup_epochs": 2.0}, "sched.interval=step"),
        ({"sched.warmup_epochs": 2.0, "sched.interval": Interval.step, "sched.warmup": 3}, "leave one out"),
        ({"sched.warmup_epochs": 15.0, "sched.interval": Interval.step}, "less than the run"),
        ({"train.ema_warmup": False}, "needs train.ema"),
        ({"model.head_scale": 0.001}, "this one is zeroshot"),
        ({"model.head_scale": 0.001, "model.head": HeadKind.keep}, "this one is keep"),
        ({"model.pool": Pool.mean, "model.head": HeadKind.zeroshot}, "model.head=random"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(change: dict[str, object], words: str) -> None:
    conf = Conf()
    for key, value in change.items():
        part, _, name = key.partition(".")
        setattr(getattr(conf, part), name, value)
    (problem,) = find_problems(conf)
    assert words in problem


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_mean_pooling_reads_the_patches_under_a_new_norm(family: str) -> None:
    """Only patches behind the last block are read. CLIP: mean(norm(patch)), as FT-CLIP; ViT: norm(mean), as MAE."""
    torch.manual_seed(0)
    conf = ModelConf(family=Family(family), name=f"glyph_{family}", pool=Pool.mean, head_scale=0.001)
    built = build_model(conf, NAMES)
    model = built.model.eval()
    assert not built.has_zeroshot
    images = torch.randn(2, 3, built.preprocess.size, built.preprocess.size)
    tokens = model(images, stop=model.num_blocks + 1)
    net: nn.Module = model.net
    norm = net.get_submodule("visual.ln_post" if family == "clip" else "fc_norm")
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    patches = tokens[:, 1:]
    pooled = norm(patches).mean(dim=1) if family == "clip" else norm(patches.mean(dim=1))
    expected = net.get_submodule("head")(pooled)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(net(images), expected)
    readout = [name for name, _ in net.named_parameters() if model.layer_ids[name] == model.num_blocks + 1]
    assert len(readout) == 2
    head = net.get_submodule("head").weight
    assert 1.2e-5 < head.std().item() < 2.8e-5  # MAE's trunc_normal_(std=2e-5)


def test_drop_path_reaches_the_trunks_that_open_clip_has_from_timm() -> None:
    conf = ModelConf(name="ViT-B-16-SigLIP", pretrained="none", head=HeadKind.random, drop_path=0.2)
    net = build_model(conf, NAMES, device="meta").model.net
    rates = [module.drop_prob for module in net.modules() if type(module).__name__ == "DropPath"]
    assert len(rates) == 2 * 11  # the first block's probability is 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"model\.drop_path=0\.2 would be ignored"):
        build_model(ModelConf(name="ViT-B-16", pretrained="none", head=HeadKind.random, drop_path=0.2), NAMES)


def test_mean_pooling_needs_a_plain_vit() -> None:
    siglip = ModelConf(name="ViT-B-16-SigLIP", pretrained="none", pool=Pool.mean)
    resnet = ModelConf(family=Family.vit, name="resnet18.a1_in1k", pretrained="none", pool=Pool.mean)
    vit = ModelConf(family=Family.vit, name="vit_b_16", pretrained="none", pool=Pool.mean)
    for conf in (siglip, resnet, vit):
        with pytest.raises(ValueError, match=r"model\.pool"):
            build_model(conf, NAMES, device="meta")


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224.mae", "beit_base_patch16_224.in22k_ft_in22k", "eva02_tiny_patch14_224"]
)
def test_mean_pooling_of_timm_equals_timms_own(name: str) -> None:
    import timm

    built = build_model(
        ModelConf(family=Family.vit, name=name, pretrained="none", pool=Pool.mean), NAMES, device="meta"
    )
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=3, global_pool="avg")
    assert {n: p.shape for n, p in built.model.net.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }


CONF = Path(__file__).parent.parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PUBLISHED = [
    *("beitv2_b16", "eva02_l", "ft_clip_b16", "ft_clip_l14", "ft_clip_l14_336", "lp_ft", "mae_b16", "mkt", "wise_ft"),
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds_at_its_own_batch(name: str) -> None:
    conf = compose([f"experiment={name}"])
    assert batch_notice(conf) is None
    model = build_model(conf.model, NAMES, device="meta").model
    freeze(model, conf.optim.fix_layer, conf.optim.freeze)
    assert param_groups(model, peak_optim(conf))
    header = (CONF / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"python -m finetune experiment={name}" in header
    if name in PUBLISHED:
        assert conf.optim.recipe_batch > 0
        for word in ("Source: ", "arXiv:", "Hardware: "):
            assert word in header, word


@pytest.mark.parametrize("name", MODELS)
def test_every_model_preset_builds_with_weights_that_exist(name: str) -> None:
    conf = compose([f"model={name}"])
    built = build_model(conf.model, NAMES, device="meta")  # looks the tag up, fetches nothing
    assert built.model.is_chain
    assert all(p.device.type == "meta" for p in built.model.parameters())


@pytest.mark.parametrize(
    ("name", "peak", "least", "steps"),
    [
        # On ImageNet-1k's 1,281,167 images: peak rate, rate at the end, optimizer steps of warmup.
        ("ft_clip_b16", 6e-4, 1e-6, 6250),
        ("ft_clip_l14", 4e-4, 1e-6, 3125),
        ("ft_clip_l14_336", 6e-4, 1e-6, 3335),
        ("mae_b16", 2e-3, 1e-6, 6255),
        ("beitv2_b16", 5e-5, 1e-6, 25020),
        ("eva02_l", 2e-5, 0.0, 5004),
        ("wise_ft", 3e-5, 0.0, 500),
        ("mkt", 1e-3, 1e-6, 40036),
    ],
)
def test_rates_of_the_published_recipes(name: str, peak: float, least: float, steps: int) -> None:
    conf = compose([f"experiment={name}"])
    assert peak_optim(conf).lr == pytest.approx(peak)
    images = 1_281_167
    if conf.data.drop_last:
        images = in_whole_steps(images, conf.data.batch_size * conf.train.accumulate)
    curve = run_curve(conf, -(-images // conf.data.batch_size))
    assert peak_optim(conf).lr * curve.sched.scale_min == pytest.approx(least)
    assert curve.sched.warmup == steps
    assert lr_factor(0, curve.sched, curve.num_units) < 0.01
    assert lr_factor(steps, curve.sched, curve.num_units) == pytest.approx(1.0)


def test_the_page_of_recipes_names_every_preset() -> None:
    page = (CONF.parent / "docs" / "recipes.md").read_text()
    for name in (*PUBLISHED, *MODELS):
        assert f"`{name}`" in page or name in ("clip", "vit"), name
