"""Augmentation that starts with a random resized crop, as published; each image by a generator of its own.

Operations are torchvision's `v2` on uint8, or faster ones of our own with the same bits. torchvision draws from torch's
global CPU generator. So `drawing_from` puts the image's generator in its place and afterwards restores it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from finetune.config import AugmentConf, Policy
from finetune.core.preprocess import Preprocess
from finetune.data.images.resize import batch_images, resize

# An image, uint8 (3, height, width), and a function that makes its generator: without augmentation none is made.
ImageToShow = tuple[Tensor, Callable[[], torch.Generator]]
ImageStep = Callable[[Tensor], Tensor]
Fill = list[int]
Pair = Sequence[float]
BILINEAR = InterpolationMode.BILINEAR


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Within it, torch's global CPU generator draws the numbers of `generator`; afterwards it is as it was before.

    `torch.manual_seed` would not do: it seeds the GPU's generator too, and with it the dropout of the training process.
    """
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


@dataclass(frozen=True)
class CropRecipe:
    """Crop, mirror, policy, colour jitter and erasing, in this order, one image after the other."""

    steps: tuple[ImageStep, ...]  # each draws from torch's global generator

    def __call__(self, images: Iterable[ImageToShow], most: int) -> Tensor:
        """Transform at most `most` images, each by its own generator -> uint8 (batch, 3, size, size)."""
        return batch_images((self._one(image, generator()) for image, generator in images), most)

    def _one(self, image: Tensor, generator: torch.Generator) -> Tensor:
        with drawing_from(generator):
            for step in self.steps:
                image = step(image)
        return image


def build_crop_recipe(preprocess: Preprocess, augment: AugmentConf) -> CropRecipe:
    """Build the steps that the settings ask for; a step that is off draws no random number.

    Shifted, sheared and rotated images are filled with the colour that normalises to zero.
    """
    fill = [round(255 * value) for value in preprocess.mean]
    crop = RandomCrop(preprocess.size, augment.crop_scale, augment.crop_ratio, preprocess.interpolation)
    steps: list[ImageStep] = [crop]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.policy == Policy.randaug:
        moving = Moving(fill, InterpolationMode(augment.interpolation))
        steps.append(RandAugment(augment.randaug_ops, augment.randaug_magnitude, augment.randaug_std, moving))
    elif augment.policy == Policy.trivial:
        steps.append(v2.TrivialAugmentWide(interpolation=BILINEAR, fill=fill))
    elif augment.policy == Policy.augmix:
        steps.append(v2.AugMix(interpolation=BILINEAR, fill=fill))
    elif augment.policy == Policy.three_augment:
        steps.append(three_augment(preprocess.size))
    if augment.jitter:
        steps.append(v2.ColorJitter(augment.jitter, augment.jitter, augment.jitter))
    if augment.erasing:
        steps.append(Erasing(augment.erasing, preprocess.mean, preprocess.std))
    return CropRecipe(tuple(steps))


@dataclass(frozen=True)
class RandomCrop:
    """A box of random area and shape, resized to a square (Szegedy et al., arXiv:1409.4842, section 6).

    The same bits as torchvision's `v2.RandomResizedCrop` out of the same random numbers, in less time. torchvision
    fails on very thin images, where its box has no width or height; here the box has at least one pixel.
    """

    size: int  # side of the square
    scale: Sequence[float]  # smallest and largest share of the image's area
    ratio: Sequence[float]  # smallest and largest width over height
    interpolation: str  # a name of torchvision's, such as `bicubic`

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, height, width) -> uint8 (3, size, size)."""
        height, width = image.shape[-2:]
        top, left, tall, wide = self.box(height, width)
        return resize(image[:, top : top + tall, left : left + wide], [self.size, self.size], self.interpolation)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop out of an image of that size, in pixels."""
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            ratio = torch.empty(1).uniform_(*self._log_ratio).exp_().item()
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                top, left = (int(torch.randint(free + 1, (1,))) for free in (height - tall, width - wide))
                return top, left, tall, wide
        # None of ten boxes fits into the image: the largest box in its middle that `ratio` allows.
        narrowest, widest = min(self.ratio), max(self.ratio)
        tall = max(1, round(width / narrowest)) if width / height < narrowest else height
        wide = max(1, round(height * widest)) if width / height > widest else width
        return (height - tall) // 2, (width - wide) // 2, tall, wide

    @functools.cached_property
    def _log_ratio(self) -> list[float]:
        """Computed by torch in float32, as the exponential above: Python's `math` would round differently."""
        logarithms: list[float] = torch.log(torch.tensor(self.ratio)).tolist()
        return logarithms


def three_augment(size: int) -> ImageStep:
    """DeiT III's 3-Augment (Touvron et al., arXiv:2204.07118): an image becomes grey, solarised or blurred.

    Solarising inverts the upper half of the range; the blur has a standard deviation of 0.1 to 2 pixels.
    """
    width = min(13, size - 1 + size % 2)  # of the kernel: three standard deviations either way, if that fits
    steps = [v2.Grayscale(3), v2.RandomSolarize(threshold=128, p=1.0), v2.GaussianBlur(width, sigma=(0.1, 2.0))]
    choice: ImageStep = v2.RandomChoice(steps)
    return choice


def _uniform(low: float = 0.0, high: float = 1.0) -> float:
    return float(torch.rand((), dtype=torch.float64)) * (high - low) + low


@dataclass(frozen=True)
class Moving:
    """How pixels are computed where an image is shifted, sheared or rotated."""

    fill: Fill  # colour of pixels that come in from outside, (red, green, blue), 0 to 255
    interpolation: InterpolationMode = BILINEAR

    def affine(self, image: Tensor, *, angle: float = 0.0, translate: Pair = (0, 0), shear: Pair = (0, 0)) -> Tensor:
        """The image (3, height, width), moved; angles in degrees, clockwise, shifts in pixels."""
        # As PIL does, which timm and the published recipes use: shears from the top left corner, rotates around the
        # centre. For tensors torchvision has no bicubic interpolation of these, so PIL itself computes it.
        is_tensor = self.interpolation == BILINEAR
        moved = image if is_tensor else F.to_pil_image(image)
        center = [0.0, 0.0] if any(shear) else None
        moved = F.affine(moved, angle, list(translate), 1.0, list(shear), self.interpolation, self.fill, center)
        result: Tensor = moved if is_tensor else F.pil_to_tensor(moved)
        return result


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al., arXiv:1909.13719) in the variant that timm calls `rand-m9-mstd0.5-inc1`.

    BEiT, MAE, DeiT and FT-CLIP were trained with it. `ops` times, one of fifteen operations is drawn evenly, with
    replacement. It is applied with probability 0.5, at a strength drawn from N(magnitude, std) and cut to [0, 10]. The
    effect of every operation grows with the strength ("inc1"). torchvision's own RandAugment is another recipe:
    fourteen operations, each always applied, at 9 of 30 instead of 9 of 10.
    """

    ops: int  # operations drawn for an image
    magnitude: float  # mean strength, 0 to 10
    std: float  # standard deviation of the strength
    moving: Moving

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (3, height, width), the same shape back."""
        for _ in range(self.ops):
            operation = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
            happens, noise, sign = _uniform() < 0.5, float(torch.randn(())), 1.0 if _uniform() < 0.5 else -1.0
            strength = min(10.0, max(0.0, self.magnitude + self.std * noise)) / 10
            if happens:
                image = operation(image, strength, sign, self.moving)
        return image


def _shear(strength: float, sign: float) -> float:
    """The angle of a shear by up to 0.3 of a side, in degrees."""
    return math.degrees(math.atan(0.3 * strength * sign))


def _factor(strength: float, sign: float) -> float:
    """The factor of an enhancement, 0.1 to 1.9; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * strength * sign)


def _solarize_add(image: Tensor, strength: float, sign: float, moving: Moving) -> Tensor:
    """Brighten pixels of the darker half of the range by up to 110."""
    brighter = image.int().add_(int(110 * strength)).clamp_(max=255).to(torch.uint8)
    return torch.where(image < 128, brighter, image)


# (image, strength in [0, 1], sign -1 or 1, moving) -> image. The order counts: an operation is drawn by its place here.
OPERATIONS: tuple[Callable[[Tensor, float, float, Moving], Tensor], ...] = (
    lambda image, strength, sign, moving: F.autocontrast(image),
    lambda image, strength, sign, moving: F.equalize(image),
    lambda image, strength, sign, moving: F.invert(image),
    # Rotate. A positive angle of PIL is counterclockwise.
    lambda image, strength, sign, moving: moving.affine(image, angle=-30 * strength * sign),
    lambda image, strength, sign, moving: F.posterize(image, max(1, 4 - int(4 * strength))),  # 0 bits would be black
    # Solarize: invert pixels from a threshold on, which is 256, above all pixels, at strength 0.
    lambda image, strength, sign, moving: torch.where(image.int() >= 256 - int(256 * strength), 255 - image, image),
    _solarize_add,
    lambda image, strength, sign, moving: F.adjust_saturation(image, _factor(strength, sign)),
    lambda image, strength, sign, moving: F.adjust_contrast(image, _factor(strength, sign)),
    lambda image, strength, sign, moving: F.adjust_brightness(image, _factor(strength, sign)),
    lambda image, strength, sign, moving: F.adjust_sharpness(image, _factor(strength, sign)),
    lambda image, strength, sign, moving: moving.affine(image, shear=[_shear(strength, sign), 0.0]),
    lambda image, strength, sign, moving: moving.affine(image, shear=[0.0, _shear(strength, sign)]),
    lambda image, strength, sign, moving: moving.affine(
        image, translate=[-0.45 * strength * sign * image.shape[-1], 0]
    ),
    lambda image, strength, sign, moving: moving.affine(
        image, translate=[0, -0.45 * strength * sign * image.shape[-2]]
    ),
)


@dataclass(frozen=True)
class Erasing:
    """Random erasing (Zhong et al., arXiv:1708.04896) as timm's mode `pixel`: one rectangle of noise.

    Its area is 2 % to a third of the image, its height over width 0.3 to 1/0.3; an image stays as it is where ten
    rectangles did not fit. timm erases after normalising and draws the noise from N(0, 1). This erases before, so the
    noise is scaled, and cut to 0 to 255.
    """

    prob: float  # probability that an image is erased
    mean: Sequence[float]  # of the normalisation, by channel
    std: Sequence[float]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image erased, uint8 (3, height, width); its own pixels stay as they are."""
        height, width = image.shape[-2:]
        if _uniform() >= self.prob:
            return image
        for _ in range(10):
            area = _uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(_uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top, left = (int(torch.randint(free + 1, ())) for free in (height - tall, width - wide))
                mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
                noise = (torch.randn(3, tall, wide) * std + mean) * 255
                erased: Tensor = F.erase(image, top, left, tall, wide, noise.round_().clamp_(0, 255).to(torch.uint8))
                return erased
        return image
