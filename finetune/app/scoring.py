"""Scores outside of the training loop: what the head gives before any step, and the test split at the end."""

import logging
from collections.abc import Iterator
from contextlib import closing

import torch

from finetune.app.build import Run, place
from finetune.config import HeadKind
from finetune.core.fit import validate
from finetune.core.layers import LayeredModel
from finetune.core.loop import Batch, TrainState
from finetune.core.metrics import Meter
from finetune.models.heads.head import find_head
from finetune.models.heads.offsets import set_offsets
from finetune.models.heads.probe import features_of_split, linear_probe
from finetune.prefix.feed import Feed
from finetune.report import scores
from finetune.report.columns import DROPPED_FIRST, bar_texts
from finetune.runs.records import Result
from finetune.runs.saver import Saver
from finetune.runs.weights import put_weights
from finetune.system.errors import UserError
from finetune.system.progress import Bar
from finetune.system.signals import StopSignals

logger = logging.getLogger("finetune")


def _stoppable(batches: Iterator[Batch], stop: StopSignals) -> Iterator[Batch]:
    """The same batches, until a signal asks for a stop."""
    for batch in batches:
        stop.check()
        yield batch


def scored(feed: Feed, title: str, stop: StopSignals, meter: Meter) -> Iterator[Batch]:
    """The batches of a split in order, under a bar with the scores in `meter`, until a signal asks for a stop."""
    bar = Bar(title, total=len(feed), images=feed.num_images)
    for batch in _stoppable(bar.wrap(feed.epoch(0)), stop):
        yield batch
        if bar.due():
            bar.show(bar_texts(meter.running()), dropped_first=DROPPED_FIRST)


def write_scores(run: Run, split: str, meter: Meter) -> None:
    """Write the scores that `meter` holds of a split, class by class, to the run directory."""
    scores.write_scores(run.folder, split, meter.results(), details=meter.details(), classes=run.source.classes)


def prepare_head(run: Run, train: Feed, val: Feed, result: Result, stop: StopSignals) -> None:
    """Score the zero-shot head, fit a linear probe, or set the bias for several labels, whichever the run asks for."""
    head = run.conf.model.head
    if run.built.has_zeroshot:
        meter = run.meter()
        zeroshot = _score(run, run.model, scored(val, "zero-shot", stop, meter), meter)
        result |= {f"zeroshot/{name}": zeroshot[name] for name in run.headlines}
        shown = "  ".join(f"val/{name} {zeroshot[name]:.4f}" for name in run.headlines)
        logger.info("zero-shot, before any training: %s", shown)
    if head == HeadKind.linear_probe:
        _fit_probe(run, result, stop)
    if run.source.is_multilabel and head in (HeadKind.auto, HeadKind.zeroshot, HeadKind.random):
        labels = run.source.splits["train"].labels
        set_offsets(run.model, train.epoch(0), labels, run.autocast(), run.model.boundary)


def _fit_probe(run: Run, result: Result, stop: StopSignals) -> None:
    """Fit the head on the features of training images without augmentation, and log its score."""
    if run.source.is_multilabel:
        raise UserError("model.head=linear_probe is fitted to one label an image; use model.head=random for several")
    train, val = run.loader("train", train=False), run.loader("val", train=False)
    bar = Bar("linear probe", total=len(train), images=train.num_images)
    with closing(train), closing(val):
        passes = [_stoppable(batches, stop) for batches in (bar.wrap(train.epoch(0)), val.epoch(0))]
        features = [features_of_split(run.model, batches, run.autocast()) for batches in passes]
    probe = linear_probe(*features[0], *features[1], num_classes=len(run.source.classes))
    find_head(run.model.net).set(probe.weight, probe.bias)
    result["probe/top1"] = probe.val_top1
    logger.info("linear probe, before fine-tuning: val/top1 %.4f (penalty %g)", probe.val_top1, probe.strength)


def score_test(run: Run, state: TrainState, saver: Saver, feed: Feed, result: Result, stop: StopSignals) -> None:
    """Score the test split with the best epoch's weights, which the model gets, and with the zero-shot model.

    `feed` gives the test images, and is closed at the end.
    """
    with closing(feed):
        if feed.will_fork(0):
            saver.wait()  # a process forked while the saving thread holds a lock would wait for that lock forever
        feed.fill(0)
        if state.best_epoch and (state.best_epoch < state.epoch or state.best_is_ema):
            put_weights(saver.best_weights(state.best_epoch), run.model, run.checkpoints / "best.safetensors")
        # The threshold comes from validation: one picked on the test split would raise the test score.
        meter = run.meter(scores.chosen_threshold(run.folder))
        found = _score(run, run.model, scored(feed, "test", stop, meter), meter)
        result |= {f"test/{name}": value for name, value in found.items()}
        write_scores(run, "test", meter)
        if run.built.has_zeroshot:
            meter = run.meter()
            torch.manual_seed(run.conf.seed)
            # Built anew, since a copy from the start would take memory during the whole run.
            untrained = place(run.built_again("cpu"), run.device, run.dtype)
            zeroshot = _score(run, untrained, scored(feed, "test zero-shot", stop, meter), meter)
            result |= {f"test/zeroshot/{name}": zeroshot[name] for name in run.headlines}


def _score(run: Run, model: LayeredModel, batches: Iterator[Batch], meter: Meter) -> dict[str, float]:
    return validate(model, batches, run.autocast(), meter=meter, start=run.model.boundary)
