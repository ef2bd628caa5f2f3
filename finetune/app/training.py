"""The training of a run: `fit` with what happens after each step and each epoch, and every way in which it can end."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from finetune.app.batch_size import out_of_memory
from finetune.app.build import Run
from finetune.app.scoring import scored, write_scores
from finetune.app.utilisation import Utilisation, measure_utilisation
from finetune.core.device import is_out_of_memory
from finetune.core.finite import NotFiniteError, StepRecord
from finetune.core.fit import Row, Validation, fit
from finetune.core.loop import Batch, TrainState
from finetune.core.metrics import Meter
from finetune.data import ImageError
from finetune.prefix.feed import Feed
from finetune.report.columns import DROPPED_FIRST, bar_texts, epoch_line
from finetune.runs import bad_batch
from finetune.runs.history import History
from finetune.runs.records import Result
from finetune.runs.saver import Saver
from finetune.system.errors import UserError
from finetune.system.progress import Bar
from finetune.system.reading import DamagedError
from finetune.system.signals import Interrupted, StopSignals

logger = logging.getLogger("finetune")


def train_to_the_end(
    run: Run, state: TrainState, train: Feed, val: Feed | None, result: Result, stop: StopSignals
) -> Saver:
    """Train until the last epoch, and return the saver; its last save may still be under way.

    Without `val` the last epoch is the best. However training ends, `result` gets the best epoch's scores.

    Raises:
        Interrupted: A signal asked for a stop; the state is saved.
        NotFiniteError: Training diverged; the weights from before the step are saved.
    """
    training = _Training(run, state, train, val, stop)
    with training.ending(result):
        is_finished = fit(
            state,
            run.conf.train,
            train_batches=training.train_batches,
            validation=training.validation,
            on_step_end=training.on_step_end,
            on_epoch_end=training.on_epoch_end,
        )
        if not is_finished:
            stop.check()
        if not training.is_saved:
            training.save_epoch(always=True)
    return training.saver


class _Training:
    """What `fit` calls after each step and each epoch; it shares the saver, the history and the progress bar."""

    def __init__(self, run: Run, state: TrainState, train: Feed, val: Feed | None, stop: StopSignals) -> None:
        self.run, self.state, self.train, self.stop = run, state, train, stop
        self.saver = Saver(
            run.checkpoints,
            run.metadata(),
            run.notes,
            keep=run.conf.train.keep,
            max_share=run.conf.train.max_save_share,
            best_epoch=state.best_epoch,
            written=run.written,
        )
        self.validation: Validation | None = None
        train.before_workers(self.saver.pause)
        if val is not None:
            val.before_workers(self.saver.pause)
            batches = partial(self.val_batches, val)
            self.validation = Validation(batches, run.meter(), run.meter(), run.monitor)
        self.history = History(run.folder / "history.jsonl")
        self.saver.rows, self.saver.safe_step = self.history.rows(), state.step
        self.is_saved = True  # whether the latest epoch is
        self.speed: dict[str, float] = {}  # from `Feed.stats`, of the latest training epoch
        self.gpu: Utilisation | None = None
        if run.device.type == "cuda":
            size = run.built.preprocess.size
            self.gpu = measure_utilisation(run.built_again("meta"), size, device=run.device, dtype=run.dtype)

    def train_batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of a training epoch without the first `skip`, under a progress bar."""
        self.train.fill(epoch)
        title = f"train {epoch + 1}/{self.run.conf.train.epochs}"
        self.bar = Bar(title, total=len(self.train), images=self.train.num_images, start=skip)
        yield from self.bar.wrap(self.train.epoch(epoch, skip))
        self.speed = self.train.stats()

    def val_batches(self, val: Feed, meter: Meter) -> Iterator[Batch]:
        """The validation batches, under a progress bar that shows `meter`."""
        return scored(val, "validate", self.stop, meter)

    def on_step_end(self, state: TrainState) -> bool:
        """Update the bar and save where a save is due; True where a signal asked for a stop."""
        if self.bar.due():
            numbers = bar_numbers(state, self.bar, self.train, self.gpu)
            self.bar.show(bar_texts(numbers), dropped_first=DROPPED_FIRST)
        self.log_skipped_steps()
        self.saver.check()
        conf = self.run.conf.train
        by_steps = conf.save_every_steps > 0 and state.step % conf.save_every_steps == 0
        if by_steps or 0 < conf.save_every_minutes <= self.saver.minutes_since:
            self.saver.save(state)
        return self.stop.is_set

    def on_epoch_end(self, state: TrainState, row: Row) -> None:
        """Write the epoch into the history and the log, and save it where a save is due."""
        self.log_skipped_steps()  # the guard has looked at the epoch's last steps only now
        row |= self.speed
        if self.gpu is not None:
            row["mfu"] = self.gpu.share(float(str(row["images_per_s"])), self.speed.get("prefix_hits", 0.0))
        self.history.append(row)
        epochs, monitor = self.run.conf.train.epochs, self.run.monitor
        best = None if math.isnan(state.best_score) else state.best_score
        logger.info("%s", epoch_line(row, epochs, best=best, best_epoch=state.best_epoch, monitor=monitor))
        if state.epoch == 1 and "train.epochs" in self.run.conf.chosen:
            about = "%d epochs like this take about %.0f s; train.epochs=N sets another number"
            logger.info(about, epochs, epochs * float(str(row["seconds"])))
        if state.best_epoch == state.epoch and self.validation is not None:
            write_scores(self.run, "val", self.validation.ema_meter if state.best_is_ema else self.validation.meter)
        is_stopping = self.stop.is_set  # read once, since a signal may come during the save
        self.save_epoch(always=is_stopping)  # before a stop always: no later save will hold this epoch's weights
        if is_stopping:
            self.stop.check()

    def save_epoch(self, *, always: bool) -> None:
        """Save the epoch just finished; unless `always`, not too soon after a save or before the end of the run."""
        state, rows, monitor, saver = self.state, self.history.rows(), self.run.monitor, self.saver
        left_s = (self.run.conf.train.epochs - state.epoch) * float(rows[-1]["seconds"])
        thresholds: tuple[float | None, float | None] = (None, None)
        if self.validation is not None:
            meters = self.validation.meter, self.validation.ema_meter
            thresholds = meters[0].threshold(), None if state.ema is None else meters[1].threshold()
        self.is_saved = saver.save_epoch(state, rows, monitor, thresholds=thresholds, left_s=left_s, always=always)

    @contextmanager
    def ending(self, result: Result) -> Iterator[None]:
        """However training ends: save what can be saved, and put the best epoch's scores into `result`."""
        run, state, saver = self.run, self.state, self.saver
        try:
            yield
        except Interrupted:
            logger.info("stopped at step %d; %s", state.step, self._save_now())
            raise
        except ImageError as error:  # a file that was good when the run began
            raise _going_on(error, self._save_now()) from error
        except DamagedError as error:  # a downloaded shard
            raise _going_on(error, self._save_now()) from error
        except NotFiniteError as error:
            kept = "checkpoints/last.safetensors holds the weights from before it"
            try:
                saver.save_weights(state)
            except (OSError, UserError) as failed:
                kept = f"the weights from before it are not saved: {failed}"
            error.args = (self._diverged(error, kept),)
            raise
        except Exception as error:
            saver.wait_after_error()  # for a save that is under way
            if is_out_of_memory(error):
                raise UserError(out_of_memory(run, step=state.step)) from error
            raise
        finally:
            result |= _best_scores(state, self.history.readable_rows())
            result["seconds_saving"] = round(saver.stalled_s, 3)

    def _save_now(self) -> str:
        """Save the state, and say where it goes on; a failed save is told too: it must not hide why the run ends."""
        state = self.state
        try:
            self.saver.save(state)
            self.log_skipped_steps()
            self.saver.wait()
        except (OSError, UserError, NotFiniteError) as error:
            logger.error("%s", error)
            return f"the state of this step is not saved: {error}"
        return f"the state is saved: continue at step {state.step} with resume={self.run.folder}"

    def log_skipped_steps(self) -> None:
        """Store and log each step that was skipped because it was not finite."""
        for record in self.state.guard.take():
            logger.warning("%s. The step is skipped", self._store_bad_batch(record))

    def _store_bad_batch(self, record: StepRecord) -> str:
        """Store the batch of a step that was not finite; returns epoch, step, rates and images in words."""
        run, shown = self.run, bad_batch.shown_names
        names = [run.source.splits["train"].name_of(int(index)) for index in record.ids]
        rates = {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}
        logger.debug("images of step %d: %s", record.step, shown(names, len(names)))
        try:
            path = bad_batch.store(run.folder, record, run.window(record.epoch, record.batch), names=names, rates=rates)
            stored = f"stored in {path}" if path else f"not stored, since {bad_batch.MAX_STORED} batches are already"
        except (OSError, UserError) as error:  # the disk is full, or an image is gone: the step is the worse news
            stored = f"not stored: {error}"
        return (
            f"the loss or the gradient norm was not finite in epoch {record.epoch + 1}, step {record.step}, rates"
            f" {min(rates.values()):.3g} to {max(rates.values()):.3g}. Its images: {shown(names)}; {stored}"
        )

    def _diverged(self, error: NotFiniteError, kept: str) -> str:
        """The message of a run that diverged, after all bad batches are stored; `kept` says what is saved of it."""
        texts = [self._store_bad_batch(record) for record in self.state.guard.take()]
        limit = " That is one step more than train.max_nonfinite lets pass." if error.limit else ""
        return (
            f"{texts[-1]} (all in run.log).{limit} The update was not applied: {kept}."
            f" Lower optim.lr, add sched.warmup, or look at these images: finetune replay"
            f" {self.run.folder}"
        )


def _going_on(error: ImageError | DamagedError, how: str) -> UserError:
    """The error of an image, or of a downloaded shard, with the words for going on without it, or with it mended."""
    if isinstance(error, ImageError):
        return ImageError(error.path, f"{error.reason}; {how}, without the image by data.on_error=skip")
    return DamagedError(f"{error}; {how}")


@contextmanager
def outside_of_training(folder: Path, what: str) -> Iterator[None]:
    """Let the error of an image that is read before or after training say how the run in `folder` goes on.

    `what` is what has been saved, in a few words.
    """
    try:
        yield
    except (ImageError, DamagedError) as error:
        raise _going_on(error, f"{what}: continue with resume={folder}") from error


def bar_numbers(state: TrainState, bar: Bar, feed: Feed, gpu: Utilisation | None) -> dict[str, float]:
    """The numbers for the progress bar, by their keys in `history.jsonl`. Reading the means waits for the device."""
    shown = {**state.sums.means(), "lr": state.optimizer.param_groups[-1]["lr"], **feed.stats()}
    if gpu is not None and bar.images_per_s:  # its time does not hold the filling of the cache
        shown["mfu"] = gpu.share(bar.images_per_s, float(feed.is_cached))
    return shown


def _best_scores(state: TrainState, rows: list[dict[str, Any]]) -> Result:
    """How long a run trained, and the scores of its best epoch as `val/...`, of its weights or of their averages."""
    found: Result = {"epochs": state.epoch, "steps": state.step, "best_epoch": state.best_epoch}
    found["seconds"] = round(state.seconds, 3)
    row = rows[state.best_epoch - 1] if 0 < state.best_epoch <= len(rows) else {}
    prefix = "val_ema/" if state.best_is_ema else "val/"
    found |= {f"val/{name.removeprefix(prefix)}": value for name, value in row.items() if name.startswith(prefix)}
    if state.ema is not None:
        found["best_weights"] = "ema" if state.best_is_ema else "raw"
    return found
