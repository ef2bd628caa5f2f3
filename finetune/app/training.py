"""The training of a run: `fit` with what happens after a step and after an epoch, and every way out of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune.app import utilisation
from finetune.app.batch_size import out_of_memory
from finetune.app.build import Run
from finetune.config import TrainConf
from finetune.core.device import is_out_of_memory
from finetune.core.finite import NotFiniteError, StepRecord
from finetune.core.fit import Row, Validation, fit
from finetune.core.loop import Batch, TrainState
from finetune.core.metrics import Meter
from finetune.data import ImageError
from finetune.prefix import Feed
from finetune.report import scores
from finetune.report.columns import DROPPED_FIRST, bar_texts, epoch_line
from finetune.runs import bad_batch
from finetune.runs.earlier import Result
from finetune.runs.history import History
from finetune.runs.saver import Saver
from finetune.system.errors import UserError
from finetune.system.progress import Bar
from finetune.system.signals import Interrupted, StopSignals

logger = logging.getLogger("finetune")


def train_to_the_end(run: Run, state: TrainState, train: Feed, val: Feed, result: Result, stop: StopSignals) -> Saver:
    """Run `fit` with this application's two seams: what happens after a step, and after an epoch.

    Returns:
        Who saves; the last save may still be under way.
    """
    conf, history = run.conf, History(run.folder / "history.jsonl")
    bar = Bar("", total=0, images=0)
    fed: dict[str, float] = {}
    gpu = utilisation.measure(run) if run.device.type == "cuda" else None
    saver, is_saved = _saver(run, state.best_epoch), True

    def train_batches(epoch: int, skip: int) -> Iterator[Batch]:
        nonlocal bar
        if train.will_fork(epoch):
            saver.wait()  # no process is forked while another thread holds who knows what
        train.fill(epoch)
        bar = Bar(f"train {epoch + 1}/{conf.train.epochs}", total=len(train), images=train.num_images, start=skip)
        return _noted(bar.wrap(train.epoch(epoch, skip)), train, fed)

    def val_batches(meter: Meter) -> Iterator[Batch]:
        if val.will_fork(0):
            saver.wait()
        return scored(val, "validate", stop, meter)

    validation = Validation(val_batches, run.meter(), run.meter(), ranked_by(run))

    def on_step_end(state: TrainState) -> bool:
        if bar.due():
            bar.show(bar_texts(_shown(state, bar, train, gpu)), dropped_first=DROPPED_FIRST)
        _tell_skipped(run, state)
        saver.check()
        if _is_save_due(conf.train, state, saver):
            saver.save(state)
        return stop.is_set

    def on_epoch_end(state: TrainState, row: Row) -> None:
        nonlocal is_saved
        _tell_skipped(run, state)  # what the last look of the epoch has found
        row |= {**fed, **_mfu(row, fed, gpu)}
        history.append(row)
        _tell(run, state, validation, row)
        # Where a stop was asked for as an epoch, too: there may be no other one to write these weights.
        stopping = stop.is_set
        is_saved = _save_epoch(run, state, saver, validation, history.rows(), always=stopping)
        if stopping:
            stop.check()

    with _way_out(run, state, saver, result):
        finished = fit(
            state,
            conf.train,
            train_batches=train_batches,
            validation=validation,
            on_step_end=on_step_end,
            on_epoch_end=on_epoch_end,
        )
        if not finished:
            stop.check()
        if not is_saved:
            _save_epoch(run, state, saver, validation, history.rows(), always=True)
    return saver


def _saver(run: Run, best_epoch: int) -> Saver:
    keep, share = run.conf.train.keep, run.conf.train.max_save_share
    metadata, notes = run.metadata(), run.notes()
    return Saver(run.checkpoints, metadata, notes, keep=keep, max_share=share, best_epoch=best_epoch)


def _save_epoch(
    run: Run, state: TrainState, saver: Saver, validation: Validation, rows: list[dict[str, Any]], *, always: bool
) -> bool:
    """Save the epoch just finished, the last of `rows`; False where it is too soon for that, or too near the end."""
    left_s = (run.conf.train.epochs - state.epoch) * float(rows[-1]["seconds"])
    # Validation has just chosen the thresholds of the weights and of their averages.
    thresholds = validation.meter.threshold(), None if state.ema is None else validation.ema_meter.threshold()
    return saver.save_epoch(state, rows, validation.monitor, thresholds=thresholds, left_s=left_s, always=always)


def _tell(run: Run, state: TrainState, validation: Validation, row: Row) -> None:
    """The epoch in a line, and where it is the best one its scores class by class."""
    best = None if math.isnan(state.best_score) else state.best_score
    epochs = run.conf.train.epochs
    logger.info("%s", epoch_line(row, epochs, best=best, best_epoch=state.best_epoch, monitor=run.monitor))
    if state.best_epoch == state.epoch:
        write_scores(run, "val", validation.ema_meter if state.best_is_ema else validation.meter)


def _noted(batches: Iterator[Batch], feed: Feed, into: dict[str, float]) -> Iterator[Batch]:
    """The same batches; how they were come by is noted at their end."""
    yield from batches
    into |= feed.stats()


def _mfu(row: Row, fed: Mapping[str, float], gpu: utilisation.Utilisation | None) -> Row:
    """How much of a GPU the epoch used."""
    return {} if gpu is None else {"mfu": gpu.share(float(str(row["images_per_s"])), fed.get("prefix_hits", 0.0))}


def _shown(state: TrainState, bar: Bar, feed: Feed, gpu: utilisation.Utilisation | None) -> dict[str, float]:
    """The numbers for the progress bar, by their keys in `history.jsonl`; the means first: they wait for the device."""
    shown = {**state.sums.means(), "lr": state.optimizer.param_groups[-1]["lr"], **feed.stats()}
    speed = bar.images_per_s
    if gpu is not None and speed:
        shown["mfu"] = gpu.share(speed, float(feed.is_cached))  # the bar begins behind what was computed for it
    return shown


@contextmanager
def _way_out(run: Run, state: TrainState, saver: Saver, result: Result) -> Iterator[None]:
    """However training ends: what can be saved is saved, and the result says how far it came."""
    try:
        yield
    except Interrupted:
        saver.save(state)
        _tell_skipped(run, state)  # what the last looks have found
        saver.wait()
        logger.info("stopped at step %d, and saved; continue with resume=%s", state.step, run.folder)
        raise
    except ImageError as error:  # a file that went bad since the check
        saver.save(state)
        saver.wait()
        again = f"continue at step {state.step} with resume={run.folder}, without it by data.on_error=skip"
        raise ImageError(error.path, f"{error.reason}; the state is saved: {again}") from error
    except NotFiniteError as error:
        saver.save_weights(state)
        error.args = (_not_finite(error, run, state),)
        raise
    except Exception as error:
        try:
            saver.wait()  # for a save that is under way
        except OSError as failed:
            logger.error("%s", failed)  # beside what is told anyway
        if is_out_of_memory(error):
            raise UserError(out_of_memory(run, step=state.step)) from error
        raise
    finally:
        result |= _best_scores(state, History(run.folder / "history.jsonl").rows())
        result["seconds_saving"] = round(saver.stalled_s, 3)


def _tell_skipped(run: Run, state: TrainState) -> None:
    for record in state.guard.take():
        logger.warning("%s. The step is skipped", _store_bad_batch(run, state, record))


def _is_save_due(train: TrainConf, state: TrainState, saver: Saver) -> bool:
    """Whether to save in the middle of an epoch."""
    by_steps = train.save_every_steps > 0 and state.step % train.save_every_steps == 0
    return by_steps or 0 < train.save_every_minutes <= saver.minutes_since


def ranked_by(run: Run) -> str:
    """The metric that picks the best epochs."""
    monitor = run.conf.train.monitor
    return run.monitor if monitor == "auto" else monitor


def _best_scores(state: TrainState, rows: list[dict[str, Any]]) -> Result:
    """How far training came, and what validation gave for the best epoch: `val/...` of whichever weights were kept."""
    found: Result = {"epochs": state.epoch, "best_epoch": state.best_epoch, "seconds": round(state.seconds, 3)}
    row = rows[state.best_epoch - 1] if 0 < state.best_epoch <= len(rows) else {}
    prefix = "val_ema/" if state.best_is_ema else "val/"
    found |= {f"val/{name.removeprefix(prefix)}": value for name, value in row.items() if name.startswith(prefix)}
    if state.ema is not None:
        found["best_weights"] = "ema" if state.best_is_ema else "raw"
    return found


def _store_bad_batch(run: Run, state: TrainState, record: StepRecord) -> str:
    """Put the batch of a step that was not finite into the run directory; what a person needs to find the cause."""
    names = [run.source.splits["train"].name_of(int(index)) for index in record.ids]
    rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    path = bad_batch.store(run.folder, record, run.window(record.epoch, record.batch), names=names, rates=rates)
    logger.debug("images of step %d: %s", record.step, bad_batch.shown_names(names, len(names)))
    where = f"; stored in {path}" if path else f"; {bad_batch.MAX_STORED} batches are stored already, this one is not"
    return (
        f"the loss or the gradient norm was not finite in epoch {record.epoch + 1}, step {record.step}, rates"
        f" {min(rates.values()):.3g} to {max(rates.values()):.3g}. Its images: {bad_batch.shown_names(names)}{where}"
    )


def _not_finite(error: NotFiniteError, run: Run, state: TrainState) -> str:
    """The last line of a run that diverged; every bad batch that the host has just learned of is stored."""
    texts = [_store_bad_batch(run, state, record) for record in state.guard.take()]
    limit = " That is one step more than train.max_nonfinite lets pass." if error.limit else ""
    return (
        f"{texts[-1]} (all in run.log).{limit} The update was not applied: checkpoints/last.safetensors holds the"
        f" weights from before it. Lower optim.lr, add sched.warmup, or look at these images: finetune replay"
        f" {run.folder}"
    )


def stoppable(batches: Iterator[Batch], stop: StopSignals) -> Iterator[Batch]:
    """The same batches, until a signal asks for a stop."""
    for batch in batches:
        stop.check()
        yield batch


def scored(loader: Feed, title: str, stop: StopSignals, meter: Meter) -> Iterator[Batch]:
    """A split's batches in order, under a bar that shows how `meter` finds them, until a signal asks for a stop."""
    bar = Bar(title, total=len(loader), images=loader.num_images)
    for batch in stoppable(bar.wrap(loader.epoch(0)), stop):
        yield batch
        if bar.due():
            bar.show(bar_texts(meter.running()), dropped_first=DROPPED_FIRST)


def write_scores(run: Run, split: str, meter: Meter) -> None:
    """What `meter` has measured on a split, class by class, to the run directory."""
    scores.write_scores(run.folder, split, meter.results(), details=meter.details(), classes=run.source.classes)
