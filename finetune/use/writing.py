"""Predictions, or features, of many images: block by block into a `Sink`, so that a kill does little harm."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config import Choice
from finetune.data import ImageError
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.progress import Bar
from finetune.system.signals import Interrupted, StopSignals
from finetune.use.predictor import BATCH_SIZE, Prediction, Predictor
from finetune.use.record import open_record
from finetune.use.sinks import FileSink, Row, Screen, Sink, paths_of, unreadable_of
from finetune.use.sorting import Sorter

BLOCK = 4096  # images that are written together
BLOCK_S = 5.0  # seconds after which fewer are
UNKNOWN = "unknown"  # the label of an image whose classes are all too improbable
DIGITS = 6  # of a probability in a table


class OnDamage(Choice):
    """How a pass over many images treats one that cannot be read."""

    go = "go"
    stop = "stop"
    skip = "skip"


@dataclass(frozen=True)
class Options:
    """What a command writes of the predictions, and how it takes images: the flags of `predict` and `embed`."""

    top_k: int = 1
    batch_size: int = BATCH_SIZE
    flip: bool = False  # average the probabilities of an image and of its mirror image
    reject: float = 0.0  # below this probability the label is `unknown`
    on_error: OnDamage = OnDamage.go

    def check(self, predictor: Predictor) -> None:
        """Raise a UserError for an option that is out of range, or that would be ignored."""
        if self.top_k < 1 or self.batch_size < 1 or not 0 <= self.reject <= 1:
            raise UserError("expected --top-k and --batch-size of 1 or more, and --reject from 0 to 1")
        if predictor.threshold is None:
            if self.reject and UNKNOWN in predictor.classes:
                raise UserError(f"--reject writes {UNKNOWN}, and a class has this name: leave it out")
            return
        for flag, is_given in (("--top-k", self.top_k > 1), ("--reject", self.reject > 0)):
            if is_given:
                mend = f"its labels are those of a probability from {predictor.threshold:g} on; leave it out"
                raise UserError(f"{flag} would be ignored: this model gives several labels an image, and {mend}")


def columns_of(predictor: Predictor, top_k: int) -> list[str]:
    """The columns of predictions: `path,label,probability`, then `label_2,...`; `path,labels,p:CLASS,...`."""
    if predictor.threshold is not None:
        return ["path", "labels", *(f"p:{name}" for name in predictor.classes)]
    count = min(top_k, len(predictor.classes))
    more = [f"{word}_{rank}" for rank in range(2, count + 1) for word in ("label", "probability")]
    return ["path", "label", "probability", *more]


def row_of(found: Prediction, classes: Sequence[str], reject: float) -> Row:
    """The row of an image under `columns_of`."""
    if found.scores:
        return [found.path, list(found.labels), *(round(found.scores[name], DIGITS) for name in classes)]
    pairs = zip(found.labels, found.probabilities, strict=True)
    cells = [cell for name, value in pairs for cell in (name, round(value, DIGITS))]
    if found.probabilities[0] < reject:
        cells[0] = UNKNOWN
    return [found.path, *cells]


@contextmanager
def opened_sink(
    out: Path | None, columns: Sequence[str], request: Sequence[Any], *, overwrite: bool, is_quiet: bool = False
) -> Iterator[Sink]:
    """The place for rows: a file, which is begun or continued, or the screen; `request` is what rows depend on."""
    if out is None:
        yield Screen(columns, is_quiet=is_quiet)
        return
    beside = [unreadable_of(out), *([paths_of(out)] if out.suffix == ".npy" else [])]
    digest = hashlib.sha256(json.dumps([list(columns), *request]).encode()).hexdigest()
    with open_record(out, beside, digest, overwrite=overwrite) as record:
        yield FileSink(record, out, columns)


def request_of(predictor: Predictor, split: Split, options: Options, what: str) -> list[Any]:
    """What the rows of an output depend on: images, weights and options."""
    names = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    for index in range(len(split)):
        name = split.name_of(index).encode("utf-8", "surrogateescape")
        names.update(len(name).to_bytes(4, "little") + name)
    model = [predictor.checksum, str(predictor.dtype), predictor.threshold, predictor.preprocess.as_dict()]
    shape = [options.top_k, options.batch_size, options.flip, options.reject]
    return [what, names.hexdigest(), len(split), model, list(predictor.classes), shape]


def write_predictions(
    predictor: Predictor, split: Split, options: Options, sink: Sink, *, sorter: Sorter | None = None
) -> None:
    """Predict every image from `sink.first` on, write it, and sort it into its class; see `_write` for errors."""
    batches = predictor.probabilities(
        split,
        batch_size=options.batch_size,
        first=sink.first,
        flip=options.flip,
        on_error=_on_error(sink, options),
    )

    def rows(ids: Sequence[int], values: Tensor) -> Iterator[Row]:
        paths = [split.name_of(index) for index in ids]
        for index, found in zip(ids, predictor.described(paths, values, top_k=options.top_k), strict=True):
            row = row_of(found, predictor.classes, options.reject)
            if sorter is not None:
                labels = [row[1]] if predictor.threshold is None else list(found.labels)
                sorter.put(split, index, labels or [UNKNOWN])
            yield row

    _write(batches, rows, sink, images=len(split), batch_size=options.batch_size, title="predict")
    if sorter is not None:
        sorter.finish()


def write_features(predictor: Predictor, split: Split, options: Options, sink: Sink, *, layer: str) -> None:
    """Compute the features of every image from `sink.first` on, and write them; see `_write` for errors."""
    batches = predictor.features(
        split, layer=layer, batch_size=options.batch_size, first=sink.first, on_error=_on_error(sink, options)
    )

    def rows(ids: Sequence[int], values: Tensor) -> Iterator[Row]:
        return ([split.name_of(index), value] for index, value in zip(ids, values.numpy(), strict=True))

    _write(batches, rows, sink, images=len(split), batch_size=options.batch_size, title="embed")


def _on_error(sink: Sink, options: Options) -> Callable[[int, ImageError], None] | None:
    return None if options.on_error == OnDamage.stop else lambda index, error: sink.lose(error)


def _write(
    batches: Generator[tuple[list[int], Tensor]],
    rows: Callable[[Sequence[int], Tensor], Iterator[Row]],
    sink: Sink,
    *,
    images: int,
    batch_size: int,
    title: str,
) -> None:
    """Put the rows of all batches into `sink`, under a bar.

    Raises:
        ImageError: An image cannot be read, and the pass is to stop there. What was done before is kept.
        Interrupted: A signal asked for a stop. What was done before is kept.
    """
    block = batch_size * max(1, BLOCK // batch_size)
    done = written = sink.first
    began = time.monotonic()
    bar = Bar(title, total=-(-images // batch_size), images=images, start=done // batch_size)
    with StopSignals() as stop, closing(batches):
        try:
            for ids, values in bar.wrap(batches):
                for row in rows(ids, values):
                    sink.add(row)
                done = min(images, (ids[-1] // batch_size + 1) * batch_size)
                is_full = done // block > written // block
                if is_full or (not sink.has_parts and time.monotonic() - began > BLOCK_S):
                    sink.commit(done)
                    written, began = done, time.monotonic()
                if bar.due():
                    bar.show({})
                stop.check()
        except (ImageError, Interrupted):
            if done > written and not sink.has_parts:
                sink.commit(done)
            raise
    if images > written or not images:
        sink.commit(images)
    sink.finish()
