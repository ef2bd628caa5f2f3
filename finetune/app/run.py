"""One run, in the order in which things happen. Read `_learn` first: it is the table of contents.

The run directory that it leaves: `config.yaml`, `run.log`, `history.jsonl`, `rates.json`, `result.json`, `lr.png`,
`curves.png`, `metrics.json`, the confusion matrices and `checkpoints/`.
"""

import dataclasses
import logging
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from finetune.app.advice import log_next
from finetune.app.batch_size import choose_batch, out_of_memory, with_batch
from finetune.app.build import Run, build_run
from finetune.app.feeds import Feeds
from finetune.app.head_choice import choose_head
from finetune.app.last_batch import refuse_last_batch_of_one
from finetune.app.rate_plan import (
    batch_notice,
    images_per_step,
    log_layers,
    log_steps,
    peak_optim,
    plan_rates,
    run_curve,
    short_epoch_notice,
)
from finetune.app.scoring import prepare_head, score_test, score_val
from finetune.app.session import Session, carried_over, log_summary, outcome
from finetune.app.training import outside_of_training, train_to_the_end
from finetune.config import CompileMode, Conf, OnNonfinite, mixing_problems, recorded, train_problems
from finetune.core.compiling import compiled
from finetune.core.device import computed_in, environment, is_out_of_memory, set_deterministic
from finetune.core.freezing import set_up_layers
from finetune.core.loop import TrainState
from finetune.core.optim import build_optimizer
from finetune.core.sched import Curve, create_scheduler
from finetune.prefix.feed import Feed
from finetune.report import run_figures as report
from finetune.report.look import dispensable
from finetune.runs.earlier import EarlierRun, chosen_before, find_earlier, remove_given_up
from finetune.runs.epoch_files import has_state, latest_state, refuse_foreign_epochs
from finetune.runs.finished import check_claim, check_finished
from finetune.runs.history import History
from finetune.runs.records import Result
from finetune.runs.resume import BEFORE, Saved, compare_state, first_promise, notes_of, restore_run, scores_before
from finetune.runs.saver import Saver
from finetune.system.errors import UserError
from finetune.system.files import json_text, write_json
from finetune.system.locks import run_lock
from finetune.system.log import say, start_log, stop_log
from finetune.system.memory import hand_back_freed_memory
from finetune.system.ours import FolderKind, claim, sweep_temporaries
from finetune.system.signals import StopSignals
from finetune.system.terminal import counted

logger = logging.getLogger("finetune")


def run(conf: Conf, run_dir: Path, overrides: list[str], quiet: bool = False) -> Result:
    """Fine-tune as `conf` says, leave everything in `run_dir`, and return the content of `result.json`.

    `finetune.config.find_problems` found no fault in `conf`. `run_dir` exists. It holds none of our files, or a
    run: this very run is continued, or left alone if it has finished. `result.json` repeats `overrides`, the words of
    the command line. With `quiet` nothing is printed.

    Raises:
        UserError: A mistake that only the model, the data or the folder could show.
        NotFiniteError: Training diverged; `result.json` says `diverged`.
        Interrupted: A signal asked for a stop; the state is saved.
    """
    conf = conf.choose(chosen_before(run_dir))
    earlier = _find_earlier(conf, run_dir)
    if not earlier.is_finished:
        claim(run_dir, FolderKind.run)
        with run_lock(run_dir):
            earlier = _find_earlier(conf, run_dir)  # again, since no other process can change the folder now
            if not earlier.is_finished:
                return _run(Session(conf, run_dir, overrides, earlier), quiet=quiet)
    assert earlier.result is not None
    check_claim(run_dir, earlier.result)
    check_finished(run_dir, earlier.result)
    say(f"{run_dir} holds this very run, and it has finished: nothing to do. Its result: {run_dir / 'result.json'}")
    return earlier.result


def _find_earlier(conf: Conf, run_dir: Path) -> EarlierRun:
    return find_earlier(run_dir, recorded(conf), is_resume=conf.resume is not None, force=conf.resume_force)


def _run(session: Session, *, quiet: bool) -> Result:
    """`run` while this process holds the lock of the folder; however the run ends, `result.json` says how."""
    start_log(session.run_dir, quiet=quiet)
    stop = StopSignals()
    try:
        sweep_temporaries(session.run_dir, FolderKind.run)
        session.announce()
        if session.earlier.given_up is not None:
            remove_given_up(session.run_dir)
        if session.earlier.result is None:
            session.accept()
        with stop:
            _fine_tune(session, stop)
        session.result["status"] = "finished"
        log_summary(session.run_dir, session.result)
        log_next(session.conf, session.result, History(session.run_dir / "history.jsonl").readable_rows())
    except BaseException as error:
        session.result["status"], session.result["error"] = outcome(error)
        logger.debug("the run ended early", exc_info=error)
        raise
    finally:
        session.write_end()
        stop_log()
        stop.pass_on()
    stop.check()  # a signal that came at the very end: this run is whole, but a sweep around it stops here
    return session.result


def _fine_tune(session: Session, stop: StopSignals) -> None:
    """Build the run and train it; running out of memory becomes an error that says what to change."""
    set_deterministic(session.conf.deterministic)
    run = build_run(session.conf, session.run_dir, is_begun=has_state(session.run_dir / "checkpoints"))
    session.choose(run.conf)
    try:
        if run.is_auto_batch:
            run = _with_auto_batch(run, session)
        _learn(run, session, stop)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(run)) from error


def _learn(run: Run, session: Session, stop: StopSignals) -> None:
    """Find what to continue from, prepare the data and the head, train, test and draw."""
    conf, result = run.conf, session.result
    _log_start(run, result)
    curve = _curve(run)
    _optimizer(run, curve)  # refuses depth, globs and warmup that do not fit, before any image is read
    refuse_last_batch_of_one(run)
    is_compiled = conf.train.compile != CompileMode.none
    found = latest_state(run.checkpoints)
    earlier, notes = session.agree(found), run.first_notes()
    promise = first_promise(earlier, run.device, deterministic=conf.deterministic, is_compiled=is_compiled)
    if found is not None:
        compare_state(found, run.model, notes, promise, earlier.changes, force=conf.resume_force or earlier.is_forced)
    refuse_foreign_epochs(run.checkpoints, conf.train.epochs)
    if found is None:
        run = _with_head(run, session, curve, stop)
    plan = plan_rates(run, curve, earlier, found, promise)
    run.notes = notes_of(notes, recorded(session.conf), promise, plan.get("before", {}).get("epochs"))
    result |= {"promise": promise.kind, "promise_reasons": promise.reasons}
    past = carried_over(run, earlier, is_found=found is not None)
    if not session.is_accepted and not (conf.resume_force or earlier.is_forced):
        session.accept(past, plan)  # before the long work: a stop during that must not undo the changes

    feeds = Feeds(run, stop.check)
    with outside_of_training(run.folder, "no step is lost"):
        train, val = feeds.train_and_val()
        result |= _prepared(run, train, val, found, stop)
    state = _start(run, curve)
    run.written = restore_run(run.folder, state, found)
    if found is not None:
        result["resumed_at"] = [*result["resumed_at"], state.step]
    if not session.is_accepted:  # forced changes may not fit the checkpoint, so they are accepted only now
        session.accept(past, plan)
    del found  # it is as large as the model and the optimizer's moments
    best_before = state.best_epoch
    log_layers(run, len(state.optimizer.param_groups))
    log_steps(run.conf, curve)
    write_json(run.folder / "rates.json", plan)
    logger.info("resume promise: %s", promise)
    session.write_result()
    stop.check()

    with closing(train), nullcontext() if val is None else closing(val):
        saver = train_to_the_end(run, state, train, val, result, stop)
        if val is not None and 0 < best_before == state.best_epoch:
            score_val(run, state, saver, val, stop)  # no word of an earlier start's files about it is believed
    _conclude(run, session, feeds, state, saver, stop)


def _conclude(run: Run, session: Session, feeds: Feeds, state: TrainState, saver: Saver, stop: StopSignals) -> None:
    """Score the test images, draw, and remove what only a resume needs."""
    hand_back_freed_memory()  # that of gradients and activations; the best weights are read next
    with saver.waited():  # for the last save, which goes to the disk meanwhile
        with outside_of_training(run.folder, "training is finished and saved"):
            if (test := feeds.test()) is not None:
                score_test(run, state, saver, test, session.result, stop)
        with dispensable(run.folder / "lr.png"):
            report.plot_rates(run.folder)
    session.write_result()  # the picture reads it; its status becomes `finished` at the very end
    with dispensable(run.folder / "curves.png"):
        report.plot_curves(run.folder)
    saver.finish(History(run.folder / "history.jsonl").rows(), run.monitor)


def _with_head(run: Run, session: Session, curve: Curve, stop: StopSignals) -> Run:
    """The run with the head that was chosen, frozen as before."""
    with outside_of_training(run.folder, "no step is lost"):
        chosen = choose_head(run, stop)
    if chosen.conf != run.conf:  # which has a number for `data.batch_size=fit`; the session keeps the word
        session.choose(session.conf.choose({"model.head": chosen.conf.model.head}))
    if chosen.model is not run.model:
        _optimizer(chosen, curve)
    return chosen


def _prepared(run: Run, train: Feed, val: Feed | None, found: Saved | None, stop: StopSignals) -> Result:
    """The scores from before the first step; a checkpoint has them, and the head as it is by now."""
    scores: Result = prepare_head(run, train, val, stop) if found is None else Result(scores_before(found))
    run.notes[BEFORE] = json_text(scores)
    return scores


def _log_start(run: Run, result: Result) -> None:
    """Log the model, the data, the device and the batch; `result` gets the device."""
    result |= {"device": environment(run.device)["device"], "computed_in": computed_in(run.conf.precision, run.dtype)}
    result |= {"monitor": run.monitor, "loss": run.loss.value, "data": run.source.counts}
    logger.info("model: %s", run.built.description)
    logger.info("data: %s", run.source.description)
    for line in run.choices:
        logger.info("%s", line)
    logger.info("computing on %s in %s; this run: %s", run.device, result["computed_in"], run.folder)
    if notice := batch_notice(run.conf):
        logger.warning("%s", notice)


def _with_auto_batch(run: Run, session: Session) -> Run:
    """The run with `data.batch_size=fit` as a number: that of its first start, or the largest that fits now."""
    known = (session.earlier.result or {}).get("auto_batch_size")
    size = int(known) if known else choose_batch(run)
    conf = with_batch(run.conf, size)
    # Such as more micro-batches a step than compiled training allows, or fewer images than one draw of MixUp takes.
    if problems := [*train_problems(conf.train), *mixing_problems(conf.augment, size)]:
        raise UserError(f"data.batch_size=fit came to {counted(size, 'image')}: {problems[0]}")
    session.result |= {"auto_batch_size": size, "auto_accumulate": conf.train.accumulate}
    return dataclasses.replace(run, conf=conf)


def _curve(run: Run) -> Curve:
    """The curve over the steps of the run; logs how many images an epoch leaves out, and lacks for a whole step."""
    train = run.loader("train", train=True)
    if train.left_out:
        step = images_per_step(run.conf)
        text = "data.drop_last: an epoch leaves out %s of %d, other ones each time, since a step takes %d"
        logger.info(text, counted(train.left_out, "image"), train.num_images + train.left_out, step)
    if notice := short_epoch_notice(run.conf, train.num_images):
        logger.warning("%s", notice)
    return run_curve(run.conf, len(train))


def _optimizer(run: Run, curve: Curve) -> tuple[Optimizer, LambdaLR]:
    """Freeze layers, then build the optimizer, then its schedule: each takes what the one before has left."""
    set_up_layers(run.model, run.conf.optim, train=run.conf.train)
    optimizer = build_optimizer(run.model, peak_optim(run.conf))
    return optimizer, create_scheduler(curve.sched, optimizer, curve.num_units)


def _start(run: Run, curve: Curve) -> TrainState:
    """The state before the first step, with the run's seed."""
    conf = run.conf
    run.checkpoints.mkdir(exist_ok=True)
    # Dropout draws from here on, however many numbers the building of the model has drawn.
    torch.manual_seed(conf.seed)
    state = run.state(*_optimizer(run, curve))
    state.first_layer = run.model.boundary  # the feeds run the layers below
    state.compiled = compiled(run.model, conf.train.compile, batch_size=conf.data.batch_size, device=run.device)
    if conf.train.on_nonfinite == OnNonfinite.skip:
        state.guard.limit = conf.train.max_nonfinite
    return state
