"""MixUp and CutMix: images of a batch are mixed in pairs, on the device, and so are their labels.

The mixture is drawn on the host from (seed, epoch, group of images) alone. So a resumed epoch mixes images as an
uninterrupted one does, and the host never waits for the device.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.config import AugmentConf
from finetune.core.loop import Batch
from finetune.data.streams import mix


class Mixture(NamedTuple):
    """How one batch is mixed: image i with image (i + shift) mod batch, so with itself only in a batch of one."""

    shift: int
    share: float  # weight of image i, in [0, 1]; the other image has the rest
    box: tuple[int, int, int, int] | None  # CutMix takes this (top, bottom, left, right) from the other; None: MixUp


@dataclass(frozen=True)
class Mixer:
    """MixUp (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899).

    One draw for all images of a micro-batch, or, with `augment.mix_images=n`, for each group of n of them. Groups are
    counted through an epoch. So with n = 32 eight micro-batches of 32 images are mixed as one of 256.
    """

    augment: AugmentConf
    num_classes: int
    seed: int  # the run's
    batch_size: int = 0  # images of a whole micro-batch; groups of `mix_images` are counted by it

    def wrap(self, batches: Iterable[Batch], epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch mixed; `batches` begins at micro-batch `skip`. Unchanged if mixing is off."""
        if not (self.augment.mixup or self.augment.cutmix):
            yield from batches
            return
        for index, (images, labels, ids) in enumerate(batches, start=skip):
            parts = [
                self._mixed(some, their_labels, epoch, group)
                for group, some, their_labels in self._groups(images, labels, index)
            ]
            mixed, shares = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
            yield mixed, shares, ids

    def _groups(self, images: Tensor, labels: Tensor, index: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The groups of micro-batch `index`, each with its number in the epoch."""
        if not self.augment.mix_images:
            yield index, images, labels
            return
        size = self.augment.mix_images
        first = index * -(-self.batch_size // size)
        yield from zip(itertools.count(first), torch.split(images, size), torch.split(labels, size), strict=False)

    def draw(self, epoch: int, index: int, *, batch: int, height: int, width: int) -> Mixture | None:
        """The mixture of group `index` of an epoch, which has `batch` images; None: it stays unmixed."""
        # RandomState, since numpy promises never to change its numbers, also those of the Beta distribution.
        random = np.random.RandomState(np.random.PCG64(mix("mix", self.seed, epoch, index)))
        mixes, switch, vertical, horizontal = random.random_sample(4)
        augment = self.augment
        if mixes >= augment.mix_prob:
            return None
        cuts = bool(augment.cutmix) and (not augment.mixup or switch < augment.mix_switch)
        alpha = augment.cutmix if cuts else augment.mixup
        share = float(random.beta(alpha, alpha))
        shift = int(random.randint(1, batch)) if batch > 1 else 0
        if not cuts:
            return Mixture(shift, share, None)
        # The rectangle has the image's shape and 1 - share of its area. Its centre may be any pixel, so a part may lie
        # outside of the image: the share is then computed from the part inside.
        tall, wide = (int(side * (1 - share) ** 0.5) for side in (height, width))
        y, x = int(vertical * height), int(horizontal * width)
        top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
        left, right = max(0, x - wide // 2), min(width, x + wide // 2)
        area = (bottom - top) * (right - left)
        return Mixture(shift, 1 - area / (height * width), (top, bottom, left, right))

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Mixed images, float (batch, 3, height, width), and targets float32 (batch, classes), also if unmixed."""
        shares = F.one_hot(labels, self.num_classes).to(torch.float32) if labels.ndim == 1 else labels
        height, width = images.shape[-2:]
        mixture = self.draw(epoch, index, batch=len(images), height=height, width=width)
        if mixture is None:
            return images, shares
        others = images.roll(-mixture.shift, dims=0)
        if mixture.box is None:
            images = torch.lerp(others, images, mixture.share)
        else:
            top, bottom, left, right = mixture.box
            images = images.clone()
            images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return images, torch.lerp(shares.roll(-mixture.shift, dims=0), shares, mixture.share)
