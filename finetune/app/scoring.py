"""Scores outside of the training loop: what the head gives before any step, and the test split at the end."""

import logging
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from finetune.app.build import Run
from finetune.config import HeadKind
from finetune.core.fit import validate
from finetune.core.layers import LayeredModel
from finetune.core.loop import Batch, TrainState
from finetune.core.metrics import Meter
from finetune.models.heads.head import find_head
from finetune.models.heads.offsets import set_offsets
from finetune.models.heads.probe import features_of_split, linear_probe
from finetune.models.patches import place
from finetune.prefix.feed import Feed
from finetune.report import scores
from finetune.report.columns import DROPPED_FIRST, bar_texts
from finetune.runs.epoch_files import BEST
from finetune.runs.records import Result
from finetune.runs.saver import Saver
from finetune.runs.weights import put_weights
from finetune.system.errors import UserError
from finetune.system.progress import Bar
from finetune.system.signals import StopSignals

UNCHOSEN_THRESHOLD = 0.5  # of labels that are predicted, where no validation images picked a better one

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


def prepare_head(run: Run, train: Feed, val: Feed | None, stop: StopSignals) -> Result:
    """Score the zero-shot head, fit a linear probe, or set the bias for several labels, whichever the run asks for.

    Returns the scores, for `result.json`.
    """
    head, result = run.conf.model.head, Result()
    if run.built.has_zeroshot and val is not None:
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
    return result


def _fit_probe(run: Run, result: Result, stop: StopSignals) -> None:
    """Fit the head on the features of training images without augmentation, and log its score.

    The penalty is picked on validation images, or where they are few, on training images that a fit leaves out.
    """
    if run.source.is_multilabel:
        raise UserError("model.head=linear_probe is fitted to one label an image; use model.head=random for several")
    has_val = run.source.has("val")
    features, labels = _features(run, "train", stop)
    val = _features(run, "val", stop) if has_val else None
    probe = linear_probe(features, labels, val, num_classes=len(run.source.classes))
    where = "val/top1" if has_val else "top1 of training images that a fit left out,"
    find_head(run.model.net).set(probe.weight, probe.bias)
    result["probe/top1"] = probe.val_top1
    logger.info("linear probe, before fine-tuning: %s %.4f (penalty %g)", where, probe.val_top1, probe.strength)


def _features(run: Run, split: str, stop: StopSignals) -> tuple[Tensor, Tensor]:
    """Features and labels of the images of a split, without augmentation."""
    loader = run.loader(split, train=False)
    bar = Bar(f"linear probe, {split}", total=len(loader), images=loader.num_images)
    with closing(loader):
        return features_of_split(run.model, _stoppable(bar.wrap(loader.epoch(0)), stop), run.autocast())


def score_val(run: Run, state: TrainState, saver: Saver, feed: Feed, stop: StopSignals) -> None:
    """Score the validation images again, class by class, with the best epoch's weights, which the model gets.

    Those who continue a run have only the files of an earlier start for it, and anybody may have changed them since.
    """
    put_weights(saver.best_weights(state.best_epoch)[0], run.model, run.checkpoints / BEST)
    meter = run.meter()
    _score(run, run.model, scored(feed, "validate", stop, meter), meter)
    write_scores(run, "val", meter)


def score_test(run: Run, state: TrainState, saver: Saver, feed: Feed, result: Result, stop: StopSignals) -> None:
    """Score the test split with the best epoch's weights, which the model gets, and with the zero-shot model.

    `feed` gives the test images, and is closed at the end.
    """
    with closing(feed):
        feed.before_workers(saver.pause)
        feed.fill(0)
        # The threshold comes from validation: one picked on the test split would raise the test score. It stands in the
        # file of the weights that it was picked for.
        threshold, is_other = UNCHOSEN_THRESHOLD, state.best_epoch < state.epoch or state.best_is_ema
        if state.best_epoch and (is_other or run.source.is_multilabel):
            tensors, chosen = saver.best_weights(state.best_epoch)
            put_weights(tensors, run.model, run.checkpoints / BEST)
            threshold = UNCHOSEN_THRESHOLD if chosen is None else chosen
        meter = run.meter(threshold)
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
