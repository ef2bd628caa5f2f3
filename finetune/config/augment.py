"""The settings of augmentation: what happens to a training image before the model sees it. Standard library only."""

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, setting


class Recipe(Choice):
    """How a training image becomes the square that the model sees."""

    none = "none"
    light = "light"
    crop = "crop"


class Policy(Choice):
    """A published set of operations on the colours and the geometry of a cropped image."""

    none = "none"
    randaug = "randaug"
    trivial = "trivial"
    augmix = "augmix"
    three_augment = "three_augment"


class Interpolation(Choice):
    """How pixels between pixels are computed where an image is sheared, shifted or rotated."""

    bilinear = "bilinear"
    bicubic = "bicubic"


@dataclass
class AugmentConf:
    """What happens to a training image before the model sees it; `conf/augment/` has named mixtures of these."""

    recipe: Recipe = setting(Recipe.light, "none: resize; light: small shifts and zooms; crop: random resized crop")
    degrees: float = setting(10.0, "light: largest rotation either way, in degrees", ge=0, le=180)
    translate: float = setting(0.08, "light: largest shift either way, as a share of the side", ge=0, lt=1)
    zoom: float = setting(0.1, "light: largest change of size either way, as a share", ge=0, lt=1)
    flip: float = setting(0.0, "probability of a left-right mirror image; leave 0 for digits and letters", ge=0, le=1)
    crop_scale: tuple[float, float] = setting((0.08, 1.0), "crop: least and greatest share of the image's area")
    crop_ratio: tuple[float, float] = setting((0.75, 4 / 3), "crop: least and greatest width over height")
    policy: Policy = setting(Policy.none, "crop: randaug, trivial, augmix or three_augment, after crop and flip")
    randaug_ops: int = setting(2, "policy=randaug: operations drawn for an image", ge=1, le=100)
    randaug_magnitude: float = setting(9.0, "policy=randaug: mean strength, of 10", ge=0, le=10)
    randaug_std: float = setting(0.5, "policy=randaug: standard deviation of the strength", ge=0)
    interpolation: Interpolation = setting(
        Interpolation.bilinear, "policy=randaug: how it shears, shifts and rotates; the published recipes: bicubic"
    )
    jitter: float = setting(0.0, "crop: largest change of brightness, contrast and saturation, as a share", ge=0, le=1)
    erasing: float = setting(0.0, "crop: probability that noise fills a random rectangle, as the last step", ge=0, le=1)
    mixup: float = setting(0.0, "MixUp's alpha: images are blended in pairs by a share from Beta(a, a); 0: off", ge=0)
    cutmix: float = setting(0.0, "CutMix's alpha: a rectangle comes from another image; 0: off", ge=0)
    mix_prob: float = setting(1.0, "probability that a batch is mixed at all", gt=0, le=1)
    mix_switch: float = setting(0.5, "with mixup and cutmix: probability that a mixed batch gets cutmix", gt=0, lt=1)
    mix_images: int = setting(0, "images that are mixed by one draw, in groups of this size; 0: all of a batch", ge=0)
    repeats: int = setting(1, "views of each image in an epoch, next to each other in the same batch", ge=1, le=1000)
    views: int = setting(0, "0: a fresh view of each image every epoch; K: K views, recycled", ge=0)


_LIGHT = ("degrees", "translate", "zoom")
_CROP = ("crop_scale", "crop_ratio", "policy", "jitter", "erasing")
_RANDAUG = ("randaug_ops", "randaug_magnitude", "randaug_std", "interpolation")


def augment_problems(augment: AugmentConf) -> list[str]:
    """Settings that would be ignored, and ranges that are upside down; one line each."""
    reasons: dict[str, str] = {}
    if augment.recipe != Recipe.light:
        reasons |= dict.fromkeys(_LIGHT, "only augment.recipe=light moves images by it")
    if augment.recipe != Recipe.crop:
        reasons |= dict.fromkeys(_CROP, "it needs augment.recipe=crop, as in augment=clip or augment=mae")
    if augment.policy != Policy.randaug:
        reasons |= dict.fromkeys(_RANDAUG, "it needs augment.policy=randaug")
    if not (augment.mixup or augment.cutmix):
        reasons |= dict.fromkeys(("mix_prob", "mix_images"), "it needs augment.mixup or augment.cutmix above 0")
    if not (augment.mixup and augment.cutmix):
        reasons["mix_switch"] = "there is nothing to choose between unless both augment.mixup and augment.cutmix are on"
    if augment.recipe == Recipe.none:
        mixing = ("mixup", "cutmix", "mix_prob", "mix_switch", "mix_images")
        every = (*_LIGHT, "flip", *_CROP, *_RANDAUG, *mixing, "repeats", "views")
        reasons = dict.fromkeys(every, "augment=none changes no image")
    problems = ignored("augment", augment, reasons)
    if augment.mix_images == 1:
        problems.append("augment.mix_images=1: an image alone has none to mix with; expected 0 (a batch) or at least 2")
    for name, most in (("crop_scale", 1.0), ("crop_ratio", 100.0)):
        low, high = getattr(augment, name)
        if not 0 < low <= high <= most:
            problems.append(f"augment.{name}=[{low:g}, {high:g}]: expected [least, greatest], above 0, up to {most:g}")
    return problems


def mixing_problems(augment: AugmentConf, batch_size: int) -> list[str]:
    """Why groups of `mix_images` do not fit into micro-batches of `batch_size` images (0: not known yet)."""
    size = augment.mix_images
    if not batch_size or size < 2:
        return []
    given = f"augment.mix_images={size}"
    if batch_size < size:
        problem = f"a group lies within a micro-batch, and data.batch_size={batch_size}"
        return [f"{given}: {problem}; expected 0 (all of it) or at most {batch_size}"]
    if batch_size % size == 1:
        problem = f"data.batch_size={batch_size} leaves one image over, which has none to mix with"
        return [f"{given}: {problem}; expected a divisor of {batch_size}, or 0 (all of it)"]
    return []
