"""What was edited or damaged in a run's small files is seen, and treated as the same change on the command line is."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import assert_same_run, go, history, small

from finetune.app.run import run
from finetune.config import PLACES, as_dict
from finetune.config.words.saved import base_of
from finetune.core import fit as fitting
from finetune.runs import epoch_files
from finetune.runs.checkpoint import read_state
from finetune.runs.earlier import FREE, ROUNDING, Change, EarlierRun, digest_of, flat
from finetune.system.errors import UserError
from finetune.system.ours import RefusedError


class KilledError(Exception):
    """A kill: nothing is saved after it."""


@pytest.fixture(scope="module")
def straight(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    go(small(stripes), folder)
    return folder


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = fitting.train_step, 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(fitting, "train_step", struck)


@pytest.mark.parametrize("edit", ["curve", "gone"])
def test_the_curve_before_a_change_of_epochs_comes_from_the_checkpoint_and_not_from_an_edited_file(
    edit: str, straight: Path, stripes: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    conf = small(stripes, train__epochs=3, train__save_every_steps=1, resume=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(KilledError):
            run(conf, folder, [], quiet=True)
    written = json.loads((folder / "rates.json").read_text())
    assert written["before"]["epochs"] == 2
    edited = {name: value for name, value in written.items() if name != "before"}
    if edit == "curve":
        edited["before"] = {**written["before"], "epochs": 1}
    (folder / "rates.json").write_text(json.dumps(edited))
    run(conf, folder, [], quiet=True)
    assert json.loads((folder / "rates.json").read_text()) == written


@pytest.mark.parametrize("error", [UserError("no such images"), KeyboardInterrupt()])
def test_a_finished_run_whose_longer_start_fails_stays_finished(
    error: BaseException, straight: Path, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["epochs"] += 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = (folder / "result.json").read_bytes()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("finetune.app.run.build_run", fails)
    conf = small(stripes, train__epochs=config["train"]["epochs"])
    conf.resume = str(folder)
    with pytest.raises(type(error)):
        run(conf, folder, [], quiet=True)
    assert (folder / "result.json").read_bytes() == before


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("edit", ["another score", "[]", "gone"])
def test_scores_in_files_of_an_earlier_start_are_not_believed(
    edit: str, ema: float, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fitting, epoch_files):
        monkeypatch.setattr(module, "is_better", lambda score, best, *_, **__: math.isnan(best))  # the first one stays
    conf, unbroken, folder = small(stripes, train__ema=ema), tmp_path / "unbroken", tmp_path / "run"
    assert go(conf, unbroken)["best_epoch"] == 1
    with pytest.MonkeyPatch.context() as patch:
        kill_at(8, patch)
        with pytest.raises(KilledError):
            go(conf, folder)
    names = ("metrics.json", "confusion_val.csv")
    for name in names:
        text = (folder / name).read_text()
        if edit == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_text(edit if edit == "[]" else re.sub(r"[0-9]", "7", text))
    again(folder)
    for name in names:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


@pytest.fixture(scope="module")
def halfway(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was killed in the second, after the save at the end of the first."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(8, patch)
        with pytest.raises(KilledError):
            go(small(stripes), folder)
    return folder


@pytest.fixture
def begun(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def again(folder: Path, **changes: object) -> dict[str, Any]:
    """`resume=FOLDER` with what its own config.yaml says."""
    conf = base_of(folder)
    conf.resume = str(folder)
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        setattr(getattr(conf, part) if part else conf, name, value)
    return run(conf, folder, [], quiet=True)


def edit(folder: Path, key: str, value: object) -> None:
    path = folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    section, _, name = key.rpartition(".")
    (tree[section] if section else tree)[name] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def edit_result(folder: Path, **changes: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_that_nobody_edited_goes_on_to_the_bit(begun: Path, straight: Path) -> None:
    assert again(begun)["promise"] == "bitwise"
    assert_same_run(straight, begun)


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("optim.lr", 0.001, 0.002),
        ("seed", 0, 1),
        ("data.batch_size", 8, 4),
        ("train.epochs", 2, 1),
        ("augment.views", 0, 1),
        ("sched.mode", "linear", "cosine"),
        ("model.head_dropout", 0.0, 0.5),
    ],
)
@pytest.mark.parametrize("is_same_command", [False, True])
def test_an_edited_config_is_the_same_change_as_on_the_command_line(
    begun: Path, key: str, before: Any, now: Any, is_same_command: bool
) -> None:
    edit(begun, key, now)
    files = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != "run.log"}
    with pytest.raises(RefusedError, match=rf"{key}: {before} -> {now}.*resume_force=true"):
        run(base_of(begun), begun, [], quiet=True) if is_same_command else again(begun)
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file() and p.name != "run.log"} == files


def test_an_edit_may_be_forced_and_costs_the_promise(begun: Path) -> None:
    edit(begun, "optim.lr", 0.002)
    result = again(begun, resume_force=True)
    assert (result["promise"], result["promise_reasons"]) == ("none", ["forced optim.lr: 0.001 -> 0.002"])
    assert history(begun)[1]["lr"]["head.decay"] == pytest.approx(0.001)
    assert "+ optim.lr: 0.002   (forced)" in (begun / "run.log").read_text()


def test_an_edit_of_what_may_change_is_shown_and_goes_on(begun: Path, straight: Path) -> None:
    edit(begun, "data.workers", "1")
    edit(begun, "train.patience", 3)
    assert again(begun)["promise"] == "bitwise"
    assert_same_run(straight, begun)
    log = (begun / "run.log").read_text()
    assert "changed in config.yaml since the checkpoint was made" in log and "+ data.workers: 1" in log


def test_more_epochs_by_an_edit_are_more_epochs(begun: Path, stripes: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(begun, tmp_path / "other"))
    edit(begun, "train.epochs", 4)
    edited, asked = again(begun), again(other, train__epochs=4)
    assert edited["promise"] == asked["promise"] == "none" and edited["epochs"] == 4
    assert edited["promise_reasons"] == asked["promise_reasons"]
    assert_same_run(begun, other)


def test_an_edit_of_a_finished_run_is_seen_too(straight: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(straight, tmp_path / "run"))
    assert again(folder)["status"] == "finished"
    edit(folder, "optim.lr", 0.002)
    with pytest.raises(RefusedError, match=r"optim\.lr: 0\.001 -> 0\.002"):
        again(folder)
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    edit(folder, "optim.lr", 0.001)
    edit(folder, "train.epochs", 3)
    assert again(folder)["epochs"] == 3


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_change_that_was_forced_once_is_not_asked_for_again(
    begun: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    """A kill after the new settings were accepted, before or after a state was saved with them."""
    with monkeypatch.context() as patch:
        kill_at(3 if is_saved else 1, patch)
        with pytest.raises(KilledError):
            again(begun, optim__lr=0.002, train__save_every_steps=1, resume_force=True)
    saved = json.loads(read_state(begun / "checkpoints" / "last.pt")["notes"]["settings"])
    assert saved["optim.lr"] == (0.002 if is_saved else 0.001)
    result = again(begun)
    assert result["promise"] == "none" and result["status"] == "finished"
    assert history(begun)[1]["lr"]["head.decay"] == pytest.approx(0.001)


def test_allowed_changes_outlive_a_kill_before_the_next_save(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(1, patch)
        with pytest.raises(KilledError):
            again(begun, train__epochs=4, data__workers="1")
    result = again(begun)
    assert result["epochs"] == 4 and result["promise"] == "none"
    assert json.loads((begun / "rates.json").read_text())["before"]["epochs"] == 2


def test_every_flipped_bit_of_the_config_is_refused_shown_or_without_effect(halfway: Path, tmp_path: Path) -> None:
    text = read_state(halfway / "checkpoints" / "last.pt")["notes"]["settings"]
    whole = (halfway / "config.yaml").read_bytes()
    before = flat(as_dict(base_of(halfway)))
    dice, seen = random.Random(0), set()
    for _ in range(150):
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        (tmp_path / "config.yaml").write_bytes(data)
        try:
            settings = as_dict(base_of(tmp_path))
            changes = EarlierRun(digest=digest_of(settings)).since_state(text, settings, force=False).changes
        except UserError as error:
            seen.add(type(error).__name__)
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        now = flat(settings)
        assert {c.key for c in changes} == {key for key in now if now[key] != before[key] and key != "resume"}
        assert {c.key for c in changes} <= {
            *FREE,
            *ROUNDING,
            *PLACES,
            "train.epochs",
        }  # images at a place have a fingerprint
    assert seen == {"ConfigError", "RefusedError"}


def test_a_promise_that_somebody_improved_is_not_believed(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KilledError):
            again(begun, train__class_token_only="off", train__save_every_steps=1)
    edit_result(begun, promise="bitwise", promise_reasons=[])
    assert again(begun)["promise"] == "close"


def test_the_state_of_another_run_is_refused(begun: Path, stripes: Path, tmp_path: Path) -> None:
    """Nobody forced its settings, though `config.yaml` and `result.json` agree."""
    go(small(stripes, optim__lr=0.004, train__epochs=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.pt", begun / "checkpoints")
    before = {path: path.read_bytes() for path in begun.rglob("*.*") if path.is_file() and path.name != "run.log"}
    with pytest.raises(RefusedError, match=r"optim\.lr: 0\.004 -> 0\.001"):
        again(begun)
    assert {path: path.read_bytes() for path in before} == before


def test_weights_of_another_epoch_are_not_taken_for_the_best(begun: Path, straight: Path) -> None:
    state = read_state(straight / "checkpoints" / "last.pt")
    assert state["counters"]["best_epoch"] == 2  # and the folder has those of epoch 1
    shutil.copy(straight / "checkpoints" / "last.pt", begun / "checkpoints")
    with pytest.raises(UserError, match=r"last\.safetensors does not hold the weights that this run saved"):
        again(begun)
    shutil.copy(straight / "checkpoints" / "last.safetensors", begun / "checkpoints")
    with pytest.raises(UserError, match=r"epoch_0002\.safetensors is gone, the weights of the best epoch"):
        again(begun)
    shutil.copy(straight / "checkpoints" / "best.safetensors", begun / "checkpoints" / "epoch_0002.safetensors")
    again(begun)
    assert_same_run(straight, begun)


def test_a_finished_run_without_its_state_is_not_begun_anew(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "checkpoints" / "last.pt").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.name != "run.log"}
    again(run)  # nothing to do
    with pytest.raises(RefusedError, match=r"no last\.pt any more"):
        again(run, train__epochs=3)
    assert {path: path.read_bytes() for path in before} == before


def test_an_edited_history_is_restored(begun: Path, straight: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = begun / "history.jsonl"
    damages: dict[str, Callable[[str], str | None]] = {
        "edited": lambda text: text.replace('"val/top1": ', '"val/top1": 1'),
        "cut": lambda text: text[:20] + "\n",
        "damaged": lambda text: "[" * 20_000,
        "gone": lambda text: None,
    }
    whole, files = path.read_text(), Path(shutil.copytree(begun, begun.parent / "copy"))
    for damage in damages.values():
        shutil.rmtree(begun)
        shutil.copytree(files, begun)
        text = damage(whole)
        path.unlink() if text is None else path.write_text(text)
        again(begun)
        assert_same_run(straight, begun)
        assert "its rows are restored" in (begun / "run.log").read_text()


def test_the_batch_that_auto_found_is_that_of_the_state(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "auto"
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(KilledError):
            go(small(stripes, data__batch_size=0), folder)
    size = json.loads((folder / "result.json").read_text())["auto_batch_size"]
    edit_result(folder, auto_batch_size=size // 2)
    with pytest.raises(UserError, match=f"auto_batch_size.*{size} images x 1 -> {size // 2} images x 2"):
        again(folder)


def test_a_difference_is_shown_in_the_words_that_a_person_writes() -> None:
    assert str(Change("data.batch_size", 0, 8)) == "data.batch_size: fit -> 8"
    assert str(Change("train.patience", 0, 8)) == "train.patience: 0 -> 8"
