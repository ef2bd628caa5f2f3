"""Whether the head that class names give is worth starting from, where nobody said which head."""

import dataclasses
import logging
from contextlib import closing

import torch

from finetune.app.build import Run, seeded_model
from finetune.config import HeadKind
from finetune.core.metrics.intervals import wilson
from finetune.models.patches import place
from finetune.system.signals import StopSignals
from finetune.system.terminal import counted

MOST = 1000  # images that are looked at, evenly out of all: the start of a run must not take long

logger = logging.getLogger("finetune")


def choose_head(run: Run, stop: StopSignals) -> Run:
    """The run with `model.head=auto` decided: zero-shot where that is clearly better than chance, else random.

    No step has learned from any image yet, so without validation images the training images serve as well. Several
    labels an image have no chance to compare with, and a run without names for its classes has no choice: they stay.
    """
    if "model.head" not in run.conf.open or not run.built.has_zeroshot or run.source.is_multilabel:
        return run
    right, number, chance = _zero_shot(run, "val" if run.source.has("val") else "train", stop)
    is_clear = wilson(right / number, number)[0] > chance
    head = HeadKind.zeroshot if is_clear else HeadKind.random
    conf = run.conf.choose({"model.head": head})
    if is_clear:
        return dataclasses.replace(run, conf=conf)
    logger.info(
        "model.head=random: zero-shot gives %d of %s right, which is not clearly more than one class for all would"
        " (%.1f%%); model.head=zeroshot starts from it nevertheless",
        right,
        counted(number, "image"),
        100 * chance,
    )
    built = seeded_model(conf, run.source)
    place(built.model, run.device, run.dtype)
    return dataclasses.replace(run, conf=conf, built=built)


def _zero_shot(run: Run, name: str, stop: StopSignals) -> tuple[int, int, float]:
    """How many images of the split `name` the head labels correctly, of how many, and the largest class's share."""
    split = run.source.splits[name]
    step = -(-len(split) // MOST)
    part = dataclasses.replace(split, rows=split.rows[::step], labels=split.labels[::step])
    splits = {**run.source.splits, name: part}
    small = dataclasses.replace(run, source=dataclasses.replace(run.source, splits=splits))
    right = 0
    run.model.eval()
    with closing(small.loader(name, train=False)) as loader:
        for images, targets, _ in loader.epoch(0):
            stop.check()
            with run.autocast(), torch.no_grad():
                right += int((run.model(images).argmax(dim=1) == targets).sum())
    run.model.train()
    return right, len(part), part.labels.bincount().max().item() / len(part)
