"""One run, in the order in which things happen: the only module that sees everything.

The run directory that it leaves: `config.yaml`, `run.log`, `history.jsonl`, `rates.json`, `result.json`, `lr.png`,
`curves.png`, `metrics.json`, the confusion matrices and `checkpoints/`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune import checkpoint, recipe, report, scores
from finetune.config import Conf, as_dict, measured_metrics
from finetune.data import ImageError, Loader, SkippedList, Source, check_at_start, open_source
from finetune.data.mix import Mixer
from finetune.device import autocast, make_deterministic, pick_device, pick_precision
from finetune.ema import Ema
from finetune.files import write_text
from finetune.layers import LayeredModel, freeze
from finetune.log import Bar, History, epoch_line, start_log, stop_log, table, write_json
from finetune.loop import Batch, NotFiniteError, Row, Task, TrainState, fit, validate
from finetune.losses import build_criterion
from finetune.metrics import Meter, build_meter
from finetune.models import BuiltModel, build_model
from finetune.optim import build_optimizer
from finetune.plan import layer_rows, planned_rates
from finetune.sched import create_scheduler
from finetune.signals import Interrupted, StopSignals

logger = logging.getLogger("finetune")
Result = dict[str, Any]

# Files by which a folder is known to hold a run.
OWN_FILES = ("config.yaml", "history.jsonl", "result.json", "rates.json", "run.log", "checkpoints")


def run(conf: Conf, run_dir: Path, overrides: list[str], quiet: bool = False) -> Result:
    """Fine-tune as `conf` says and leave everything in `run_dir`; what `result.json` holds.

    A folder that already holds this very run is continued, or left alone where it has finished.

    Args:
        conf: A configuration that `finetune.config.validate` found no fault with.
        run_dir: Exists and is empty, or holds a run.
        overrides: The command line's own words, for the record.
        quiet: No console output.

    Raises:
        ValueError: A user's mistake that only model, data or the folder could show.
        NotFiniteError: Training diverged; `result.json` says `diverged`.
        Interrupted: A signal asked for a stop; the state is saved.
    """
    earlier = _claim(run_dir, conf)
    if earlier is not None and earlier["status"] == "finished":
        print(
            f"{run_dir} holds this very run, and it has finished: nothing to do. Its result: {run_dir / 'result.json'}"
        )
        return earlier
    start_log(run_dir, quiet=quiet)
    result: Result = {
        "status": "running",
        "error": None,
        "overrides": overrides,
        "seed": conf.seed,
        "resumed_at": earlier["resumed_at"] if earlier else [],
    }
    try:
        write_text(run_dir / "config.yaml", yaml.safe_dump(as_dict(conf), sort_keys=False, allow_unicode=True))
        write_json(run_dir / "result.json", result)
        with StopSignals() as stop:
            _fine_tune(conf, run_dir, result, stop)
        result["status"] = "finished"
        _log_close(run_dir, result)
    except BaseException as error:
        result["status"], result["error"] = _outcome(error)
        logger.debug("the run ended early", exc_info=error)
        raise
    finally:
        write_json(run_dir / "result.json", result)
        stop_log()
    return result


def _claim(run_dir: Path, conf: Conf) -> Result | None:
    """What an earlier start of this same run left as its result, or None in a fresh folder.

    Raises:
        ValueError: The folder holds a run of another configuration, or files that a run would overwrite.
    """
    config_path, result_path = run_dir / "config.yaml", run_dir / "result.json"
    found = [name for name in OWN_FILES if (run_dir / name).exists()]
    if not found:
        return None
    if not config_path.exists():
        raise ValueError(
            f"{run_dir} has {', '.join(found)} but no config.yaml, so it is no run of finetune: choose another folder"
        )
    before, now = yaml.safe_load(config_path.read_text(encoding="utf-8")), as_dict(conf)
    differences = list(_differences(before, now))
    if differences:
        raise ValueError(
            f"{run_dir} holds a run of another configuration ({'; '.join(differences)});"
            " nothing was changed: choose another folder, or start with the same settings to continue it"
        )
    if not result_path.exists():
        return {"status": "interrupted", "resumed_at": []}
    earlier: Result = json.loads(result_path.read_text(encoding="utf-8"))
    return earlier


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key}: {before} -> {now}"


def _outcome(error: BaseException) -> tuple[str, str]:
    """(status, error) of a run that ended early."""
    if isinstance(error, NotFiniteError):
        return "diverged", str(error)
    if isinstance(error, Interrupted):
        return "interrupted", f"stopped by {error.signal_name}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by Ctrl-C"
    return "failed", f"{error}" or type(error).__name__


@dataclass
class _Parts:
    """What a run is made of, once built."""

    conf: Conf
    run_dir: Path
    source: Source
    built: BuiltModel
    device: torch.device
    dtype: torch.dtype
    metrics: tuple[str, ...]
    monitor: str

    @property
    def model(self) -> LayeredModel:
        """The model that learns."""
        return self.built.model

    @property
    def headlines(self) -> list[str]:
        """The metrics that a zero-shot model is judged by: top1 and what picks the best epoch."""
        return list(dict.fromkeys(["top1", self.monitor.removeprefix("val/")]))

    @property
    def checkpoints(self) -> Path:
        """Where weights and states go."""
        return self.run_dir / "checkpoints"

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        return autocast(self.dtype, self.device)

    def meter(self, threshold: float | None = None) -> Meter:
        """A fresh meter; its loss is that of training without smoothing and class weights."""
        is_multilabel = self.source.is_multilabel
        losses = build_criterion(self.conf.train, is_multilabel=is_multilabel)
        return build_meter(
            lambda logits, targets: losses(logits, targets, 0.0),
            self.metrics,
            is_multilabel=is_multilabel,
            threshold=threshold,
        )

    def task(self) -> Task:
        """What the model learns by, and what picks the best epoch."""
        weights = self.source.class_weights
        criterion = build_criterion(
            self.conf.train,
            is_multilabel=self.source.is_multilabel,
            class_weights=None if weights is None else weights.to(self.device),
        )
        return Task(criterion, self.meter(), self.monitor, ema_meter=self.meter())

    def loader(self, split: str, *, train: bool) -> Loader:
        """Batches of a split: shuffled and augmented, or in order and plain."""
        return Loader(
            self.source.splits[split],
            self.built.preprocess,
            conf=self.conf.data,
            augment=self.conf.augment if train else None,
            seed=self.conf.seed,
            device=self.device,
            on_skip=SkippedList(self.run_dir).add,
        )

    def metadata(self) -> dict[str, str]:
        """What travels with the weights."""
        return checkpoint.weights_metadata(self.source.classes, self.built.preprocess, as_dict(self.conf.model))


def _fine_tune(conf: Conf, run_dir: Path, result: Result, stop: StopSignals) -> None:
    """Build, train, test, draw; fills `result`."""
    if conf.deterministic:
        make_deterministic()
    device = pick_device(conf.device)
    dtype = pick_precision(conf.precision, device)
    source = check_at_start(open_source(conf.data), conf.data, run_dir)
    metrics, monitor = measured_metrics(conf.train, is_multilabel=source.is_multilabel)
    torch.manual_seed(conf.seed)
    built = build_model(conf.model, source.classes)
    built.model.to(device)
    parts = _Parts(conf, run_dir, source, built, device, dtype, metrics, monitor)
    logger.info("model: %s", built.description)
    logger.info("data: %s", source.description)
    logger.info("computing on %s in %s; this run: %s", device, str(dtype).removeprefix("torch."), run_dir)

    train, val = parts.loader("train", train=True), parts.loader("val", train=False)
    if built.has_zeroshot:
        zeroshot = _evaluate(parts, val, "zero-shot", stop, meter=parts.meter())
        result |= {f"zeroshot/{name}": zeroshot[name] for name in parts.headlines}
        shown = "  ".join(f"val/{name} {zeroshot[name]:.4f}" for name in parts.headlines)
        logger.info("zero-shot, before any training: %s", shown)
    state = _start(parts, len(train))
    _write_plan(parts, state, steps_per_epoch=recipe.steps_per_epoch(conf, len(train)))
    notice = recipe.batch_notice(conf)
    if notice is not None:
        logger.warning("%s", notice)
    _resume(parts, state, result)
    stop.check()
    try:
        _train(parts, state, train, val, result, stop)
    finally:
        train.close()
        val.close()
    _test(parts, state, result, stop)
    report.plot_rates(run_dir)
    write_json(run_dir / "result.json", {**result, "status": "finished"})
    report.plot_curves(run_dir)


def _start(parts: _Parts, batches_per_epoch: int) -> TrainState:
    """Freeze, then the optimizer, then its schedule: the order matters (see `layers.freeze`)."""
    conf, model = parts.conf, parts.model
    freeze(model, conf.optim.fix_layer)
    optimizer = build_optimizer(model, recipe.scaled_optim(conf))
    steps = recipe.steps_per_epoch(conf, batches_per_epoch)
    scheduler = create_scheduler(recipe.timed_sched(conf.sched, steps), optimizer, recipe.num_units(conf, steps))
    scaler = torch.amp.GradScaler(parts.device.type, enabled=parts.dtype == torch.float16)
    parts.checkpoints.mkdir(exist_ok=True)
    # Dropout draws from here on: not from wherever building the model left the generator.
    torch.manual_seed(conf.seed)
    state = TrainState.start(model, optimizer, scheduler, scaler)
    state.task = parts.task()
    if conf.train.ema:
        state.ema = Ema(model, conf.train.ema, warmup=conf.train.ema_warmup)
    return state


def _write_plan(parts: _Parts, state: TrainState, steps_per_epoch: int) -> None:
    """Print the table of layers, and write every layer's planned rate."""
    rows = layer_rows(parts.model, parts.conf)
    logger.info("%s", table(rows, columns=list(rows[0])))
    learning = sum(row["parameters"] for row in rows if row["state"] == "learns")
    logger.info(
        "%s of %s parameters learn, in %d groups; weight decay spares biases, norms, tokens and positions",
        f"{learning:,}",
        f"{sum(row['parameters'] for row in rows):,}",
        len(state.optimizer.param_groups),
    )
    write_json(parts.run_dir / "rates.json", planned_rates(parts.model, parts.conf, steps_per_epoch))


def _resume(parts: _Parts, state: TrainState, result: Result) -> None:
    """Continue from `last.pt` where there is one, with the history cut back to it."""
    path = parts.checkpoints / "last.pt"
    if path.exists():
        checkpoint.load_state(path, state)
        result["resumed_at"] = [*result["resumed_at"], state.step]
        logger.info("resumed at step %d (epoch %d, batch %d)", state.step, state.epoch + 1, state.batch)
    History(parts.run_dir / "history.jsonl").cut(state.epoch)


def _train(parts: _Parts, state: TrainState, train: Loader, val: Loader, result: Result, stop: StopSignals) -> None:
    """Run `fit` with this application's two seams: what happens after a step, and after an epoch."""
    conf, history = parts.conf, History(parts.run_dir / "history.jsonl")
    bar = Bar("", total=0, images=0)
    mixer = Mixer(conf.augment, num_classes=len(parts.source.classes), seed=conf.seed)

    def train_batches(epoch: int, skip: int) -> Iterator[Batch]:
        nonlocal bar
        bar = Bar(f"train {epoch + 1}/{conf.train.epochs}", total=len(train), images=train.num_images, start=skip)
        return mixer.wrap(bar.wrap(train.epoch(epoch, skip)), epoch, skip)

    def val_batches(epoch: int) -> Iterator[Batch]:
        return _stoppable(Bar("validate", total=len(val), images=val.num_images).wrap(val.epoch(0)), stop)

    def on_step_end(state: TrainState) -> bool:
        if bar.due():
            head = state.optimizer.param_groups[-1]
            bar.set(**state.sums.means(), lr=head["lr"])
        if conf.train.save_every_steps and state.step % conf.train.save_every_steps == 0:
            checkpoint.save_state(parts.checkpoints / "last.pt", state)
        return stop.is_set

    def on_epoch_end(state: TrainState, row: Row) -> None:
        history.append(row)
        best = None if math.isnan(state.best_score) else state.best_score
        line = epoch_line(row, conf.train.epochs, best=best, best_epoch=state.best_epoch, monitor=parts.monitor)
        logger.info("%s", line)
        if state.best_epoch == state.epoch:
            _save_best(parts, state)
        checkpoint.save_weights(parts.checkpoints / "last.safetensors", state.model, parts.metadata())
        checkpoint.save_state(parts.checkpoints / "last.pt", state)
        stop.check()

    try:
        finished = fit(
            state,
            conf.train,
            train_batches=train_batches,
            val_batches=val_batches,
            interval=conf.sched.interval,
            autocast=parts.autocast(),
            on_step_end=on_step_end,
            on_epoch_end=on_epoch_end,
        )
        if not finished:
            stop.check()
    except Interrupted:
        checkpoint.save_state(parts.checkpoints / "last.pt", state)
        logger.info(
            "stopped at step %d; the same command with hydra.run.dir=%s continues it", state.step, parts.run_dir
        )
        raise
    except ImageError as error:  # a file that went bad since the check
        checkpoint.save_state(parts.checkpoints / "last.pt", state)
        again = f"the same command with hydra.run.dir={parts.run_dir} continues at step {state.step}"
        raise ImageError(error.path, f"{error.reason}; the state is saved: {again}") from error
    except NotFiniteError as error:
        checkpoint.save_weights(parts.checkpoints / "last.safetensors", state.model, parts.metadata())
        error.args = (_name_bad_batch(error, parts, state),)
        raise
    finally:
        result |= _best_scores(state, history.rows())


def _best_scores(state: TrainState, rows: list[dict[str, Any]]) -> Result:
    """How far training came, and what validation gave for the best epoch: `val/...` of whichever weights were kept."""
    found: Result = {"epochs": state.epoch, "best_epoch": state.best_epoch, "seconds": round(state.seconds, 3)}
    row = rows[state.best_epoch - 1] if state.best_epoch else {}
    prefix = "val_ema/" if state.best_is_ema else "val/"
    found |= {f"val/{name.removeprefix(prefix)}": value for name, value in row.items() if name.startswith(prefix)}
    if state.ema is not None:
        found["best_weights"] = "ema" if state.best_is_ema else "raw"
    return found


def _save_best(parts: _Parts, state: TrainState) -> None:
    """Keep what the best epoch was scored with: the weights, or their averages."""
    swapped = state.ema.swapped_in() if state.ema is not None and state.best_is_ema else nullcontext()
    with swapped:
        checkpoint.save_weights(parts.checkpoints / "best.safetensors", state.model, parts.metadata())
    _write_scores(parts, "val", state.task.ema_meter if state.best_is_ema else state.task.meter)


def _name_bad_batch(error: NotFiniteError, parts: _Parts, state: TrainState) -> str:
    """What a person needs to find the cause: the batch, by its files, and the rates."""
    names = [parts.source.splits["train"].name_of(index) for index in error.ids]
    rates = [group["lr"] for group in state.optimizer.param_groups]
    return (
        f"{error}, rates {min(rates):.3g} to {max(rates):.3g}. The update was not applied: checkpoints/last.safetensors"
        f" holds the weights from before it. Its images: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        " (all in run.log). Lower optim.lr, add sched.warmup, or look at these images"
    )


def _stoppable(batches: Iterator[Batch], stop: StopSignals) -> Iterator[Batch]:
    """The same batches, until a signal asks for a stop."""
    for batch in batches:
        stop.check()
        yield batch


def _evaluate(
    parts: _Parts, loader: Loader, title: str, stop: StopSignals, *, meter: Meter, model: LayeredModel | None = None
) -> dict[str, float]:
    """Score `model`, by default the one that learns, on a split."""
    bar = Bar(title, total=len(loader), images=loader.num_images)
    return validate(model or parts.model, _stoppable(bar.wrap(loader.epoch(0)), stop), parts.autocast(), meter)


def _write_scores(parts: _Parts, split: str, meter: Meter) -> None:
    """What `meter` has measured on a split, class by class, to the run directory."""
    scores.write_scores(parts.run_dir, split, meter.results(), details=meter.details(), classes=parts.source.classes)


def _test(parts: _Parts, state: TrainState, result: Result, stop: StopSignals) -> None:
    """Score the test split once: with the best epoch's weights, and with the zero-shot model that they came from."""
    loader = parts.loader("test", train=False)
    try:
        if state.best_epoch:
            checkpoint.load_weights(parts.checkpoints / "best.safetensors", parts.model)
        # The threshold that validation chose: one chosen on the test set would flatter it.
        meter = parts.meter(scores.chosen_threshold(parts.run_dir))
        test = _evaluate(parts, loader, "test", stop, meter=meter)
        result |= {f"test/{name}": value for name, value in test.items()}
        _write_scores(parts, "test", meter)
        if parts.built.has_zeroshot:
            # Built anew rather than kept: a second copy of the weights would sit in memory for the whole run.
            torch.manual_seed(parts.conf.seed)
            untrained = build_model(parts.conf.model, parts.source.classes).model.to(parts.device)
            zeroshot = _evaluate(parts, loader, "test zero-shot", stop, meter=parts.meter(), model=untrained)
            result |= {f"test/zeroshot/{name}": zeroshot[name] for name in parts.headlines}
    finally:
        loader.close()


def _log_close(run_dir: Path, result: Result) -> None:
    """The last lines of a run: what came out, where it is, what to type next."""
    if "zeroshot/top1" in result:
        logger.info("zero-shot   val/top1 %.4f   test/top1 %.4f", result["zeroshot/top1"], result["test/zeroshot/top1"])
    scores = "fine-tuned  val/top1 %.4f   test/top1 %.4f   (best of %d epochs: %d; %.1f s)"
    names = ("val/top1", "test/top1", "epochs", "best_epoch", "seconds")
    logger.info(scores, *(result[name] for name in names))
    logger.info("run directory: %s", run_dir)
    logger.info("  lr.png curves.png              every layer's rate, and the learning curves")
    logger.info("  metrics.json confusion.png     every class: how well, and what it was taken for")
    logger.info("  checkpoints/best.safetensors   the best epoch's weights, with classes and preprocessing inside")
    words = " ".join(result["overrides"])
    logger.info("next, a sweep around it: python -m finetune -m %s optim.layer_decay=0.65,0.75,0.85", words)
