"""Everything that a run is built of: source, model and device, and the loaders and meters that are made from them."""

import dataclasses
import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.app.room import check_files, check_room
from finetune.app.rule import with_choices
from finetune.config import Conf, ModelConf, as_dict, measured_metrics, without_val_problems
from finetune.core.device import WIDE, autocast, environment, pick_device, pick_precision, set_kernels
from finetune.core.ema import Ema
from finetune.core.freezing import set_up_layers
from finetune.core.layers import LayeredModel
from finetune.core.loop import Batch, TrainState
from finetune.core.losses import Criterion, build_criterion, loss_of
from finetune.core.metrics import Meter, build_meter
from finetune.core.preprocess import as_asked
from finetune.data import ImageError, Loader, SkippedList, Source, check_at_start, open_source
from finetune.data.images.mix import Mixer
from finetune.models import BuiltModel, build_model
from finetune.models.heads.offsets import with_head_bias
from finetune.models.patches import place, products_dominate
from finetune.report.columns import headlines
from finetune.runs.weights import weights_metadata
from finetune.system.errors import UserError
from finetune.system.memory import keep_freed_memory

MOST_NAMES = 1_000_000  # of a split that a fingerprint hashes: of two million images every second; takes a second
HEAD = ("head.weight", "head.bias")  # the parameters of a zero-shot head
MOST_SIZES, MOST_READ = 100_000, 32  # images of a split whose size is looked at, and that are read


@dataclass
class Run:
    """Everything that a run is built of. Only this room takes it; other rooms take what they need of it."""

    conf: Conf
    folder: Path  # the run directory
    source: Source
    built: BuiltModel
    device: torch.device
    dtype: torch.dtype  # that forward passes compute in
    metrics: tuple[str, ...]  # names of the metrics that are measured
    monitor: str  # the metric that picks the best epoch
    is_auto_batch: bool = False  # whether the user asked for `data.batch_size=fit`; `conf` may have the number by now
    choices: list[str] = dataclasses.field(default_factory=list)  # what was chosen for this start, as lines for the log

    def __post_init__(self) -> None:
        """Name the model that learns, and the folder of weights and states."""
        self.model, self.checkpoints = self.built.model, self.folder / "checkpoints"
        self.notes: dict[str, str] = {}  # that every checkpoint carries, once the start is agreed on; see `first_notes`
        self.written: dict[str, str] = {}  # checksums of its weights files when it continues, by their names
        self.loss = loss_of(self.conf.train, is_multilabel=self.source.is_multilabel)
        self.headlines = headlines(self.monitor)

    @property
    def model_conf(self) -> ModelConf:
        """The settings that the model was built with: `conf.model`, with what the labels of the source need."""
        return with_head_bias(self.conf.model, is_multilabel=self.source.is_multilabel)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        return autocast(self.dtype, self.device)

    def meter(self, threshold: float | None = None) -> Meter:
        """A fresh meter; its loss is the training loss without label smoothing and class weights."""
        several = self.source.is_multilabel
        loss = build_criterion(self.conf.train, is_multilabel=several)
        return build_meter(
            lambda logits, targets: loss(logits, targets, 0.0), self.metrics, is_multilabel=several, threshold=threshold
        )

    def criterion(self) -> Criterion:
        """The training loss, with class weights on the device of the model."""
        weights = self.source.class_weights
        weights = None if weights is None else weights.to(self.device)
        return build_criterion(self.conf.train, is_multilabel=self.source.is_multilabel, class_weights=weights)

    def built_again(self, device: str) -> LayeredModel:
        """The model as it was before training, with the same layers frozen; on the device `meta` it takes no memory."""
        model = build_model(self.model_conf, self.source.classes, device=device).model
        set_up_layers(model, self.conf.optim, train=self.conf.train)
        return model

    def state(self, optimizer: Optimizer, scheduler: LambdaLR) -> TrainState:
        """Everything that changes while training, before the first step."""
        conf, criterion, interval = self.conf.train, self.criterion(), self.conf.sched.interval
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        state = TrainState(self.model, optimizer, scheduler, scaler, criterion, self.autocast(), interval)
        if conf.ema:
            state.ema = Ema(self.model, conf.ema, warmup=conf.ema_warmup)
        return state

    def loader(self, split: str, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented for training, else in order and plain."""
        images, preprocess, conf, device = self.source.splits[split], self.built.preprocess, self.conf, self.device
        augment, skip = conf.augment if train else None, SkippedList(self.folder).add
        loader = Loader(
            images, preprocess, conf=conf.data, augment=augment, seed=conf.seed, device=device, on_skip=skip
        )
        if train and conf.data.drop_last:
            loader.drop_last(conf.data.batch_size * conf.train.accumulate)
        return loader

    def mixer(self) -> Mixer:
        """MixUp and CutMix of training batches, as far as the augmentation asks for them."""
        classes, size = len(self.source.classes), self.conf.data.batch_size
        return Mixer(self.conf.augment, num_classes=classes, seed=self.conf.seed, batch_size=size)

    def window(self, epoch: int, batch: int) -> list[Batch]:
        """The micro-batches of the step that begins with micro-batch `batch` of `epoch`, both from 0; the same bits."""
        conf = dataclasses.replace(self.conf, data=dataclasses.replace(self.conf.data, workers="0"))
        loader = dataclasses.replace(self, conf=conf).loader("train", train=True)
        batches = self.mixer().wrap(loader.epoch(epoch, batch), epoch, batch)
        return list(islice(batches, self.conf.train.accumulate))

    def split_digest(self, name: str) -> str:
        """Number and digest of a split's images, by their places and labels."""
        split = self.source.splits[name]
        digest = hashlib.sha256(split.labels.cpu().contiguous().numpy().tobytes())
        for index in range(0, len(split), max(1, len(split) // MOST_NAMES)):
            digest.update(split.name_of(index).encode("utf-8", "surrogateescape"))
        return f"{len(split)} images {digest.hexdigest()[:16]}"

    def fingerprint(self) -> str:
        """Number and digest of all images, by names without places, labels and classes."""
        digest = hashlib.sha256(json.dumps(self.source.classes).encode())
        for split in self.source.splits.values():
            digest.update(split.labels.cpu().contiguous().numpy().tobytes())
            for row in split.rows[:: max(1, len(split) // MOST_NAMES)].tolist():
                digest.update(split.store.key_of(row).encode("utf-8", "surrogateescape"))
        return f"{sum(map(len, self.source.splits.values()))} images {digest.hexdigest()[:16]}"

    def content(self) -> str:
        """Digest of the sizes of at most MOST_SIZES images of each split, and of the bytes of a few."""
        digest = hashlib.sha256()
        for split in self.source.splits.values():
            for row in split.rows[:: max(1, len(split) // MOST_SIZES)].tolist():
                digest.update(split.store.num_bytes(row).to_bytes(8, "little"))
            for row in split.rows[:: max(1, len(split) // MOST_READ)].tolist():
                try:
                    digest.update(split.store.read(row))
                except ImageError:
                    digest.update(b"unreadable")
        return digest.hexdigest()[:16]

    def first_notes(self) -> dict[str, str]:
        """Machine, versions, images, batch and files: a checkpoint carries them, and a resumed run compares them."""
        batch = f"{self.conf.data.batch_size} images x {self.conf.train.accumulate}"
        notes = {**environment(self.device), "images": self.fingerprint(), "content": self.content(), "batch": batch}
        for name in ("pretrained", "class_names"):
            path = getattr(self.conf.model, name)
            if path is not None and os.path.isabs(path) and os.path.isfile(path):
                digest = hashlib.sha256()
                with open(path, "rb") as file:
                    while piece := file.read(2**20):
                        digest.update(piece)
                notes[name] = digest.hexdigest()[:16]
        return notes

    def metadata(self) -> dict[str, str]:
        """Classes, preprocessing and model settings, as they are stored beside the weights."""
        classes, model, is_multilabel = self.source.classes, as_dict(self.model_conf), self.source.is_multilabel
        metadata = weights_metadata(classes, self.built.preprocess, model, is_multilabel=is_multilabel)
        return metadata | ({"changes": json.dumps(self.built.changes)} if self.built.changes else {})


def build_run(conf: Conf, run_dir: Path, *, is_begun: bool = False) -> Run:
    """Open the images, and build the model on its device; its random numbers come from torch's generator, seeded here.

    Where the run `is_begun` a file holds what it has learned, and so a zero-shot head: no class name is read for it.

    Raises:
        UserError: A mistake that only the model, the data or the machine could show.
    """
    device = pick_device(conf.device)
    check_files(conf, device)
    source = open_source(conf.data)
    if not source.has("val") and (problems := without_val_problems(conf.train)):
        raise UserError(problems[0])
    source = check_at_start(source, conf.data, run_dir)
    if device.type == "cpu":
        keep_freed_memory()  # only now, so that the memory of the check's threads went back to the system
    metrics, monitor = measured_metrics(conf.train, is_multilabel=source.is_multilabel)
    model_conf = with_head_bias(conf.model, is_multilabel=source.is_multilabel)
    choices: list[str] = []
    if conf.auto:
        skeleton = build_model(model_conf, source.classes, device="meta").model
        conf, choices = with_choices(conf, len(source.splits["train"]), skeleton)
    check_room(conf, model_conf, source, device)
    # A head of which something is frozen comes out of its names again, as the frozen layers come out of their weights.
    reads_names = not is_begun or any(fnmatchcase(name, glob) for name in HEAD for glob in conf.optim.freeze)
    built = seeded_model(conf, source, reads_names=reads_names)
    dtype = pick_precision(conf.precision, device, is_wide=products_dominate(built.model.net, WIDE))
    set_kernels(conf.precision, dtype)
    place(built.model, device, dtype)
    fit = conf.data.batch_size == 0
    return Run(conf, run_dir, source, built, device, dtype, metrics, monitor, is_auto_batch=fit, choices=choices)


def seeded_model(conf: Conf, source: Source, *, reads_names: bool = True) -> BuiltModel:
    """The model on the CPU, the same for the same seed; without `reads_names` a zero-shot head's values are random."""
    torch.manual_seed(conf.seed)
    model_conf = with_head_bias(conf.model, is_multilabel=source.is_multilabel)
    built = build_model(model_conf, source.classes, reads_names=reads_names)
    return dataclasses.replace(built, preprocess=as_asked(built.preprocess, conf.data))
