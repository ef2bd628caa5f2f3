"""Each recipe against its authors' rules, written a second time from papers and scripts; none of ours is asked.

Sources: LightDXY/FT-CLIP (models/finetune_clip.py, optim_factory.py, datasets.py, utils.py, scripts/, logs/);
facebookresearch/mae (util/lr_decay.py, util/lr_sched.py, util/datasets.py, main_finetune.py, FINETUNE.md);
microsoft/unilm beit2 and baaivision/EVA EVA-02/asuka (optim_factory.py, modeling_finetune.py, datasets.py, utils.py,
run_class_finetuning.py, the commands on their pages); mlfoundations/wise-ft (src/models/, clip/clip.py, README);
sunanhe/MKT (utils/, train_nus_first_stage.py). docs/recipes.md lists what is not equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.app.description import describe
from finetune.app.rate_plan import peak_optim, run_curve
from finetune.config import Conf
from finetune.config.words.configuration import compose
from finetune.core.freezing import set_up_layers
from finetune.core.losses import build_criterion
from finetune.core.optim import build_optimizer, param_groups
from finetune.core.preprocess import Preprocess, as_asked
from finetune.core.sched import create_scheduler
from finetune.data.images.transforms import fit_square
from finetune.models import BuiltModel, build_model

IMAGES = 1_281_167  # of ImageNet-1k's training set
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Theirs:
    """What the authors' code does."""

    lr: float  # the head's, at its peak
    layer_decay: float
    weight_decay: float
    depth: int
    blocks: str  # what stands ahead of a block's number
    stem: tuple[str, ...]  # beginnings of the names with id 0
    is_spared: Callable[[str, Shape], bool]  # from weight decay
    is_frozen: Callable[[str, int], bool]  # by name and id
    steps_per_epoch: int
    epochs: int
    warmup: int  # steps
    warmup_rate: Callable[[int, int], float]  # share of the peak in step t of w
    floor: float  # of the head's rate
    shorter: int  # pixels of the shorter side in evaluation
    size: int  # pixels a side behind the centre crop
    normalised: tuple[tuple[float, ...], tuple[float, ...]]
    settings: dict[str, object] = field(default_factory=dict)  # of ours, by key, which must have these values

    def layer_id(self, name: str) -> int:
        """The id by the if-chain that all of these repositories share."""
        if name.startswith(self.stem):
            return 0
        if name.startswith(self.blocks):
            return int(name.removeprefix(self.blocks).split(".")[0]) + 1
        return self.depth + 1

    def rate(self, step: int) -> float:
        """The head's rate in a step: linear to the peak, then half a cosine down to the floor."""
        if step < self.warmup:
            return self.lr * self.warmup_rate(step, self.warmup)
        share = (step - self.warmup) / (self.epochs * self.steps_per_epoch - self.warmup)
        return self.floor + (self.lr - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


VIT_STEM = ("cls_token", "mask_token", "pos_embed", "patch_embed")
CLIP_STEM = ("class_embedding", "positional_embedding", "conv1", "ln_pre")
CLIP_BLOCKS = "transformer.resblocks."
FT_CLIP_AUGMENT = {
    "augment.policy": "randaug", "augment.randaug_ops": 2, "augment.randaug_magnitude": 9.0, "augment.randaug_std": 0.5,
    "augment.interpolation": "bicubic", "augment.flip": 0.5, "augment.erasing": 0.25, "augment.crop_scale": (0.08, 1.0),
    "augment.crop_ratio": (0.75, 4 / 3), "augment.jitter": 0.0,
}  # fmt: skip
NO_MIXING: dict[str, object] = {"augment.mixup": 0.0, "augment.cutmix": 0.0}
ADAMW: dict[str, object] = {
    "optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "augment.repeats": 1, "augment.views": 0,
}  # fmt: skip
SHARED: dict[str, object] = {
    **ADAMW, "train.clip_grad": 0.0, "train.loss": "auto", "data.drop_last": True, "model.head_scale": 0.001,
}  # fmt: skip


def none_frozen(name: str, layer_id: int) -> bool:
    return False


def beit_spares(name: str, shape: Shape) -> bool:
    """BEiT v2 and EVA-02: `no_weight_decay()` has these two names, and tables of relative positions are matrices."""
    return len(shape) <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")


def ft_clip(lr: float, decay: float, depth: int, *, epochs: int, warmup: int, batch: int, size: int) -> Theirs:
    def spares(name: str, shape: Shape) -> bool:
        return len(shape) == 1 or name.endswith(".bias") or name in ("positional_embedding", "class_embedding")

    def freezes(name: str, layer_id: int) -> bool:
        return size == 224 and name.startswith("conv1")  # `freeze_conv1`, False in the models of 336 and 384 pixels

    steps = IMAGES // batch
    settings = {
        **FT_CLIP_AUGMENT, **NO_MIXING, **SHARED, "model.pool": "mean", "train.label_smoothing": 0.1,
        "train.ema": 0.9998, "train.ema_warmup": False, "model.pretrained": "openai",
    }  # fmt: skip
    return Theirs(
        lr, decay, 0.05, depth, CLIP_BLOCKS, CLIP_STEM, spares, freezes, steps, epochs, warmup * steps,
        lambda t, w: t / (w - 1), 1e-6, size, size, CLIP, settings,
    )  # fmt: skip


def wise_ft() -> Theirs:
    """One group; no word of weight decay is passed on, so AdamW decays everything; the last batch is kept."""
    settings = {
        **ADAMW, "augment.policy": "none", "augment.flip": 0.0, "augment.crop_scale": (0.9, 1.0),
        "augment.erasing": 0.0, "augment.crop_ratio": (0.75, 4 / 3), **NO_MIXING, "train.clip_grad": 1.0,
        "train.label_smoothing": 0.0, "train.ema": 0.0, "data.drop_last": False, "model.head": "zeroshot",
        "model.head_bias": True, "model.templates": ["imagenet"], "model.pretrained": "openai",
    }  # fmt: skip
    return Theirs(
        3e-5, 1.0, 0.1, 12, CLIP_BLOCKS, CLIP_STEM, lambda name, shape: False, none_frozen, -(-IMAGES // 512), 10, 500,
        lambda t, w: (t + 1) / w, 0.0, 224, 224, CLIP, settings,
    )  # fmt: skip


def mkt() -> Theirs:
    """Its images are normalised by ImageNet's numbers, which the recipe does not follow."""
    settings = {
        **ADAMW, **FT_CLIP_AUGMENT, **NO_MIXING, "augment.erasing": 0.0, "train.clip_grad": 0.0, "train.ema": 0.0,
        "train.label_smoothing": 0.0, "data.drop_last": True, "model.pretrained": "openai",
    }  # fmt: skip
    return Theirs(
        1e-3, 0.65, 0.05, 12, CLIP_BLOCKS, CLIP_STEM, lambda name, shape: len(shape) == 1,
        lambda name, layer_id: layer_id <= 10, IMAGES // 64, 20, 2 * (IMAGES // 64), lambda t, w: t / w, 1e-6, 256, 224,
        CLIP, settings,
    )  # fmt: skip


def mae(lr: float, decay: float, depth: int, *, epochs: int, drop_path: float) -> Theirs:
    def spares(name: str, shape: Shape) -> bool:
        return len(shape) == 1 or name in ("pos_embed", "cls_token")

    steps = IMAGES // 1024
    settings = {
        **FT_CLIP_AUGMENT, **SHARED, "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_prob": 1.0,
        "augment.mix_switch": 0.5, "augment.mix_images": 32, "model.pool": "mean", "model.drop_path": drop_path,
        "train.label_smoothing": 0.1, "train.ema": 0.0,
    }  # fmt: skip
    return Theirs(
        lr, decay, 0.05, depth, "blocks.", ("cls_token", "pos_embed", "patch_embed"), spares, none_frozen, steps,
        epochs, 5 * steps, lambda t, w: t / w, 1e-6, 256, 224, IMAGENET, settings,
    )  # fmt: skip


def beit(lr: float, decay: float, *, epochs: int, warmup: int) -> Theirs:
    steps = IMAGES // 1024
    settings = {
        **FT_CLIP_AUGMENT, **NO_MIXING, **SHARED, "model.drop_path": 0.1, "train.label_smoothing": 0.1,
        "train.ema": 0.0,
    }  # fmt: skip
    return Theirs(
        lr, decay, 0.05, 12, "blocks.", VIT_STEM, beit_spares, none_frozen, steps, epochs, warmup * steps,
        lambda t, w: t / (w - 1), 1e-6, 256, 224, IMAGENET, settings,
    )  # fmt: skip


def eva02() -> Theirs:
    """`stop_grad_conv1` cuts the gradient behind the patch embedding, and the page says `min_lr=0.0`, `reprob=0.0`."""
    steps = IMAGES // 512
    settings = {
        **FT_CLIP_AUGMENT, **NO_MIXING, **SHARED, "augment.erasing": 0.0, "model.drop_path": 0.15,
        "train.label_smoothing": 0.2, "train.ema": 0.9999, "train.ema_warmup": False,
    }  # fmt: skip
    return Theirs(
        2e-5, 0.85, 0.05, 24, "blocks.", VIT_STEM, beit_spares, lambda name, layer_id: name.startswith("patch_embed"),
        steps, 20, 2 * steps, lambda t, w: t / (w - 1), 0.0, 448, 448, CLIP, settings,
    )  # fmt: skip


MAE_L = ["experiment=mae_b16", "model=mae_l16", "optim.lr=1e-3", "optim.layer_decay=0.75", "model.drop_path=0.2"]
RECIPES: dict[str, tuple[list[str], Theirs]] = {
    "ft_clip_b16": ([], ft_clip(6e-4, 0.6, 12, epochs=50, warmup=10, batch=2048, size=224)),
    "ft_clip_l14": ([], ft_clip(4e-4, 0.65, 24, epochs=30, warmup=5, batch=2048, size=224)),
    "ft_clip_l14_336": ([], ft_clip(6e-4, 0.65, 24, epochs=30, warmup=5, batch=1920, size=336)),
    "mae_b16": ([], mae(5e-4 * 1024 / 256, 0.65, 12, epochs=100, drop_path=0.1)),
    "mae_l16": ([*MAE_L, "train.epochs=50"], mae(1e-3 * 1024 / 256, 0.75, 24, epochs=50, drop_path=0.2)),
    "beitv2_b16": ([], beit(5e-5, 0.75, epochs=30, warmup=20)),
    "eva02_l": ([], eva02()),
    "wise_ft": ([], wise_ft()),
    "mkt": ([], mkt()),
}


def composed(name: str) -> Conf:
    return compose(RECIPES[name][0] or [f"experiment={name}"])


@pytest.fixture(scope="module", params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> tuple[Conf, Theirs, BuiltModel]:
    """Ours composed and built without memory, and theirs."""
    conf = composed(request.param)
    built = build_model(conf.model, ["a", "b", "c"], device="meta")
    set_up_layers(built.model, conf.optim, train=conf.train)
    return conf, RECIPES[request.param][1], built


def test_every_parameter_learns_as_theirs(recipe: tuple[Conf, Theirs, BuiltModel]) -> None:
    conf, theirs, built = recipe
    model = built.model
    found: dict[str, dict[str, Any]] = {}
    for group in param_groups(model, peak_optim(conf)):
        found |= {name: group for name in group["param_names"]}
    assert model.num_blocks == theirs.depth
    for name, parameter in model.net.named_parameters():
        own = name.removeprefix("visual.")
        layer_id = theirs.layer_id(own)
        assert min(model.layer_ids[name], theirs.depth + 1) == layer_id, name
        assert parameter.requires_grad != theirs.is_frozen(own, layer_id), name
        assert (name in found) == parameter.requires_grad, name
        if name in found:
            group = found[name]
            scale = theirs.layer_decay ** (theirs.depth + 1 - layer_id)
            assert group["lr"] == pytest.approx(theirs.lr * scale, rel=1e-12), name
            spared = theirs.is_spared(own, tuple(parameter.shape))
            assert group["weight_decay"] == (0.0 if spared else theirs.weight_decay), name


def test_the_first_steps_and_the_whole_curve_are_theirs(recipe: tuple[Conf, Theirs, BuiltModel]) -> None:
    conf, theirs, _ = recipe
    step = conf.data.batch_size * conf.train.accumulate
    images = IMAGES // step * step if conf.data.drop_last else IMAGES
    curve = run_curve(conf, -(-images // conf.data.batch_size))
    assert (curve.steps_per_epoch, curve.epochs) == (theirs.steps_per_epoch, theirs.epochs)
    factors, peak = curve.factors(), peak_optim(conf).lr
    rise = theirs.lr / theirs.warmup  # of one step: the warmups are that far apart at most, see docs/recipes.md
    for t in [*range(100), theirs.warmup // 2, theirs.warmup - 1]:
        assert peak * factors[t] == pytest.approx(theirs.rate(t), abs=rise * 1.001), t
    after = range(theirs.warmup, theirs.epochs * theirs.steps_per_epoch)
    assert len(factors) == after.stop
    for t in [*after[:100], *after[:: len(after) // 50], after[-1]]:
        assert peak * factors[t] == pytest.approx(theirs.rate(t), rel=1e-9, abs=1e-15), t


def test_the_rates_of_the_first_steps_reach_the_optimizer(recipe: tuple[Conf, Theirs, BuiltModel]) -> None:
    """Every group's own rate in 100 steps of the optimizer and the scheduler that a run has."""
    conf, theirs, built = recipe
    curve = run_curve(conf, theirs.steps_per_epoch * conf.train.accumulate)
    optimizer = build_optimizer(built.model, peak_optim(conf))
    scheduler = create_scheduler(curve.sched, optimizer, curve.num_units)
    assert curve.sched.interval == "step"
    for t in range(100):
        for group in optimizer.param_groups:
            (layer_id,) = {theirs.layer_id(name.removeprefix("visual.")) for name in group["param_names"]}
            scale = theirs.layer_decay ** (theirs.depth + 1 - layer_id)
            ours = theirs.lr * (t + 1) / (theirs.warmup + 1)  # as docs/recipes.md says
            assert group["lr"] == pytest.approx(scale * ours, rel=1e-9), (t, group["name"])
            apart = scale * theirs.lr / theirs.warmup * 1.001
            assert group["lr"] == pytest.approx(scale * theirs.rate(t), rel=0, abs=apart), (t, group["name"])
        optimizer.step()  # without gradients it moves nothing
        scheduler.step()


def test_every_published_recipe_has_a_reference() -> None:
    """The numbers of the other two are ours."""
    folder = Path(__file__).parents[2] / "conf" / "experiment"
    assert {path.stem for path in folder.glob("*.yaml")} == {*RECIPES} - {"mae_l16"} | {"lp_ft", "digits_probe"}


def test_its_other_settings_are_theirs(recipe: tuple[Conf, Theirs, BuiltModel]) -> None:
    conf, theirs, built = recipe
    for key, value in theirs.settings.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(conf, section), name) == value, key
    drops = [module.drop_prob for module in built.model.net.modules() if type(module).__name__ == "DropPath"]
    highest = float(theirs.settings.get("model.drop_path", 0.0))  # type: ignore[arg-type]
    rising = [highest * block / (theirs.depth - 1) for block in range(theirs.depth)]
    assert sorted(set(drops)) == pytest.approx([rate for rate in rising if rate])


def test_label_smoothing_is_theirs(recipe: tuple[Conf, Theirs, BuiltModel]) -> None:
    """(1 - s) times the log loss of the label, s times its mean over all classes."""
    conf, _, _ = recipe
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3, 1])
    share = conf.train.label_smoothing
    logs = logits.log_softmax(dim=1)
    expected = -(1 - share) * logs[range(5), labels] - share * logs.mean(dim=1)
    ours = build_criterion(conf.train, is_multilabel=False)(logits, labels, conf.train.label_smoothing)
    torch.testing.assert_close(ours, expected)


def evaluated(image: np.ndarray, shorter: int, size: int) -> Tensor:
    """Pillow's bicubic resize of the shorter side, then the centre, as torchvision's Resize and CenterCrop do it."""
    picture = Image.fromarray(image)
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(shorter * long / short)
    picture = picture.resize((shorter, other) if width <= height else (other, shorter), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in picture.size)
    cut = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(301, 427), (500, 333), (97, 211), (640, 480), (33, 200)])
def test_evaluation_pixels_are_theirs(recipe: tuple[Conf, Theirs, BuiltModel], shape: tuple[int, int]) -> None:
    conf, theirs, built = recipe
    preprocess = as_asked(built.preprocess, conf.data)
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    random = np.random.default_rng(0)
    waves = [127 + 90 * np.sin(rows / 9 + number) * np.cos(columns / 7 - number) for number in range(3)]
    image = np.clip(np.stack(waves, axis=2) + random.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    ours = fit_square(torch.from_numpy(image).permute(2, 0, 1), preprocess)
    expected = evaluated(image, theirs.shorter, theirs.size)
    assert ours.shape == expected.shape == (3, theirs.size, theirs.size)
    apart = (ours.int() - expected.int()).abs()
    assert apart.max() <= 2 and (apart > 0).float().mean() < 0.01  # torch rounds between rows and columns otherwise
    assert preprocess.mean == pytest.approx(theirs.normalised[0]) and preprocess.std == pytest.approx(
        theirs.normalised[1]
    )
    again = Preprocess(**preprocess.as_dict())  # as the metadata of its weights give it
    assert again.shorter_side == preprocess.shorter_side == theirs.shorter


def test_the_plan_of_a_recipe_shows_what_is_frozen_in_a_layer_that_learns() -> None:
    found, rates = describe(composed("ft_clip_b16"), num_classes=1000, num_images=IMAGES)
    stem = found["layers"][0]
    assert stem["state"] == "learns" and stem["parameters"] - stem["learning"] == 768 * 3 * 16 * 16
    assert "stem" in rates["layers"] and rates["frozen"] == []
    assert found["schedule"]["steps"] == 50 * 625
    assert found["schedule"]["lr_last"] == pytest.approx(1e-6, rel=1e-3)
