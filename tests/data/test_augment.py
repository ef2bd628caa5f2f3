"""Augmentation: views depend on their key alone, operations equal the published ones, labels match their pixels."""

from __future__ import annotations

import contextlib
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_batches, tiny_model
from tiny_runs import load_state, save_state
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from finetune import SchedulerConf, create_scheduler
from finetune.config import AugmentConf, Conf, DataConf, OptimConf, Policy, Recipe, TrainConf, find_problems
from finetune.core.fit import Validation, fit
from finetune.core.loop import TrainState
from finetune.core.optim import build_optimizer
from finetune.core.preprocess import Preprocess
from finetune.data import Loader, Source, open_source
from finetune.data.images.mix import Mixer
from finetune.data.images.recipes import OPERATIONS, Erasing, Moving, RandAugment, RandomCrop, drawing_from
from finetune.data.images.transforms import build_transform
from finetune.data.loading.batches import BatchKey, BatchMaker
from finetune.data.streams import augment_generator
from finetune.runs.history import timeless

CPU = torch.device("cpu")
SQUARE = Preprocess(24, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
GROUP = Path(__file__).parent.parent.parent / "conf" / "augment"
RECIPES = sorted(path.stem for path in GROUP.glob("*.yaml"))


def recipe(name: str, **changes: object) -> AugmentConf:
    """The settings of `augment=NAME`, with changes."""
    values = yaml.safe_load((GROUP / f"{name}.yaml").read_text(encoding="utf-8"))
    values |= {"recipe": Recipe(values["recipe"]), "policy": Policy(values.get("policy", "none"))}
    return AugmentConf(**{**values, **changes})


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConf(test_fraction=0.3))


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """Smooth colours with an edge, uint8 (3, 60, 80)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 80), indexing="ij")
    image = torch.stack([x, y, (x * 7).sin().abs() * y])
    image[:, 20:40, 30:50] = 0.9 - image[:, 20:40, 30:50] * 0.8
    return (image * 255).to(torch.uint8)


def shown(augment: AugmentConf, images: list[Tensor], *, seed: int = 0, first: int = 0) -> Tensor:
    pairs = [(image, partial(augment_generator, seed, 0, first + i, 0)) for i, image in enumerate(images)]
    return build_transform(SQUARE, augment)(pairs, len(images))


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_named_recipes_are_there_and_valid() -> None:
    assert set(["none", "light", "clip", "mae", "randaug", "trivial", "three_augment"]) <= set(RECIPES)
    for name in RECIPES:
        assert find_problems(Conf(augment=recipe(name))) == []
    assert recipe("light") == AugmentConf()
    clip, mae = recipe("clip"), recipe("mae")
    assert (clip.policy, clip.randaug_magnitude, clip.randaug_std, clip.erasing) == ("randaug", 9, 0.5, 0.25)
    assert clip.jitter == clip.mixup == clip.cutmix == 0
    assert mae == recipe("clip", mixup=0.8, cutmix=1.0)
    assert recipe("wise_ft") == AugmentConf(recipe=Recipe.crop, crop_scale=[0.9, 1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_depends_on_its_key_alone(name: str, photo: Tensor) -> None:
    images = [photo, photo, photo[:, :, :30], photo[:, :1, :1], photo[:, 7:8], photo.repeat(1, 1, 9)]
    before = torch.get_rng_state()
    together = shown(recipe(name), images)
    assert torch.equal(torch.get_rng_state(), before)
    assert together.dtype == torch.uint8 and together.shape == (6, 3, 24, 24)
    torch.manual_seed(99)
    for i, image in enumerate(images):
        assert torch.equal(shown(recipe(name), [image], first=i)[0], together[i])
    sent = pickle.loads(pickle.dumps(build_transform(SQUARE, recipe(name))))
    assert torch.equal(sent([(photo, partial(augment_generator, 0, 0, 0, 0))], 1)[0], together[0])
    if name != "none":
        many = shown(recipe(name), [photo[:, :, :60]] * 20)
        assert len({view.numpy().tobytes() for view in many}) >= 15
    assert torch.equal(photo, images[0])  # never in place


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_bits(digits: Source) -> None:
    augment = recipe("clip", repeats=2, jitter=0.4)
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def epoch_of(workers: int, skip: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        conf = DataConf(batch_size=100, workers=workers)
        loader = Loader(digits.splits["val"], SQUARE, conf=conf, augment=augment, seed=3, device=CPU)
        batches = list(loader.epoch(1, skip))
        assert len(batches) == len(loader) - skip
        loader.close()
        return batches

    expected = epoch_of(0, 0)
    for workers, skip in ((2, 0), (0, 3), (2, 1)):
        for ours, theirs in zip(epoch_of(workers, skip), expected[skip:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_repeats_show_every_image_so_often_in_views_of_their_own(digits: Source) -> None:
    split = digits.splits["val"]
    conf = DataConf(batch_size=64)
    loader = Loader(split, SQUARE, conf=conf, augment=AugmentConf(repeats=3), seed=0, device=CPU)
    assert loader.num_images == 3 * len(split) and len(loader) == -(-3 * len(split) // 64)
    images, labels, ids = (torch.cat(part) for part in zip(*loader.epoch(0), strict=True))
    assert torch.equal(ids.sort().values, torch.arange(len(split)).repeat_interleave(3))
    assert torch.equal(ids[::3], ids[1::3]) and torch.equal(ids[::3], ids[2::3])
    assert torch.equal(labels, split.labels[ids])
    assert not torch.equal(images[::3], images[1::3]) and not torch.equal(images[1::3], images[2::3])
    once = Loader(split, SQUARE, conf=conf, augment=AugmentConf(), seed=0, device=CPU)
    assert torch.equal(torch.cat([images for images, _, _ in once.epoch(0)]), images[::3])
    assert Loader(split, SQUARE, conf=conf, augment=None, seed=0, device=CPU).num_images == len(split)


def test_views_recycle_for_every_recipe(digits: Source) -> None:
    maker = BatchMaker(digits.splits["val"], build_transform(SQUARE, recipe("randaug")), 0)
    batch, again, other = (maker[BatchKey([1, 2, 3], [0, 0, 0], view)] for view in (4, 4, 5))
    assert isinstance(batch, tuple) and isinstance(again, tuple) and isinstance(other, tuple)
    assert torch.equal(batch[0], again[0]) and not torch.equal(batch[0], other[0])


def test_the_generator_comes_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with contextlib.suppress(RuntimeError), drawing_from(augment_generator(0, 0, 0, 0)):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


# --- operations ------------------------------------------------------------------------------------------------------


def test_crops_stay_within_their_limits() -> None:
    """The colours of the image are its coordinates, so the pixels of a crop show where it was cut out."""
    size = 200
    ramp = torch.arange(size, dtype=torch.uint8)
    image = torch.stack([ramp.repeat(size, 1), ramp[:, None].repeat(1, size), torch.zeros(size, size).byte()])
    views = shown(recipe("wise_ft", crop_scale=(0.25, 0.5), crop_ratio=(0.5, 2.0)), [image] * 200).int()
    wide, tall = ((views[:, c].amax((1, 2)) - views[:, c].amin((1, 2))) / (23 / 24) for c in (0, 1))
    share, ratio = wide * tall / size**2, wide / tall
    assert 0.22 < share.min() < 0.28 and 0.47 < share.max() < 0.54
    assert 0.46 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.2
    mirrored = shown(recipe("wise_ft", flip=0.3), [image] * 300).int()
    assert 0.2 < (mirrored[:, 0, :, 0] > mirrored[:, 0, :, -1]).all(1).double().mean() < 0.4


SIZES = [(1, 1), (1, 7), (7, 1), (20, 20_000), (20_000, 20), (24, 24), (37, 41), (224, 224), (375, 500), (500, 101)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (0.75, 4 / 3)), ((1.0, 1.0), (1.0, 1.0)), ((0.9, 1.0), (0.6, 0.9))]
)
def test_crops_and_mirrors_equal_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
) -> None:
    """The same pixels from the same random numbers, as many of which are used, in every memory layout."""
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES * 3):
        grey = random.integers(0, 256, (height, width, 1), dtype=np.uint8)
        pixels = torch.from_numpy(random.integers(0, 256, (height, width, 3), dtype=np.uint8) if number % 3 else grey)
        image = pixels.expand(-1, -1, 3).permute(2, 0, 1)
        size = (24, 65, 224)[number // len(SIZES)]
        theirs = v2.Compose([
            v2.RandomResizedCrop(size, scale, ratio, interpolation=InterpolationMode(interpolation), antialias=True),
            v2.RandomHorizontalFlip(0.4),
        ])  # fmt: skip
        with drawing_from(augment_generator(0, 0, number, 0)):
            expected, left = theirs(image.contiguous()), torch.rand(3)
        for laid in (image, image.contiguous(), image.transpose(1, 2).contiguous().transpose(1, 2)):
            with drawing_from(augment_generator(0, 0, number, 0)):
                ours = v2.RandomHorizontalFlip(0.4)(RandomCrop(size, scale, ratio, interpolation)(laid))
                assert torch.equal(ours, expected), (height, width, size)
                assert torch.equal(torch.rand(3), left)


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (1.2, 1.9)])
def test_a_thousand_boxes_are_torchvisions(ratio: tuple[float, float]) -> None:
    theirs, ours = v2.RandomResizedCrop(8, ratio=ratio), RandomCrop(8, (0.08, 1.0), ratio, "bilinear")
    random = np.random.default_rng(1)
    for number in range(1000):
        image = torch.zeros(3, *random.integers(1, 60, 2), dtype=torch.uint8)
        with drawing_from(augment_generator(0, 0, number, 0)):
            expected = theirs.make_params([image])
        with drawing_from(augment_generator(0, 0, number, 0)):
            top, left, tall, wide = ours.box(*image.shape[1:])
        assert {"top": top, "left": left, "height": tall, "width": wide} == expected


def test_a_crop_out_of_the_thinnest_image_is_a_pixel() -> None:
    """torchvision's box has no width there, which is an error."""
    row = torch.arange(30, dtype=torch.uint8).expand(3, 1, 30)
    with pytest.raises(RuntimeError):
        v2.RandomResizedCrop(8, ratio=(0.2, 0.4))(row)
    assert (RandomCrop(8, (0.08, 1.0), (0.2, 0.4), "bicubic")(row) == 14).all()
    assert (RandomCrop(8, (0.08, 1.0), (3.0, 5.0), "bicubic")(row.transpose(1, 2)) == 14).all()


@pytest.mark.parametrize("strength", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("word", ["bilinear", "bicubic"])
def test_randaugment_operations_equal_timms(
    photo: Tensor, word: str, strength: float, sign: float, monkeypatch
) -> None:
    """The fifteen operations at the same strengths; timm works on PIL images."""
    from timm.data import auto_augment as timm

    monkeypatch.setattr(timm, "_randomly_negate", lambda value: value * sign)
    fill = (122, 117, 104)
    picture = Image.fromarray(photo.permute(1, 2, 0).numpy())
    assert len(timm._RAND_INCREASING_TRANSFORMS) == len(OPERATIONS) == 15
    for name, operation in zip(timm._RAND_INCREASING_TRANSFORMS, OPERATIONS, strict=True):
        level = timm.LEVEL_TO_ARG[name]
        arguments = level(10 * strength, {}) if level else ()
        if name == "PosterizeIncreasing" and arguments == (0,):
            arguments = (1,)  # black, if Pillow did not refuse it
        theirs = timm.NAME_TO_OP[name](picture, *arguments, fillcolor=fill, resample=Image.Resampling[word.upper()])
        ours = operation(photo, strength, sign, Moving(list(fill), InterpolationMode(word)))
        difference = (ours.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().float()
        # Moved edges are interpolated a little differently; colours are the same within rounding.
        moves = name.startswith(("Rotate", "Shear", "Translate"))
        if moves and word == "bicubic":  # which PIL itself computes: all but pixels on an edge between two roundings
            assert (difference == 0).float().mean() > 0.995, name
            continue
        assert difference.mean() < (3 if moves else 0.6), name
        assert difference.quantile(0.9) <= (4 if moves else 1), name


def test_randaugment_draws_as_it_says(photo: Tensor, monkeypatch) -> None:
    drawn: list[tuple[int, float, float]] = []

    def noted(index: int):
        return lambda image, strength, sign, fill: drawn.append((index, strength, sign)) or image

    monkeypatch.setattr("finetune.data.images.recipes.OPERATIONS", tuple(noted(i) for i in range(15)))
    policy = RandAugment(2, 9.0, 0.5, Moving([0, 0, 0]))
    with drawing_from(augment_generator(0, 0, 0, 0)):
        for _ in range(3000):
            policy(photo)
    which, strength, sign = torch.tensor(drawn, dtype=torch.float64).T
    assert 2850 < len(drawn) < 3150  # two operations, each half the time
    assert which.long().bincount(minlength=15).min() > 140
    assert abs(sign.mean()) < 0.06 and strength.max() <= 1
    assert abs(strength.median() - 0.9) < 0.01 and 0.04 < strength[strength < 1].std() < 0.055


def test_erasing_fills_a_rectangle_with_noise() -> None:
    image = torch.full((3, 40, 40), 7, dtype=torch.uint8)
    erase = Erasing(0.25, SQUARE.mean, SQUARE.std)
    with drawing_from(augment_generator(0, 0, 1, 0)):
        out = torch.stack([erase(image) for _ in range(2000)])
    hit = (out != 7).any(dim=1)
    share = hit.double().mean(dim=(1, 2))
    assert 0.22 < (share > 0).double().mean() < 0.28
    share = share[share > 0]
    assert 0.015 < share.min() < 0.03 and 0.28 < share.max() < 0.36
    noise = out[:, 0][hit].double() / 255
    assert abs(noise.mean() - SQUARE.mean[0]) < 0.02 and abs(noise.std() - SQUARE.std[0]) < 0.03
    assert (image == 7).all()
    for rows in hit[hit.any(dim=(1, 2))][:20]:
        top, left = rows.any(1).nonzero().min(), rows.any(0).nonzero().min()
        box = rows[top : top + rows.any(1).sum(), left : left + rows.any(0).sum()]
        assert box.double().mean() > 0.95


# --- mixing ----------------------------------------------------------------------------------------------------------


def mixer(num_classes: int = 3, seed: int = 0, **changes: object) -> Mixer:
    return Mixer(AugmentConf(**changes), num_classes=num_classes, seed=seed)  # type: ignore[arg-type]


def coloured(labels: Tensor, size: int = 12) -> Tensor:
    """Images whose channel c is 1 where the label is c: the mean colour is the share of each class."""
    return torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, size, size).contiguous()


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.7}])
def test_targets_hold_what_the_pixels_hold(batch: int, changes: dict[str, float]) -> None:
    labels = torch.arange(batch) % 3
    images = coloured(labels)
    given = images.clone()
    batches = [(images, labels, torch.arange(batch))] * 12
    mixed = list(mixer(**changes).wrap(batches, 3))
    for pixels, targets, ids in mixed:
        assert targets.dtype == torch.float32 and torch.equal(ids, torch.arange(batch))
        torch.testing.assert_close(pixels.mean(dim=(2, 3)), targets, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(batch))
    assert torch.equal(images, given)
    if batch > 1:
        assert (
            sum(not torch.equal(targets.argmax(1), labels) or bool((targets % 1).any()) for _, targets, _ in mixed) > 5
        )


def test_several_labels_mix_too() -> None:
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]])
    (_, targets, _) = next(mixer(mixup=1.0).wrap([(coloured(torch.arange(3)), labels, torch.arange(3))], 0))
    drawn = mixer(mixup=1.0).draw(0, 0, batch=3, height=12, width=12)
    assert drawn is not None
    torch.testing.assert_close(targets, drawn.share * labels + (1 - drawn.share) * labels.roll(-drawn.shift, 0))


def test_a_mixture_depends_on_seed_epoch_and_number_alone() -> None:
    batches = [(coloured(torch.arange(7) % 3), torch.arange(7) % 3, torch.arange(7))] * 6
    both = {"mixup": 0.8, "cutmix": 1.0}
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    straight = list(mixer(**both).wrap(batches, 2))
    torch.rand(5)
    torch.set_rng_state(before)
    for ours, theirs in zip(mixer(**both).wrap(batches[4:], 2, 4), straight[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # type: ignore[index]
    for other in (mixer(**both).wrap(batches, 3), mixer(seed=1, **both).wrap(batches, 2)):
        assert not all(torch.equal(a[1], b[1]) for a, b in zip(other, straight, strict=True))


def test_mixtures_are_drawn_as_published() -> None:
    size = {"batch": 9, "height": 30, "width": 40}
    draws = [mixer(mixup=0.8, cutmix=1.0, mix_prob=0.8, mix_switch=0.3).draw(0, i, **size) for i in range(3000)]
    happened = [draw for draw in draws if draw is not None]
    assert 0.77 < len(happened) / 3000 < 0.83
    assert 0.27 < sum(draw.box is not None for draw in happened) / len(happened) < 0.33
    assert {draw.shift for draw in happened} == set(range(1, 9))
    blends = torch.tensor([draw.share for draw in happened if draw.box is None])
    assert abs(blends.mean() - 0.5) < 0.02 and abs(blends.var() - 0.25 / 2.6) < 0.01  # Beta(a, a): 1 / (4 (2a + 1))
    for draw in happened:
        if draw.box is not None:
            top, bottom, left, right = draw.box
            assert 0 <= top <= bottom <= 30 and 0 <= left <= right <= 40
            assert draw.share == 1 - (bottom - top) * (right - left) / 1200
    large, small = (mixer(mixup=1.0).draw(0, 0, batch=n, height=n, width=n) for n in (9, 4))
    assert large is not None and small is not None and large.share == small.share


def test_groups_of_a_batch_are_mixed_as_smaller_batches_are() -> None:
    """With `mix_images` the draws depend on neither the micro-batch nor the accumulation, and images stay in groups."""
    labels = torch.arange(48) % 3
    images, ids = coloured(labels), torch.arange(48)
    whole = [(images, labels, ids)] * 2
    parts = [tuple(tensor[i : i + 16] for tensor in (images, labels, ids)) for i in (0, 16, 32)] * 2
    both = {"mixup": 0.8, "cutmix": 1.0}
    grouped = Mixer(AugmentConf(**both, mix_images=16), num_classes=3, seed=0, batch_size=48)
    single = list(mixer(**both).wrap(parts, 4))
    for number, (pixels, targets, numbers) in enumerate(grouped.wrap(whole, 4)):
        assert torch.equal(numbers, ids)
        for group, (some, shares, _) in enumerate(single[3 * number : 3 * number + 3]):
            place = slice(16 * group, 16 * group + 16)
            assert torch.equal(pixels[place], some) and torch.equal(targets[place], shares)
    later = next(iter(grouped.wrap(whole[1:], 4, 1)))
    assert torch.equal(later[1], torch.cat([shares for _, shares, _ in single[3:]]))  # a resumed epoch
    short = [(images[:20], labels[:20], ids[:20])]  # the last micro-batch: a whole group and a short one
    assert next(iter(grouped.wrap(short, 4)))[0].shape == (20, 3, 12, 12)


def test_without_mixing_batches_pass_untouched() -> None:
    batch = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.arange(2))
    assert next(mixer().wrap([batch], 0)) is batch


def test_mixtures_never_move() -> None:
    """A golden: another number here means that no earlier run can be repeated or resumed."""
    drawn = mixer(mixup=0.8, cutmix=1.0).draw(1, 2, batch=8, height=32, width=32)
    assert drawn == (6, 0.953125, (0, 6, 21, 29))


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_resumed_epoch_mixes_as_a_straight_one(stop_at: int, tmp_path: Path) -> None:
    sizes = [8, 7, 8, 3]
    conf = TrainConf(epochs=3, label_smoothing=0.1)

    def start(seed: int) -> TrainState:
        model = tiny_model(seed=seed, dropout=0.3)
        optimizer = build_optimizer(model, OptimConf(lr=0.02, layer_decay=0.7))
        scheduler = create_scheduler(SchedulerConf(mode="cosine_pi"), optimizer, 3)
        torch.manual_seed(5)
        return TrainState(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))

    def go(state: TrainState, stop: int = -1) -> list[dict]:
        rows: list[dict] = []
        mixes = mixer(mixup=0.8, cutmix=1.0)
        fit(
            state,
            conf,
            train_batches=lambda epoch, skip: mixes.wrap(tiny_batches(sizes, seed=epoch)[skip:], epoch, skip),
            validation=Validation(lambda meter: tiny_batches([5, 2], seed=99)),
            on_step_end=lambda state: state.step == stop,
            on_epoch_end=lambda state, row: rows.append(row),
        )
        return rows

    straight = start(0)
    expected = go(straight)
    state = start(0)
    rows = go(state, stop_at)
    save_state(tmp_path / "last.pt", state)
    state = start(1)
    load_state(tmp_path / "last.pt", state)
    rows += go(state)
    for (name, ours), theirs in zip(state.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert timeless(rows) == timeless(expected)
    plain = start(0)
    fit(
        plain,
        conf,
        train_batches=lambda epoch, skip: tiny_batches(sizes, seed=epoch)[skip:],
        validation=Validation(lambda meter: tiny_batches([5, 2], seed=99)),
        on_step_end=lambda state: False,
        on_epoch_end=lambda state, row: None,
    )
    assert not torch.equal(next(plain.model.parameters()), next(straight.model.parameters()))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jitter": 0.4}, "augment.jitter=0.4 would be ignored: it needs augment.recipe=crop"),
        ({"recipe": Recipe.crop, "degrees": 5.0}, "augment.degrees=5.0 would be ignored: only augment.recipe=light"),
        ({"recipe": Recipe.crop, "randaug_std": 0.0}, "it needs augment.policy=randaug"),
        ({"mix_prob": 0.5}, "it needs augment.mixup or augment.cutmix above 0"),
        ({"mixup": 1.0, "mix_switch": 0.1}, "nothing to choose between"),
        ({"recipe": Recipe.none, "mixup": 1.0}, "augment=none changes no image"),
        ({"recipe": Recipe.none, "repeats": 2}, "augment=none changes no image"),
        ({"recipe": Recipe.crop, "crop_scale": (0.9, 0.1)}, "augment.crop_scale=[0.9, 0.1]: expected"),
        ({"recipe": Recipe.crop, "crop_scale": (0.0, 1.0)}, "augment.crop_scale=[0, 1]: expected"),
        ({"erasing": -0.1}, "at least 0"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(changes: dict[str, object], words: str) -> None:
    problems = find_problems(Conf(augment=AugmentConf(**changes)))  # type: ignore[arg-type]
    assert any(words in problem for problem in problems), problems
