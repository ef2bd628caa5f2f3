"""One run, in the order in which things happen: the only module that sees everything.

The run directory that it leaves: `config.yaml`, `run.log`, `history.jsonl`, `rates.json`, `result.json`, `lr.png`,
`curves.png`, `metrics.json`, the confusion matrices and `checkpoints/`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.app.batch_size import choose_batch, out_of_memory, with_batch
from finetune.app.build import Run, build_run, place
from finetune.app.feeds import Feeds
from finetune.app.probing import fit_head
from finetune.app.training import ranked_by, scored, stoppable, train_to_the_end, write_scores
from finetune.config import CompileMode, Conf, HeadKind, OnNonfinite, as_dict, train_problems
from finetune.core import recipe
from finetune.core.compiling import compiled
from finetune.core.device import computed_in, environment, is_out_of_memory, set_deterministic
from finetune.core.ema import Ema
from finetune.core.finite import NotFiniteError
from finetune.core.fit import validate
from finetune.core.freezing import set_up_layers
from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.metrics import Meter
from finetune.core.optim import build_optimizer
from finetune.core.plan import layer_rows, planned_rates
from finetune.core.sched import create_scheduler, lr_factor
from finetune.models import build_model
from finetune.models.heads.offsets import set_offsets
from finetune.prefix import Feed
from finetune.report import run_figures as report
from finetune.report import scores
from finetune.runs.earlier import EarlierRun, Result, find_earlier, flat
from finetune.runs.history import History
from finetune.runs.resume import (
    Promise,
    Saved,
    compare_curves,
    earlier_curve,
    find_state,
    first_promise,
    restore_run,
    say_changes,
)
from finetune.runs.saver import Saver
from finetune.runs.weights import put_weights
from finetune.system.errors import UserError
from finetune.system.files import sweep_temporaries, write_json, write_text
from finetune.system.locks import Holder, run_lock
from finetune.system.log import say, start_log, stop_log
from finetune.system.progress import Bar
from finetune.system.signals import Interrupted, StopSignals
from finetune.system.tables import table
from finetune.system.terminal import command

logger = logging.getLogger("finetune")


def run(conf: Conf, run_dir: Path, overrides: list[str], quiet: bool = False) -> Result:
    """Fine-tune as `conf` says and leave everything in `run_dir`; what `result.json` holds.

    A folder that already holds this very run is continued, or left alone where it has finished.

    Args:
        conf: A configuration that `finetune.config.find_problems` found no fault with.
        run_dir: Exists and is empty, or holds a run.
        overrides: The command line's own words, for the record.
        quiet: No console output.

    Raises:
        ValueError: A user's mistake that only model, data or the folder could show.
        NotFiniteError: Training diverged; `result.json` says `diverged`.
        Interrupted: A signal asked for a stop; the state is saved.
    """
    earlier = _find_earlier(conf, run_dir)
    if not earlier.is_finished:
        with run_lock(run_dir) as dead:
            earlier = _find_earlier(conf, run_dir)  # again, since no other process can change the folder now
            if not earlier.is_finished:
                return _run(conf, run_dir, _Session(conf, overrides, earlier, quiet, dead))
    assert earlier.result is not None
    say(f"{run_dir} holds this very run, and it has finished: nothing to do. Its result: {run_dir / 'result.json'}")
    return earlier.result


def _find_earlier(conf: Conf, run_dir: Path) -> EarlierRun:
    settings = flat(as_dict(conf))
    return find_earlier(run_dir, settings, is_resume=conf.resume is not None, force=conf.resume_force)


@dataclass
class _Session:
    """What one start of a run knows beside its configuration."""

    conf: Conf  # as it was asked for
    overrides: list[str]
    earlier: EarlierRun
    quiet: bool
    dead: Holder | None  # the killed process whose lock was found
    result: Result = field(default_factory=dict)
    is_accepted: bool = False


def _run(conf: Conf, run_dir: Path, session: _Session) -> Result:
    """`run`, in a folder that this process alone works in."""
    start_log(run_dir, quiet=session.quiet)
    result, stop = session.result, StopSignals()
    result |= {
        "status": "running",
        "error": None,
        "overrides": _all_overrides(conf, session),
        "seed": conf.seed,
        "resumed_at": session.earlier.resumed_at,
    }
    try:
        sweep_temporaries(run_dir)
        _announce(conf, run_dir, session)
        if session.earlier.result is None:
            _accept(session, run_dir, carried_on={}, plan={})
        with stop:
            _fine_tune(conf, run_dir, session, stop)
        result["status"] = "finished"
        _log_close(run_dir, result)
    except BaseException as error:
        result["status"], result["error"] = _outcome(error)
        logger.debug("the run ended early", exc_info=error)
        raise
    finally:
        if session.is_accepted:
            _write_result(run_dir, result)
        elif not session.earlier.changes:  # the run as it was, which could not be continued
            ended = {name: result[name] for name in ("status", "error")}
            _write_result(run_dir, {**(session.earlier.result or {}), **ended})
        stop_log()
        stop.pass_on()
    stop.check()  # asked to stop in the last moment: the run is whole, and a sweep around it ends here
    return result


def _accept(session: _Session, run_dir: Path, *, carried_on: Result, plan: dict[str, Any]) -> None:
    """From here on the folder is this session's: until here it may refuse to be continued, and is left as it was.

    Args:
        session: Its result goes on record.
        run_dir: The run's.
        carried_on: What an earlier session put on record and this one goes on from.
        plan: `rates.json` of a run that is continued.
    """
    session.is_accepted = True
    own = dataclasses.replace(session.conf, resume=None, resume_force=False)
    config = yaml.safe_dump(as_dict(own), sort_keys=False, allow_unicode=True)
    if session.earlier.result is None:
        write_text(run_dir / "config.yaml", config)  # first of all: by it a folder is known as a run's
        write_json(run_dir / "result.json", session.result)
        return
    # Killed in between, a run may have lost a promise or show another plan, but never keep one that is broken.
    session.result |= {**carried_on, **session.result}
    write_json(run_dir / "result.json", session.result)
    write_json(run_dir / "rates.json", plan)
    if session.earlier.changes:
        write_text(run_dir / "config.yaml", config)


def _carried_on(run: Run, earlier: EarlierRun, *, is_found: bool) -> Result:
    """Of what an earlier session put on record, what this one goes on from: so it stays known however this one ends.

    Not what the test gave, which was of other weights; nor scores, where no state is there to go on from.
    """
    kept = ("promise", *(["auto_"] if run.is_auto_batch else []))
    if is_found:
        kept += ("val/", "epochs", "best_", "seconds", *(["zeroshot/"] if run.built.has_zeroshot else []))
    return {name: value for name, value in (earlier.result or {}).items() if name.startswith(kept)}


def _all_overrides(conf: Conf, session: _Session) -> list[str]:
    """The words of the first start, and those of `resume=` in the place of what they replace."""
    if conf.resume is None or session.earlier.result is None:
        return session.overrides
    replaced = {word.partition("=")[0] for word in session.overrides}
    return [w for w in session.earlier.result["overrides"] if w.partition("=")[0] not in replaced] + session.overrides


def _announce(conf: Conf, run_dir: Path, session: _Session) -> None:
    """The first lines of a run that is continued."""
    if session.dead is not None:
        logger.warning("took over from %s, which is dead", session.dead)
    if session.earlier.result is None:
        return
    logger.info("continuing the run in %s, so far %s", run_dir, session.earlier.result["status"])
    if session.earlier.changes:
        logger.info("changed beside resume=%s:", run_dir)
        say_changes(session.earlier.changes)


def _write_result(run_dir: Path, result: Result) -> None:
    """The last word of a run. A disk too full for it must not hide what went wrong before."""
    try:
        write_json(run_dir / "result.json", result)
    except OSError as error:
        if result["status"] == "finished":
            raise
        logger.error("result.json could not be written: %s", error)


def _outcome(error: BaseException) -> tuple[str, str]:
    """(status, error) of a run that ended early."""
    if isinstance(error, NotFiniteError):
        return "diverged", str(error)
    if isinstance(error, Interrupted):
        return "interrupted", f"stopped by {error.signal_name}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by Ctrl-C"
    return "failed", f"{error}" or type(error).__name__


def _fine_tune(conf: Conf, run_dir: Path, session: _Session, stop: StopSignals) -> None:
    """Build, train, test, draw; fills the result."""
    set_deterministic(conf.deterministic)
    run = build_run(conf, run_dir)
    try:
        _learn(_with_auto_batch(run, session) if run.is_auto_batch else run, session, stop)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(run)) from error


def _learn(run: Run, session: _Session, stop: StopSignals) -> None:
    """All of `_fine_tune` behind the building."""
    conf, run_dir, result = run.conf, run.folder, session.result
    device = run.device
    is_compiled = conf.train.compile != CompileMode.none
    promise = first_promise(session.earlier, device, deterministic=conf.deterministic, is_compiled=is_compiled)
    logger.info("model: %s", run.built.description)
    logger.info("data: %s", run.source.description)
    result |= {"device": environment(device)["device"], "computed_in": computed_in(conf.precision, run.dtype)}
    result["monitor"] = ranked_by(run)
    logger.info("computing on %s in %s; this run: %s", device, result["computed_in"], run_dir)

    steps = recipe.steps_per_epoch(conf, len(run.loader("train", train=True)))
    _optimizer(run, steps)
    found = find_state(run.checkpoints, run.model, run.notes(), promise, force=conf.resume_force)
    plan = _plan(run, steps, session.earlier, found, promise)
    carried_on = _carried_on(run, session.earlier, is_found=found is not None)
    result |= {"promise": promise.kind, "promise_reasons": promise.reasons}
    if not session.is_accepted and not (conf.resume_force or session.earlier.is_forced):
        # Ahead of what takes long: a stop shall not undo it.
        _accept(session, run_dir, carried_on=carried_on, plan=plan)
    feeds = Feeds(run, stop.check)
    train, val = feeds.train_and_val()
    _prepare_head(run, train, val, run.model.boundary, result, stop)
    state = _start(run, steps)
    state.first_layer = run.model.boundary
    state.compiled = compiled(run.model, conf.train.compile, batch_size=conf.data.batch_size, device=device)
    notice = recipe.batch_notice(conf)
    if notice is not None:
        logger.warning("%s", notice)
    restore_run(run_dir, state, found)
    if found is not None:
        result["resumed_at"] = [*result["resumed_at"], state.step]
    if not session.is_accepted:  # what was forced may not fit the state
        _accept(session, run_dir, carried_on=carried_on, plan=plan)
    _write_plan(run, state, plan)
    del found  # as large as the model and its moments
    logger.info("resume promise: %s", promise)
    write_json(run_dir / "result.json", result)
    stop.check()
    try:
        saver = train_to_the_end(run, state, train, val, result, stop)
    finally:
        train.close()
        val.close()
    try:  # while the last save goes to the disk
        _test(run, state, saver, feeds.test(), result, stop)
        report.plot_rates(run_dir)
    finally:
        saver.wait()
    write_json(run_dir / "result.json", result)  # which the picture reads; finished is the very last word
    report.plot_curves(run_dir)
    saver.finish(History(run_dir / "history.jsonl").rows(), ranked_by(run))


def _plan(run: Run, steps: int, earlier: EarlierRun, found: Saved | None, promise: Promise) -> dict[str, Any]:
    """The content of `rates.json`; where the number of epochs has changed, with the old curve under `before`."""
    plan = planned_rates(run.model, run.conf, steps)
    if earlier.epochs_before is None:
        before = None if earlier.result is None else earlier_curve(run.folder / "rates.json")
        return plan if before is None else {**plan, "before": before}
    old = dataclasses.replace(run.conf, train=dataclasses.replace(run.conf.train, epochs=earlier.epochs_before))
    if found is not None:
        now, position = _factors(run.conf, steps), max(int(found[0]["scheduler"]["last_epoch"]), 0)
        per_epoch = len(now) // run.conf.train.epochs
        compare_curves(_factors(old, steps), now, promise, position=position, units_per_epoch=per_epoch)
    planned = planned_rates(run.model, old, steps)
    return {**plan, "before": {"epochs": earlier.epochs_before, "x": planned["x"], "layers": planned["layers"]}}


def _factors(conf: Conf, steps: int) -> list[float]:
    """The schedule's factor in each of its units, over the whole run."""
    sched, units = recipe.timed_sched(conf.sched, steps), recipe.num_units(conf, steps)
    return [lr_factor(t, sched, units) for t in range(units)]


def _prepare_head(run: Run, train: Feed, val: Feed, start: int, result: Result, stop: StopSignals) -> None:
    """What there is of a classifier before any step: zero-shot scores, a linear probe, offsets for several labels.

    `start` is the first layer that the feeds leave to the model.
    """
    head = run.conf.model.head
    if run.built.has_zeroshot:
        zeroshot = _evaluate(run, val, "zero-shot", stop, meter=run.meter(), start=start)
        result |= {f"zeroshot/{name}": zeroshot[name] for name in run.headlines}
        shown = "  ".join(f"val/{name} {zeroshot[name]:.4f}" for name in run.headlines)
        logger.info("zero-shot, before any training: %s", shown)
    if head == HeadKind.linear_probe:
        _probe(run, result, stop)
    if run.source.is_multilabel and head in (HeadKind.auto, HeadKind.zeroshot, HeadKind.random):
        labels = run.source.splits["train"].labels
        set_offsets(run.model, train.epoch(0), labels, run.autocast(), start)


def _optimizer(run: Run, steps: int) -> tuple[Optimizer, LambdaLR]:
    """Freeze, then the optimizer, then its schedule: the order matters (see `layers.freeze`).

    Called ahead of the first look at the images, too: what only model and data can tell of the settings (depth, globs,
    warmup) is refused there.
    """
    conf = run.conf
    set_up_layers(run.model, conf.optim, train=conf.train)
    optimizer = build_optimizer(run.model, recipe.scaled_optim(conf))
    return optimizer, create_scheduler(recipe.timed_sched(conf.sched, steps), optimizer, recipe.num_units(conf, steps))


def _probe(run: Run, result: Result, stop: StopSignals) -> None:
    """Fit the head on frozen features, and say what that alone gives."""
    train, val = run.loader("train", train=False), run.loader("val", train=False)
    try:
        bar = Bar("linear probe", total=len(train), images=train.num_images)
        probe = fit_head(run, stoppable(bar.wrap(train.epoch(0)), stop), stoppable(val.epoch(0), stop))
    finally:
        train.close()
        val.close()
    result["probe/top1"] = probe.val_top1
    logger.info("linear probe, before fine-tuning: val/top1 %.4f (penalty %g)", probe.val_top1, probe.strength)


def _with_auto_batch(run: Run, session: _Session) -> Run:
    """`data.batch_size=auto` as a number: the one of the first start, or what fits now; put on record."""
    earlier = session.earlier.result
    known = None if earlier is None else earlier.get("auto_batch_size")
    size = int(known) if known else choose_batch(run)
    conf = with_batch(run.conf, size)
    problems = train_problems(conf.train)  # more micro-batches a step than anybody asked for
    if problems:
        raise UserError(f"data.batch_size=auto came to {size} images: {problems[0]}")
    session.result |= {"auto_batch_size": size, "auto_accumulate": conf.train.accumulate}
    return dataclasses.replace(run, conf=conf)


def _start(run: Run, steps: int) -> TrainState:
    """Everything that changes while training, as it stands before the first step."""
    conf, model = run.conf, run.model
    optimizer, scheduler = _optimizer(run, steps)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    run.checkpoints.mkdir(exist_ok=True)
    # Dropout draws from here on: not from wherever building the model left the generator.
    torch.manual_seed(conf.seed)
    state = TrainState(
        model,
        optimizer,
        scheduler,
        scaler,
        criterion=run.criterion(),
        autocast=run.autocast(),
        interval=conf.sched.interval,
    )
    if conf.train.on_nonfinite == OnNonfinite.skip:
        state.guard.limit = conf.train.max_nonfinite
    if conf.train.ema:
        state.ema = Ema(model, conf.train.ema, warmup=conf.train.ema_warmup)
    return state


def _write_plan(run: Run, state: TrainState, plan: dict[str, Any]) -> None:
    """Print the table of layers, and write every layer's planned rate."""
    rows = layer_rows(run.model, run.conf)
    logger.info("%s", table(rows, columns=list(rows[0])))
    learning = sum(row["parameters"] for row in rows if row["state"] == "learns")
    logger.info(
        "%s of %s parameters learn, in %d groups; weight decay spares biases, norms, tokens and positions",
        f"{learning:,}",
        f"{sum(row['parameters'] for row in rows):,}",
        len(state.optimizer.param_groups),
    )
    write_json(run.folder / "rates.json", plan)


def _evaluate(
    run: Run,
    feed: Feed,
    title: str,
    stop: StopSignals,
    *,
    meter: Meter,
    start: int,
    model: LayeredModel | None = None,
) -> dict[str, float]:
    """Score `model`, by default the one that learns, on a split whose feed ends ahead of layer `start`."""
    return validate(model or run.model, scored(feed, title, stop, meter), run.autocast(), meter=meter, start=start)


def _test(run: Run, state: TrainState, saver: Saver, feed: Feed, result: Result, stop: StopSignals) -> None:
    """Score the test split once: with the best epoch's weights, and with the zero-shot model that they came from."""
    start = state.first_layer
    try:
        if feed.will_fork(0):
            saver.wait()  # no process is forked while another thread holds who knows what
        feed.fill(0)
        if state.best_epoch and (state.best_epoch < state.epoch or state.best_is_ema):
            put_weights(saver.best_weights(state.best_epoch), run.model, run.checkpoints / "best.safetensors")
        # The threshold that validation chose: one chosen on the test set would flatter it.
        meter = run.meter(scores.chosen_threshold(run.folder))
        test = _evaluate(run, feed, "test", stop, meter=meter, start=start)
        result |= {f"test/{name}": value for name, value in test.items()}
        write_scores(run, "test", meter)
        if run.built.has_zeroshot:
            # Built anew rather than kept: a second copy of the weights would sit in memory for the whole run.
            torch.manual_seed(run.conf.seed)
            untrained = build_model(run.model_conf, run.source.classes).model
            place(untrained, run.device, run.dtype)
            set_up_layers(untrained, run.conf.optim, train=run.conf.train)
            zeroshot = _evaluate(run, feed, "test zero-shot", stop, meter=run.meter(), start=start, model=untrained)
            result |= {f"test/zeroshot/{name}": zeroshot[name] for name in run.headlines}
    finally:
        feed.close()


def _log_close(run_dir: Path, result: Result) -> None:
    """The last lines of a run: what came out, where it is, what to type next."""
    if "zeroshot/top1" in result:
        test = result.get("test/zeroshot/top1", math.nan)
        logger.info("zero-shot   val/top1 %.4f   test/top1 %.4f", result["zeroshot/top1"], test)
    scores = "fine-tuned  val/top1 %.4f   test/top1 %.4f   (best of %d epochs: %d; %.1f s)"
    names = ("val/top1", "test/top1", "epochs", "best_epoch", "seconds")
    logger.info(scores, *(result.get(name, math.nan) for name in names))  # a monitor may have been NaN to the end
    logger.info("run directory: %s", run_dir)
    logger.info("  lr.png curves.png              every layer's rate, and the learning curves")
    logger.info("  metrics.json confusion.png     every class: how well, and what it was taken for")
    logger.info("  checkpoints/best.safetensors   the best epoch's weights, with classes and preprocessing inside")
    words = command([w for w in result["overrides"] if not w.startswith("optim.layer_decay=")])
    logger.info("next, a sweep around it: python -m finetune -m %s optim.layer_decay=0.65,0.75,0.85", words)
