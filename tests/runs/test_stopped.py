"""Runs that are stopped, killed, starved of disk or asked for again: what is resumed equals what was never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from small_runs import ROOT, assert_same_run, finetune, go, history, small
from torch import Tensor

from finetune.__main__ import main
from finetune.app import training
from finetune.app.build import Run
from finetune.app.run import run
from finetune.config import Conf, HeadKind, OnNonfinite, Precision
from finetune.core import fit as fitting
from finetune.core.finite import NotFiniteError
from finetune.data import ImageError
from finetune.models import build
from finetune.runs import saver
from finetune.runs.checkpoint import read_state
from finetune.runs.earlier import RefusedError
from finetune.runs.weights import read_weights
from finetune.system.locks import RUN_LOCK, InUseError, run_lock
from finetune.system.ours import FolderKind, claim
from finetune.system.reading import DamagedError
from finetune.system.signals import Interrupted

Stop = Callable[[], None]


def demanding(stripes: Path, **changes: object) -> Conf:
    """Every kind of state at once: dropout, MixUp, averages, steps within epochs, rates by step, several best."""
    conf = small(stripes, model__head_dropout=0.2, augment__mixup=0.2, train__ema=0.9, train__keep=2, **changes)
    conf.sched.interval = "step"  # type: ignore[assignment]
    conf.train.epochs, conf.train.save_every_steps, conf.train.patience = 3, 2, 5
    return conf


def everything(folder: Path) -> Any:
    """All of last.pt but the clock."""
    content = read_state(folder / "checkpoints" / "last.pt")
    content["counters"].pop("seconds")
    return content


def assert_equal(one: Any, other: Any) -> None:
    spec = importlib.util.spec_from_file_location("kill_test", ROOT / "scripts" / "kill_test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.differences(one, other, "") == []


@pytest.fixture(scope="module")
def straight(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    go(demanding(stripes), folder)
    return folder


def resume(folder: Path, conf: Conf, **changes: object) -> dict[str, Any]:
    """As `resume=FOLDER` and overrides beside it."""
    conf.resume = str(folder)
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        setattr(getattr(conf, part) if part else conf, name, value)
    return run(conf, folder, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()], quiet=True)


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Stop], None]:
    """Let something happen ahead of the n-th call of a function of the loop, from 1."""

    def at(name: str, number: int, stop: Stop) -> None:
        original, calls = getattr(fitting, name), 0

        def struck(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                stop()
            return original(*args, **kwargs)

        monkeypatch.setattr(fitting, name, struck)

    return at


@pytest.mark.parametrize(
    ("where", "number", "signum", "code"),
    [
        ("train_step", 1, signal.SIGTERM, 143),
        ("train_step", 5, signal.SIGINT, 130),
        pytest.param("train_step", 8, signal.SIGUSR1, 138, marks=pytest.mark.slow),
        pytest.param("validate", 2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("validate", 3, signal.SIGUSR2, 140),
    ],
)
def test_a_signal_anywhere_saves_and_resumes_to_the_bit(
    stripes: Path, straight: Path, tmp_path: Path, strike: Any, where: str, number: int, signum: int, code: int
) -> None:
    strike(where, number, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Interrupted) as error:
        go(demanding(stripes), tmp_path / "run")
    assert error.value.code == code
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    step = read_state(tmp_path / "run" / "checkpoints" / "last.pt")["counters"]["step"]
    result = resume(tmp_path / "run", demanding(stripes))
    assert result["resumed_at"] == [step]
    assert result["promise"] == "bitwise"
    assert_same_run(straight, tmp_path / "run")
    assert_equal(everything(straight), everything(tmp_path / "run"))
    assert (straight / "config.yaml").read_bytes() == (tmp_path / "run" / "config.yaml").read_bytes()


def test_a_stop_in_the_last_validation_leaves_the_last_weights_too(
    stripes: Path, tmp_path: Path, strike: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That epoch's own save is put off to the end of the run, which then has no epoch left to save."""
    monkeypatch.setattr(saver, "CHEAP_S", -1.0)
    conf = small(stripes, train__max_save_share=1e-6)
    go(conf, tmp_path / "straight")
    strike("validate", conf.train.epochs, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(conf, tmp_path / "run")
    resume(tmp_path / "run", conf)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    last = [read_weights(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("straight", "run")]
    assert last[0][1]["epoch"] == last[1][1]["epoch"] == str(conf.train.epochs)


def test_a_session_that_comes_to_nothing_takes_nothing_away(
    stripes: Path, tmp_path: Path, strike: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first start found out and promised stays on record, and its settings stay its own."""
    conf = small(stripes, data__batch_size=0)
    strike("train_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(conf, tmp_path / "run")
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "result.json", "rates.json")}
    before = json.loads(kept["result.json"])
    assert before["auto_batch_size"] and before["promise"] == "bitwise"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "fingerprint", lambda self, name="train": "other images")
        with pytest.raises(ValueError, match="the training images are not those"):
            resume(tmp_path / "run", conf, train__epochs=3)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept


def test_more_epochs_that_were_agreed_on_outlive_a_stop_before_the_first_of_them(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a queue that starts `resume=latest` anew: it goes on with what was asked for."""
    conf = small(stripes)
    go(conf, tmp_path / "run")

    def stopped(*_: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("finetune.app.run.Feeds.train_and_val", stopped)
        with pytest.raises(Interrupted):
            resume(tmp_path / "run", conf, train__epochs=3)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "interrupted" and result["best_epoch"] and "train.epochs=3" in result["overrides"]
    assert "test/top1" not in result and result["promise"] == "none"
    assert json.loads((tmp_path / "run" / "rates.json").read_text())["before"]["epochs"] == 2
    assert "epochs: 3" in (tmp_path / "run" / "config.yaml").read_text()
    again = resume(tmp_path / "run", conf)
    assert again["epochs"] == 3 and again["promise"] == "none"  # the first two epochs had another curve


def test_a_run_that_cannot_go_on_says_why_now(stripes: Path, tmp_path: Path, strike: Any) -> None:
    """Not what went wrong the last time."""
    conf = small(stripes)
    strike("train_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(conf, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    stripes.rename(stripes.with_name("elsewhere"))
    try:
        with pytest.raises(OSError, match=r"data\.root"):
            resume(tmp_path / "run", conf)
    finally:
        stripes.with_name("elsewhere").rename(stripes)
    after = json.loads((tmp_path / "run" / "result.json").read_text())
    assert after["status"] == "failed" and "data.root" in after["error"]
    assert {**after, "status": None, "error": None} == {**before, "status": None, "error": None}
    assert resume(tmp_path / "run", conf)["status"] == "finished"


def test_what_was_scored_before_training_is_scored_once(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint carries the scores, so a `result.json` that is gone takes none away."""
    heads = {"zeroshot": {"model__head": HeadKind.zeroshot}, "probe": {"model__head": HeadKind.linear_probe}}
    for name, changes in heads.items():
        conf, folder = small(stripes, **changes), tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "train_step", _stopped_at(3))
            with pytest.raises(Interrupted):
                go(conf, folder)
        before = json.loads((folder / "result.json").read_text())
        (score,) = [key for key in before if key.startswith(("zeroshot/", "probe/"))]
        assert score == f"{name}/top1"
        (folder / "result.json").unlink()
        with monkeypatch.context() as patch:
            patch.setattr("finetune.app.run.prepare_head", Mock(side_effect=AssertionError("computed again")))
            result = resume(folder, conf)
        assert result["status"] == "finished" and result[score] == before[score]
        go(small(stripes, **changes), tmp_path / f"{name} straight")
        assert_same_run(tmp_path / f"{name} straight", folder)


@pytest.mark.parametrize("frozen", [[], ["head.weight"], ["head.*", "*conv1*"]])
def test_a_resume_reads_no_class_names(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: list[str]
) -> None:
    """The head's weights come from the checkpoint; only the test's zero-shot score asks the text tower, at the end."""
    conf = small(stripes, model__head=HeadKind.zeroshot, optim__freeze=frozen, train__save_every_steps=1)
    encoded = Mock(side_effect=build.zeroshot_weight)
    monkeypatch.setattr(build, "zeroshot_weight", encoded)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "train_step", _stopped_at(3))
        with pytest.raises(Interrupted):
            go(conf, tmp_path / "run")
    assert encoded.call_count == 1
    assert resume(tmp_path / "run", conf)["status"] == "finished"
    assert encoded.call_count == 2 + (frozen != [])
    conf.resume = None
    go(conf, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "run"))
    assert one["test/zeroshot/top1"] == other["test/zeroshot/top1"]
    assert one["zeroshot/top1"] == other["zeroshot/top1"]


def _stopped_at(number: int) -> Any:
    """`train_step` that gets a signal ahead of its n-th call, from 1."""
    original, calls = fitting.train_step, Mock()

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls()
        if calls.call_count == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    return struck


def test_another_error_waits_for_the_save_under_way(
    stripes: Path, tmp_path: Path, strike: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saver.write_state

    def slowly(*args: Any, **named: Any) -> None:
        time.sleep(0.5)
        write(*args, **named)

    def fail() -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(saver, "write_state", slowly)
    strike("train_step", 3, fail)
    with pytest.raises(RuntimeError, match="of another kind"):
        go(small(stripes, train__save_every_steps=2), tmp_path / "run")
    assert read_state(tmp_path / "run" / "checkpoints" / "last.pt")["counters"]["step"] == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImageError("seen/3.png", "cut short"), "failed"),
        (DamagedError("part-0001.tar is damaged"), "failed"),
        (NotFiniteError, "diverged"),
        (KeyboardInterrupt("a second Ctrl-C"), "interrupted"),
        (Interrupted(signal.SIGTERM), "interrupted"),
        (RuntimeError("of another kind"), "failed"),
    ],
)
def test_a_save_that_fails_on_the_way_out_does_not_hide_why_the_run_ends(
    stripes: Path, tmp_path: Path, strike: Any, monkeypatch: pytest.MonkeyPatch, error: Any, status: str, poisoned: Any
) -> None:
    def fail() -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        for name in ("write_state", "write_weights"):
            monkeypatch.setattr(saver, name, full)
        monkeypatch.setattr("finetune.runs.bad_batch.store", full)
        if error is not NotFiniteError:
            raise error

    strike("train_step", 2, fail)
    conf = small(stripes)
    if error is NotFiniteError:
        poisoned(2, 9)
    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        go(conf, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == status
    if isinstance(error, (ImageError, DamagedError)):
        why = error.reason if isinstance(error, ImageError) else str(error)
        assert f"{why}; the state of this step is not saved: cannot save a checkpoint" in str(caught.value)
    if error is NotFiniteError:
        assert "not finite in epoch 1" in str(caught.value) and "not stored: [Errno 28]" in str(caught.value)
        assert "the weights from before it are not saved" in str(caught.value)


@pytest.mark.parametrize("where", ["in step 2", "on cpu. Try"])
def test_memory_that_runs_out_is_told_with_advice(
    stripes: Path, tmp_path: Path, strike: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In a step, and ahead of the first."""

    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    if where == "in step 2":
        strike("train_step", 2, fail)
    else:
        monkeypatch.setattr("finetune.app.run.create_scheduler", fail)
    with pytest.raises(ValueError, match=rf"out of memory on cpu.*{where}|{where}") as error:
        go(small(stripes), tmp_path / "run")
    assert "data.batch_size=4 train.accumulate=2" in str(error.value)


def test_an_earlier_handler_is_called_once_all_is_saved(stripes: Path, tmp_path: Path, strike: Any) -> None:
    """A launcher's handler may end the process or queue the job again: the state has to be there by then."""
    seen: list[str] = []

    def launcher(signum: int, frame: object) -> None:
        seen.append(json.loads((tmp_path / "run" / "result.json").read_text())["status"])
        assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()

    before = signal.signal(signal.SIGUSR2, launcher)
    try:
        strike("train_step", 2, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        with pytest.raises(Interrupted):
            go(demanding(stripes), tmp_path / "run")
        assert signal.getsignal(signal.SIGUSR2) is launcher
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == ["interrupted"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is to be written."""


def test_killed_in_the_middle_of_an_epoch_twice(
    stripes: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second resume starts inside the same epoch as the first."""
    original, limit = fitting.train_step, [8, 2]

    def dying(state: fitting.TrainState, *args: Any) -> None:
        if limit and limit[0] == 0:
            limit.pop(0)
            for thread in threading.enumerate():  # SIGKILL would end it, here it would write beside the next start
                if thread.name == "saver":
                    thread.join()
            raise Killed
        if limit:
            limit[0] -= 1
        original(state, *args)

    monkeypatch.setattr(fitting, "train_step", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            go(demanding(stripes), tmp_path / "run")
    assert resume(tmp_path / "run", demanding(stripes))["resumed_at"] == [8, 10]
    assert_same_run(straight, tmp_path / "run")
    assert_equal(everything(straight), everything(tmp_path / "run"))


@pytest.mark.parametrize(
    ("precision", "fix_layer", "workers"),
    [
        ("bf16", 3, "2"),
        pytest.param("bf16", -1, "0", marks=pytest.mark.slow),
        pytest.param("fp32", 7, "2", marks=pytest.mark.slow),
    ],
)
def test_frozen_and_half_precision_runs_resume_to_the_bit(
    stripes: Path, tmp_path: Path, strike: Any, precision: str, fix_layer: int, workers: str
) -> None:
    changes = {"precision": Precision(precision), "optim__fix_layer": fix_layer, "data__workers": workers}
    go(small(stripes, **changes), tmp_path / "straight")
    strike("train_step", 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(small(stripes, **changes), tmp_path / "run")
    assert resume(tmp_path / "run", small(stripes, **changes))["resumed_at"] == [7]
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    assert_equal(everything(tmp_path / "straight"), everything(tmp_path / "run"))


# --- what may change ------------------------------------------------------------------------------------------------


def test_what_would_make_it_another_run_is_refused_unless_forced(
    stripes: Path, tmp_path: Path, strike: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strike("train_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(small(stripes), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes in ({"seed": 4}, {"optim__lr": 1e-4}, {"train__epochs": 1}, {"data__batch_size": 4}):
        with pytest.raises(RefusedError, match=r"(?s) -> .*resume_force=true"):
            resume(tmp_path, small(stripes), **changes)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    result = resume(tmp_path, small(stripes), optim__lr=1e-4, resume_force=True)
    assert (result["promise"], result["promise_reasons"]) == ("none", ["forced optim.lr: 0.001 -> 0.0001"])
    assert history(tmp_path)[1]["lr"]["head.decay"] == pytest.approx(0.5e-4)
    log = (tmp_path / "run.log").read_text()
    assert "- optim.lr: 0.001" in log and "+ optim.lr: 0.0001   (forced)" in log


def test_harmless_settings_may_change_and_keep_the_promise(
    stripes: Path, straight: Path, tmp_path: Path, strike: Any
) -> None:
    strike("train_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(demanding(stripes), tmp_path / "run")
    result = resume(tmp_path / "run", demanding(stripes), data__workers="1", train__save_every_steps=0)
    assert result["promise"] == "bitwise"
    assert_same_run(straight, tmp_path / "run")


def test_more_epochs_go_on_at_the_new_curves_rate(stripes: Path, tmp_path: Path) -> None:
    go(small(stripes), tmp_path)
    result = resume(tmp_path, small(stripes), train__epochs=4)
    assert result["status"] == "finished" and result["promise"] == "none"
    assert [row["lr"]["head.decay"] for row in history(tmp_path)] == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])
    plan = json.loads((tmp_path / "rates.json").read_text())
    assert plan["before"]["epochs"] == 2
    assert plan["before"]["layers"]["head"] == pytest.approx([1e-3, 0.5e-3])
    assert (
        "factor from here on, lr.png shows both curves: epoch 3: 0.5, epoch 4: 0.25"
        in (tmp_path / "run.log").read_text()
    )

    # With a cycle of its own the curve does not change with the epochs, and nothing is lost.
    folders = tmp_path / "short", tmp_path / "long"
    for folder, epochs in zip(folders, (1, 2), strict=True):
        conf = small(stripes)
        conf.sched.cycle, conf.train.epochs = 2, epochs
        go(conf, folder)
    assert resume(folders[0], conf)["promise"] == "bitwise"
    assert_same_run(*folders)


def test_another_machine_is_named_and_the_promise_weakened(stripes: Path, tmp_path: Path, strike: Any) -> None:
    strike("train_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(small(stripes), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = read_state(path)
    content["notes"] |= {"torch": "2.6.0", "threads": "64"}
    torch.save(content, path)
    result = resume(tmp_path, small(stripes))
    assert result["promise"] == "close"
    assert [reason.split(":")[0] for reason in result["promise_reasons"]] == ["torch", "threads"]
    assert "close, not bitwise" in (tmp_path / "run.log").read_text()

    content["notes"] |= {"images": "7 images"}
    torch.save(content, path)
    with pytest.raises(ValueError, match="not those that the run began with"):
        resume(tmp_path, small(stripes), train__epochs=3)


# --- two at once ----------------------------------------------------------------------------------------------------


def test_the_second_process_changes_nothing(stripes: Path, tmp_path: Path) -> None:
    claim(tmp_path, FolderKind.run)
    with run_lock(tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
        with pytest.raises(InUseError, match="since"):
            go(small(stripes), tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
    go(small(stripes), tmp_path)
    assert not (tmp_path / RUN_LOCK).exists()


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make the images of some steps of every epoch infinite where the training batches are made, and so in a replay."""

    def poison(first: int, last: int) -> None:
        original = training.Run.mixer

        def mixer(parts: Any) -> Any:
            found, mixed = original(parts), Mock()

            def wrapped(batches: Any, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                for index, (images, targets, ids) in enumerate(found.wrap(batches, epoch, skip), start=skip):
                    yield (images * float("inf") if first <= index <= last else images), targets, ids

            mixed.wrap = wrapped
            return mixed

        monkeypatch.setattr(training.Run, "mixer", mixer)

    return poison


def test_bad_steps_are_skipped_stored_and_replayed(
    stripes: Path, tmp_path: Path, poisoned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(1, 1)
    conf = small(stripes)
    conf.train.on_nonfinite, conf.train.max_nonfinite = OnNonfinite.skip, 2
    assert go(conf, tmp_path)["status"] == "finished"
    assert sorted(path.name for path in (tmp_path / "bad_batch").iterdir()) == [
        *("step_2.json", "step_2.pt", "step_8.json", "step_8.pt")
    ]
    facts = json.loads((tmp_path / "bad_batch" / "step_8.json").read_text())
    assert (facts["epoch"], facts["step"], facts["first_micro_batch"]) == (2, 8, 1)  # six steps an epoch
    assert len(facts["images"]) == 8 and all(name.endswith(".png") for name in facts["images"])
    assert facts["rates"]["head.decay"] == pytest.approx(0.5e-3)
    assert (tmp_path / "run.log").read_text().count("The step is skipped") == 2
    assert read_state(tmp_path / "checkpoints" / "last.pt")["guard"] == {"total": 2}
    assert main(["replay", str(tmp_path), "--step", "8"]) == 0
    assert "the images themselves" in capsys.readouterr().out
    folder = tmp_path / "bad_batch"
    shutil.copy(folder / "step_8.pt", folder / "step_9.pt")
    assert main(["replay", str(tmp_path), "--step", "9"]) == 1, "a file of another step"
    assert "step_9.pt is damaged: it is not the batch" in capsys.readouterr().err
    (folder / "step_9.pt").unlink()
    marker = (tmp_path / ".finetune.json").read_text()
    (tmp_path / ".finetune.json").write_text(marker.replace(json.loads(marker)["id"], "0" * 16))
    assert main(["replay", str(tmp_path), "--step", "8"]) == 1, "a file of another run"
    assert "step_8.pt is damaged: it is not the batch" in capsys.readouterr().err
    (tmp_path / ".finetune.json").write_text(marker)
    assert main(["replay", str(tmp_path), "--step", "3"]) == 1
    assert "stored steps: 2, 8" in capsys.readouterr().err


def test_a_replay_freezes_what_the_run_froze(
    stripes: Path, tmp_path: Path, poisoned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """So it computes the gradients that the run computed, and no others."""
    poisoned(1, 1)
    conf = small(stripes, optim__fix_layer=4, optim__freeze=["*ln_post.*"])
    conf.train.on_nonfinite = OnNonfinite.skip
    go(conf, tmp_path)
    capsys.readouterr()
    assert main(["replay", str(tmp_path), "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert "gradient of visual.transformer.resblocks.4." in said and "gradient of head.weight" in said
    assert not any(f"resblocks.{block}." in said for block in range(4))
    assert "ln_post" not in said and "conv1" not in said


def test_one_bad_step_too_many_ends_the_run(stripes: Path, tmp_path: Path, poisoned: Any) -> None:
    poisoned(1, 4)
    conf = small(stripes)
    conf.train.on_nonfinite, conf.train.max_nonfinite = OnNonfinite.skip, 2
    with pytest.raises(NotFiniteError, match=r"epoch 1, step 4.*one step more than.*finetune replay"):
        go(conf, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"
    assert len(list((tmp_path / "bad_batch").glob("*.pt"))) == 3


# --- as a person does it --------------------------------------------------------------------------------------------


def test_resume_on_the_command_line(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data=folder", f"data.root={stripes}", "data.batch_size=8", "train.epochs=1"]) == 0
    (folder,) = Path("outputs").glob("*/*")
    capfd.readouterr()
    assert main(["resume=latest"]) == 0
    shown = capfd.readouterr().out
    assert "nothing to do" in shown and str(folder) in shown
    assert main([f"resume={folder}", "optim.lr=1e-4", "model=vit"]) == 1
    refused = capfd.readouterr().err
    assert refused.count("\n") == 1
    for word in ("optim.lr: 0.001 -> 0.0001", "model.family: clip -> vit", "resume_force=true"):
        assert word in refused
    assert main([f"resume={folder}", "train.epochs=2"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["overrides"][-1] == "train.epochs=2" and "train.epochs=1" not in result["overrides"]
    assert result["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resume=nowhere"], ["no such folder"]),
        (["resume=latest"], ["no run under outputs"]),
        (["resume=."], ["no config.yaml"]),
        (["resume=no\x1b[31mred"], ["no\\x1b[31mred"]),
        (["resume=a", "-m"], ["leave -m out"]),
        (["resume=a", "hydra.run.dir=b"], ["hydra.run.dir=b", "says the folder"]),
        (["resume=a", "optim.lrr=1"], ["optim.lr"]),
        (["resume_force=true"], ["resume=PATH"]),
    ],
)
def test_mistakes_with_resume_are_one_line(
    words: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("seed: 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in expected:
        assert word in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "config.yaml"]


def test_a_signal_to_the_group_while_workers_start(stripes: Path, tmp_path: Path) -> None:
    """Twice in a row, as impatient schedulers do; the exit code is the first one's, and the run can go on."""
    words = ["data=folder", f"data.root={stripes}", "data.batch_size=8", "train.epochs=2", "data.workers=2"]
    process = finetune(*words, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, wait=False)
    log = tmp_path / "run" / "run.log"
    while not (log.exists() and "computing on" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run" / RUN_LOCK).exists()
    assert main([f"resume={tmp_path}/run"]) == 0
    go(small(stripes), tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB. Another process unmounts it once the pipe to this one ends, so also after a kill."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and sys.platform == "linux" and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    unmount = ["sh", "-c", 'read -r _; umount -l "$0"', str(place)]
    with subprocess.Popen(unmount, stdin=subprocess.PIPE, start_new_session=True):
        yield place
    assert not os.path.ismount(place)


def test_a_full_disk_stops_the_run_with_the_checkpoint_before_it_whole(
    stripes: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint and its weights are 25 MB: the second does not fit beside the first."""
    words = ["data=folder", f"data.root={stripes}", "data.batch_size=8", "train.epochs=4", "train.max_save_share=1"]
    assert main([*words, f"hydra.run.dir={small_disk}/run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("cannot save a checkpoint", "is whole", "MiB", "resume="):
        assert word in line
    content = read_state(small_disk / "run" / "checkpoints" / "last.pt")
    assert content["counters"]["step"] >= 5
    assert not list((small_disk / "run").rglob("*.tmp"))
    shutil.copytree(small_disk / "run", tmp_path / "run")
    assert main([f"resume={tmp_path}/run"]) == 0
    conf = small(stripes)
    conf.train.epochs = 4
    go(conf, tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "run")
