"""From decoded images of any size to a batch of the size that the model expects: uint8 in, uint8 out.

Images are normalised after they went to the device: uint8 is a fourth of the bytes of float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as v2

from finetune.config import AugmentConf, Recipe
from finetune.core.preprocess import Preprocess
from finetune.data.images.recipes import ImageToShow, build_crop_recipe
from finetune.data.images.resize import batch_images, resize

# Longest side over shortest, above which an image is cut to its middle before a `crop` resize. Else a 20 x 20,000 image
# would grow to gigabytes, of which the centre crop shows a thousandth. The crop's pixels stay the same.
MAX_ASPECT = 8
# Pixels that are warped in one call. A call costs more than 32 x 32 pixels, so small images go together; but no more
# than fit into the processor's cache (at 224 pixels, one image at a time takes three quarters of the time of 64).
WARP_PIXELS = 2**16


def fit_square(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Resize an image to the model's square, antialiased. uint8 (3, height, width) -> uint8 (3, size, size)."""
    size = preprocess.size
    height, width = image.shape[-2:]
    if preprocess.resize == "squash":
        return resize(image, [size, size], preprocess.interpolation)
    if preprocess.resize == "pad":
        longest = max(height, width)
        shape = [max(1, round(size * height / longest)), max(1, round(size * width / longest))]
        # Where a side is too short, torchvision's centre crop adds black.
        return _centre(resize(image, shape, preprocess.interpolation), size, size)
    assert preprocess.resize == "crop", preprocess.resize
    shortest = min(height, width)
    if max(height, width) > MAX_ASPECT * shortest:
        limit = MAX_ASPECT * shortest
        image = _centre(image, min(height, limit), min(width, limit))
    return _centre(resize(image, [preprocess.shorter_side], preprocess.interpolation), size, size)


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    centre: Tensor = v2.center_crop(image, [height, width])
    return centre


class View(NamedTuple):
    """How one image is moved around its centre: mirrored, scaled, rotated, then shifted, in this order."""

    angle: float  # clockwise as seen on the screen, radians
    scale: float  # above 1 the content grows
    right: float  # shifts, as a share of half the side
    down: float
    mirror: float  # -1.0: left and right change places; 1.0: they do not


@dataclass(frozen=True)
class Light:
    """A small random rotation, shift and zoom, and perhaps a mirror image, in one interpolation.

    Pixels that come in from outside have the median colour of the image's border: digits stay on black, goods on white.
    """

    degrees: float  # largest rotation either way
    translate: float  # largest shift either way along each axis, as a share of the side
    zoom: float  # largest change of size either way, as a share
    flip: float  # probability of a left-right mirror image

    def draw(self, generator: torch.Generator) -> View:
        """Draw a view; takes five numbers from `generator`, whatever the settings are."""
        turn, right, down, grow, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        return View(
            angle=math.radians(self.degrees) * (2 * turn - 1),
            scale=1 + self.zoom * (2 * grow - 1),
            right=2 * self.translate * (2 * right - 1),  # the side is 2 half sides long
            down=2 * self.translate * (2 * down - 1),
            mirror=-1.0 if mirror < self.flip else 1.0,
        )


def warp(images: Tensor, views: Sequence[View]) -> Tensor:
    """Move each image as its view says, bilinear. uint8 (batch, 3, n, n) -> uint8 (batch, 3, n, n).

    An image comes out the same in any batch, since every operation is element by element. So the grid is computed
    without a matrix product, whose sums may change with the size of the batch.
    """
    size = images.shape[-1]
    # Sines from `math`: for long lists torch uses vector instructions, which give other last bits.
    turns = [(math.cos(view.angle) / view.scale, math.sin(view.angle) / view.scale) for view in views]
    numbers = [(*turn, view.right, view.down, view.mirror) for turn, view in zip(turns, views, strict=True)]
    along, across, right, down, mirror = torch.tensor(numbers, dtype=torch.float32).T[:, :, None, None]
    centres = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1  # of the pixels, the image being [-1, 1]
    # For each pixel of the result, the place in the image that it comes from: every step is undone, the last one first.
    x, y = centres[None, None, :] - right, centres[None, :, None] - down
    grid = torch.stack([(x * along + y * across) * mirror, y * along - x * across], dim=-1)
    sides = [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]]
    outside = torch.cat(sides, dim=2).median(dim=2).values.to(torch.float32)[:, :, None, None]  # (batch, 3, 1, 1)
    inside = images.to(torch.float32) - outside  # so that the border is zero, which grid_sample puts outside
    moved = grid_sample(inside, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.add_(outside).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Transform:
    """Resize each image to the model's square, then augment it lightly or not at all (None)."""

    preprocess: Preprocess
    light: Light | None

    def __call__(self, images: Iterable[ImageToShow], most: int) -> Tensor:
        """Transform at most `most` images, each by its own generator -> uint8 (batch, 3, size, size)."""
        views: list[View] = []

        def resized() -> Iterator[Tensor]:
            for image, generator in images:
                if self.light is not None:
                    views.append(self.light.draw(generator()))
                yield fit_square(image, self.preprocess)

        batch = batch_images(resized(), most)
        at_once = max(1, WARP_PIXELS // self.preprocess.size**2)
        for start in range(0, len(views), at_once):
            part = slice(start, start + at_once)
            batch[part] = warp(batch[part], views[part])
        return batch


BatchTransform = Callable[[Iterable[ImageToShow], int], Tensor]


def build_transform(preprocess: Preprocess, augment: AugmentConf | None) -> BatchTransform:
    """Build the transform of training (`augment`) or of evaluation (None, or the recipe `none`).

    It takes images with their generators, and the largest number of them, and returns uint8 (batch, 3, size, size).
    """
    if augment is None or augment.recipe == Recipe.none:
        return Transform(preprocess, None)
    if augment.recipe == Recipe.crop:
        return build_crop_recipe(preprocess, augment)
    assert augment.recipe == Recipe.light, augment.recipe
    return Transform(preprocess, Light(augment.degrees, augment.translate, augment.zoom, augment.flip))
