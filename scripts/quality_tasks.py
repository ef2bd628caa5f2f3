"""What every arm of `bench_quality.py` is given: the same pixels, labels, first weights, epochs and batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from quality_sets import digest_of
from torch import Tensor

from finetune.config import AugmentConf, DataConf, Recipe, SourceKind
from finetune.config.words.configuration import compose
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.data import open_source
from finetune.data.images.transforms import build_transform
from finetune.data.streams import augment_generator
from finetune.models import build_model

VIT, CLIP = ("model=vit",), ("model=clip",)
WEIGHTS = "WEIGHTS"  # stands for the folder of fetched weights
LITE0 = ("model=vit", "model.name=tf_efficientnet_lite0",
         f"model.pretrained={WEIGHTS}/tf_efficientnet_lite0.safetensors", "model.image_size=96")  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A set with the weights that are fine-tuned on it.

    Attributes:
        images: Name of the set in `quality_sets.py`.
        model: Words for the command line that choose the weights.
        epochs: Passes over the training images, of every arm.
        batch_size: Images a step, of every arm but ours.
        flips: Whether a mirror image keeps its class: a person leaves mirroring out for letters and digits.
        scale: Least and greatest share of the area in a random crop. 0.08 cuts a letter to pieces.
    """

    images: str
    model: tuple[str, ...]
    epochs: int = 20
    batch_size: int = 64
    flips: bool = True
    scale: tuple[float, float] = (0.08, 1.0)

    def overrides(self, out: Path, seed: int) -> list[str]:
        """The command line that fine-tunes with this project, with nothing of the recipe set but its length."""
        words = [word.replace(WEIGHTS, str(out / "weights")) for word in self.model]
        return [
            *words, "data=folder", f"data.root={out / 'sets' / self.images}",
            f"train.epochs={self.epochs}", f"seed={seed}", "data.workers=0", "device=cpu",
            f"data.cache_dir={out / 'cache'}",
        ]  # fmt: skip


_WRITTEN = {"flips": False, "scale": (0.5, 1.0)}
TASKS = {
    "digits": Task("digits", VIT, epochs=10, **_WRITTEN),
    "digits-clip": Task("digits", CLIP, epochs=10, **_WRITTEN),
    "letters": Task("letters", VIT, **_WRITTEN),
    "letters-clip": Task("letters", CLIP, **_WRITTEN),
    "fashion-10": Task("fashion-10", VIT, scale=(0.5, 1.0)),
    "fashion-100": Task("fashion-100", VIT, epochs=10, scale=(0.5, 1.0)),
    "stamps": Task("stamps", LITE0, epochs=10),
    "clipart": Task("clipart", LITE0, epochs=10),
}


@dataclass
class Pictures:
    """One split in memory: decoded images of any size, the model's squares, and labels."""

    images: list[Tensor]  # uint8 (3, height, width)
    squares: Tensor  # uint8 (n, 3, size, size), as the application evaluates them
    labels: Tensor  # int64 (n,)

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)


@dataclass
class Ready:
    """A task with its pixels, for the arms that are not ours."""

    task: Task
    seed: int
    classes: tuple[str, ...]
    splits: dict[str, Pictures]
    preprocess: Preprocess
    out: Path

    def fresh_model(self) -> LayeredModel:
        """The pretrained network under a random head of this seed, read by the application's own code."""
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)
        random.seed(self.seed)
        return _build(self.task, self.out, self.seed, self.classes)[0]

    def normalize(self, squares: Tensor) -> Tensor:
        """Bytes to what the first layer reads."""
        mean = torch.tensor(self.preprocess.mean)[:, None, None]
        std = torch.tensor(self.preprocess.std)[:, None, None]
        return squares.float().div_(255).sub_(mean).div_(std)

    def batches(self, view: View, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled training batches of an epoch; the same order for all arms with the same seed."""
        train = self.splits["train"]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        for part in order.split(self.task.batch_size):
            # A last batch of one image leaves BatchNorm nothing to normalise.
            if len(part) > 1:
                yield view(self, part.tolist(), epoch), train.labels[part]


def _build(task: Task, out: Path, seed: int, classes: tuple[str, ...]) -> tuple[LayeredModel, Preprocess]:
    words = [*task.overrides(out, seed), "model.head=random"]
    built = build_model(compose(words).model, classes)
    return built.model, built.preprocess


def ready(task: Task, out: Path, seed: int) -> Ready:
    """Decode and resize a task's images as the application does."""
    source = open_source(DataConf(source=SourceKind.folder, root=str(out / "sets" / task.images)))
    preprocess = _build(task, out, seed, source.classes)[1]
    resize = build_transform(preprocess, None)
    splits = {}
    for name, split in source.splits.items():
        images = [split.load(i) for i in range(len(split))]
        squares = resize([(image, torch.Generator) for image in images], len(images))
        splits[name] = Pictures(images if name == "train" else [], squares, split.labels)
    return Ready(task, seed, source.classes, splits, preprocess, out)


class View:
    """How training images are shown: (ready, indices, epoch) -> normalised float32 (batch, 3, size, size)."""

    def __call__(self, given: Ready, indices: list[int], epoch: int) -> Tensor:
        """As in evaluation, without augmentation."""
        return given.normalize(given.splits["train"].squares[indices])


class LightView(View):
    """The application's default augmentation with its own random numbers."""

    def __call__(self, given: Ready, indices: list[int], epoch: int) -> Tensor:
        """Small turns, shifts and zooms."""
        transform = build_transform(given.preprocess, AugmentConf(recipe=Recipe.light))
        train = given.splits["train"].images
        shown = [(train[i], partial(augment_generator, given.seed, epoch, i, 0)) for i in indices]
        return given.normalize(transform(shown, len(shown)))


class CropView(View):
    """Timm's own training transform: random resized crop, mirror image, colour jitter."""

    def __init__(self, jitter: float) -> None:
        """Take timm's `--color-jitter`; torchvision's plain crop and flip have 0."""
        self.jitter = jitter

    def __call__(self, given: Ready, indices: list[int], epoch: int) -> Tensor:
        """One view of each image, with Pillow."""
        from timm.data import create_transform
        from torchvision.transforms.functional import to_pil_image

        task, preprocess = given.task, given.preprocess
        transform = create_transform(
            preprocess.size, is_training=True, scale=task.scale, hflip=0.5 if task.flips else 0.0,
            color_jitter=self.jitter or None, interpolation="random" if self.jitter else "bilinear",
            mean=preprocess.mean, std=preprocess.std,
        )  # fmt: skip
        return torch.stack([transform(to_pil_image(given.splits["train"].images[i])) for i in indices])


def data_version(task: Task, out: Path) -> str:
    """What must be equal for two results to be of the same images."""
    return digest_of(task.images, out)[:10]
