"""What every arm of `bench.py` is given: the same images, first weights, order, views, rates and validation."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms.v2 import functional as v2

from finetune.config import AugmentConf, Conf, DataConf, Recipe, SourceKind
from finetune.config.words.configuration import compose
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.data import open_source
from finetune.data.images.transforms import build_transform, fit_square
from finetune.data.loading.order import epoch_order
from finetune.data.split import Split
from finetune.data.streams import augment_generator, view_of
from finetune.models import build_model

CLASSES = 4
SPARED = ("cls_token", "pos_embed", "reg_token")  # of weight decay, beside whatever has one dimension or none


@dataclass(frozen=True)
class Task:
    """One piece of work that every arm does from images on disk to the final checkpoint.

    Attributes:
        root: Folder with `train`, `val` and `test`.
        weights: safetensors file that every arm starts from, classifier included.
        model: timm's name.
        image_size: Pixels a side; 0: the model's own.
        precision: `fp32` or `bf16`; weights and optimizer are fp32 in both.
        epochs: Each with a validation at its end.
        fix_layer: As `optim.fix_layer`.
        layer_decay: As `optim.layer_decay`.
        augment: Words for the command line that choose the augmentation.
        batch_size: Images a step.
        lr: Peak rate of the head.
        weight_decay: Of matrices.
        seed: Of order and views.
        device: `cpu` or `cuda`.
        extra: More words for our own command line.
    """

    root: Path
    weights: Path
    model: str
    image_size: int = 0
    precision: str = "fp32"
    epochs: int = 1
    fix_layer: int = -1
    layer_decay: float = 0.75
    augment: tuple[str, ...] = ("augment=none",)
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.05
    seed: int = 0
    device: str = "cpu"
    extra: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """The command line of `python -m finetune` that does this task."""
        return [
            "model=vit", "model.library=timm", f"model.name={self.model}", f"model.pretrained={self.weights}",
            "model.head=keep", f"model.image_size={self.image_size}", "data=folder", f"data.root={self.root}",
            f"data.batch_size={self.batch_size}", *self.augment, f"train.epochs={self.epochs}", "train.clip_grad=0",
            f"optim.fix_layer={self.fix_layer}", f"optim.layer_decay={self.layer_decay}", f"optim.lr={self.lr}",
            f"optim.weight_decay={self.weight_decay}", "sched.mode=linear", f"precision={self.precision}",
            f"device={self.device}", f"seed={self.seed}", *self.extra,
        ]  # fmt: skip

    def conf(self) -> Conf:
        """The same as a configuration, composed and checked as the command line does."""
        return compose(self.overrides())

    def preprocess(self) -> Preprocess:
        """What the model expects of an image."""
        return _preprocess(replace(self, layer_decay=0.75))

    def augmentation(self) -> AugmentConf:
        """The settings behind `augment`."""
        return _conf(replace(self, layer_decay=0.75)).augment

    def prepare(self) -> None:
        """Look up beforehand what the other arms ask our configuration for: their clocks shall not pay for it."""
        self.preprocess()
        self.augmentation()


@functools.cache
def _conf(task: Task) -> Conf:
    return task.conf()


@functools.cache
def _preprocess(task: Task) -> Preprocess:
    return our_model(task, load=False, device="meta")[1]


def make_images(root: Path, train: int, val: int, *, size: tuple[int, int] = (500, 375), suffix: str = ".jpg") -> None:
    """Files with about the content of photographs: clouds of every scale, a few sharp edges, grain.

    Class `c` has its own tint and its own kind of edge, so there is something to learn. `test` holds an image a class:
    our run scores it at its end, which no other arm does.
    """
    for split, count in (("train", train), ("val", val), ("test", CLASSES)):
        for i in range(count):
            folder = root / split / f"class{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            options = {"quality": 90} if suffix == ".jpg" else {}
            picture(f"{split}{i}", i % CLASSES, size).save(folder / f"{i:05}{suffix}", **options)


def picture(name: str, label: int, size: tuple[int, int]) -> Image.Image:
    """One image by its name, the same in every run; `size` is width, height."""
    random = np.random.default_rng([label, *name.encode()])
    width, height = size
    pixels = np.full((height, width, 3), 110.0)
    for octave in range(2, 8):  # amplitude falls with frequency, as in photographs
        low = random.normal(0, 1, (max(2, height * 2**octave // 400), max(2, width * 2**octave // 400), 3))
        level = Image.fromarray(((low.clip(-3, 3) + 3) * 42).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(level, dtype=np.float64) - 126) * 1.6 / 1.7 ** (octave - 2)
    down, across = np.mgrid[0:height, 0:width]
    for _ in range(6):
        x, y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(0.05, 0.3) * height
        inside = (
            np.hypot(across - x, down - y) < radius if label % 2 else np.abs(across - x) + np.abs(down - y) < radius
        )
        pixels[inside] = 0.5 * pixels[inside] + random.uniform(0, 128, 3)
    pixels[..., label % 3] += 12
    pixels += random.normal(0, 5, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_weights(task: Task) -> None:
    """Random first weights, classifier included, into `task.weights`."""
    torch.manual_seed(task.seed)
    options = {"img_size": task.image_size} if task.image_size else {}
    net = timm.create_model(task.model, num_classes=CLASSES, **options)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, task.weights)


def first_model(task: Task) -> nn.Module:
    """Timm's own network with the first weights, as people who write their own loop make it."""
    options = {"img_size": task.image_size} if task.image_size else {}
    net = timm.create_model(task.model, num_classes=CLASSES, **options)
    net.load_state_dict(load_file(task.weights))
    return net.to(task.device)


def our_model(task: Task, *, load: bool = True, device: str = "cpu") -> tuple[LayeredModel, Preprocess]:
    """Our view of the same network, frozen as the task says, and what it expects of an image."""
    conf = task.conf()
    built = build_model(conf.model, [f"class{i}" for i in range(CLASSES)], load=load, device=device)
    freeze(built.model, task.fix_layer)
    return built.model, built.preprocess


def layer_id(name: str, blocks: int) -> int:
    """Which layer of a ViT of timm a parameter belongs to: 0 stem, 1 to L blocks, L + 1 norm, L + 2 head."""
    found = re.match(r"blocks\.(\d+)\.", name)
    if found:
        return int(found[1]) + 1
    if name.startswith("head"):
        return blocks + 2
    return blocks + 1 if name.startswith(("norm.", "fc_norm.")) else 0


def freeze_and_group(net: nn.Module, task: Task, *, merged: bool) -> list[dict[str, Any]]:
    """Freeze by `requires_grad=False`; groups for AdamW with rates that fall towards the input.

    Args:
        net: A ViT of timm.
        task: Rates, decay and what is frozen.
        merged: One group a (layer, decayed or not); else one group a parameter, as the recipe is mostly copied.
    """
    blocks = len(net.blocks)  # type: ignore[arg-type]
    groups: dict[object, dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        layer = layer_id(name, blocks)
        parameter.requires_grad_(layer > task.fix_layer)
        if layer <= task.fix_layer:
            continue
        decayed = parameter.ndim > 1 and name not in SPARED
        scale = task.layer_decay ** (blocks + 1 - min(layer, blocks + 1))
        key = (layer, decayed) if merged else name
        decay = task.weight_decay if decayed else 0.0
        group = groups.setdefault(key, {"params": [], "lr": task.lr * scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def linear(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor 1 - epoch / epochs, stepped once an epoch."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images of a split by (index, view), normalised float32, as a plain loop reads them: by Pillow, one at a time."""

    def __init__(self, split: Split, task: Task, preprocess: Preprocess, *, train: bool, same_pixels: bool) -> None:
        """Prepare.

        Args:
            split: Which files, in our numbering.
            task: Its augmentation is applied where `train`.
            preprocess: What the model expects.
            train: Whether this is the training split.
            same_pixels: Decode and resize with this project's code: for parity. Else with Pillow and torchvision's
                transforms; where there is augmentation, its operations are this project's in any case.
        """
        assert preprocess.resize == "crop", preprocess.resize
        self.files = [str(task.root / split.name_of(i)) for i in range(len(split))]
        self.labels = split.labels.tolist()
        self.split, self.seed, self.same_pixels, self.preprocess = split, task.seed, same_pixels, preprocess
        augment = task.augmentation() if train else None
        self.transform = build_transform(preprocess, augment)
        self.is_plain = augment is None or augment.recipe == Recipe.none
        size = math.floor(preprocess.size / preprocess.crop_fraction)
        mode = transforms.InterpolationMode(preprocess.interpolation)
        self.normalize = transforms.Normalize(preprocess.mean, preprocess.std)
        crop = [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(preprocess.size)]
        self.crop = transforms.Compose(crop)
        self.simple = transforms.Compose([*crop, transforms.ToTensor(), self.normalize])
        self.mean = torch.tensor(preprocess.mean)[:, None, None]
        self.std = torch.tensor(preprocess.std)[:, None, None]

    def __len__(self) -> int:
        """How many images."""
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Image and label."""
        index, view = key
        if self.same_pixels:
            pixels = self._shown(self.split.load(index), index, view)
            return pixels.float().div_(255).sub_(self.mean).div_(self.std), self.labels[index]
        with Image.open(self.files[index]) as image:
            rgb = image.convert("RGB")
        if self.is_plain:
            return self.simple(rgb), self.labels[index]
        pixels = self._shown(v2.pil_to_tensor(rgb), index, view)
        return self.normalize(pixels.float().div_(255)), self.labels[index]

    def levels(self, index: int) -> Tensor:
        """An image as the model would see it, neither augmented nor normalised: uint8 (3, size, size)."""
        if self.same_pixels:
            return fit_square(self.split.load(index), self.preprocess)
        with Image.open(self.files[index]) as image:
            return v2.pil_to_tensor(self.crop(image.convert("RGB")))

    def _shown(self, pixels: Tensor, index: int, view: int) -> Tensor:
        return self.transform([(pixels, functools.partial(augment_generator, self.seed, view, index, 0))], 1)[0]


def decoders_apart(task: Task, images: int = 32) -> dict[str, float]:
    """`levels_apart` of this project's decoding and resizing and of the plain loop's, on some validation images."""
    split = open_source(DataConf(source=SourceKind.folder, root=str(task.root))).splits["val"]
    ours, plain = (
        Pictures(split, task, task.preprocess(), train=False, same_pixels=same_pixels) for same_pixels in (True, False)
    )
    return levels_apart(ours, plain, min(images, len(split)))


def levels_apart(one: Pictures, other: Pictures, images: int) -> dict[str, float]:
    """The largest difference in levels of 256, and the share of values that differ at all, on the first `images`."""
    gaps = torch.stack([(one.levels(i).int() - other.levels(i).int()).abs() for i in range(images)])
    return {
        "images": images,
        "largest_levels": int(gaps.max()),
        "share_of_values": float((gaps > 0).double().mean()),
    }


class Order(Sampler[tuple[int, int]]):
    """(index, view) of the epoch to come: our order and views, or every image in turn."""

    def __init__(self, split: Split, task: Task, *, train: bool) -> None:
        """Prepare; `epoch` is set from outside, as with a DistributedSampler."""
        self.split, self.seed, self.train, self.epoch = split, task.seed, train, 0
        self.augment = task.augmentation() if train else None

    def __len__(self) -> int:
        """How many images."""
        return len(self.split)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each in turn."""
        if not self.train:
            return ((index, 0) for index in range(len(self)))
        order = epoch_order(self.split.labels, seed=self.seed, epoch=self.epoch, balanced=False).samples
        view = view_of(self.epoch, self.augment)
        return ((index, view) for index in order.tolist())


def loaders(task: Task, *, workers: int, same_pixels: bool, pin: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """(train, val) of a plain loop; `.sampler.epoch` of the first says which epoch comes."""
    source = open_source(DataConf(source=SourceKind.folder, root=str(task.root)))
    made = []
    for name, train in (("train", True), ("val", False)):
        split = source.splits[name]
        pictures = Pictures(split, task, task.preprocess(), train=train, same_pixels=same_pixels)
        made.append(
            DataLoader(
                pictures,
                batch_size=task.batch_size,
                sampler=Order(split, task, train=train),
                num_workers=workers,
                pin_memory=pin,
                persistent_workers=workers > 0,
            )
        )
    return made[0], made[1]
