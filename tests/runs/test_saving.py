"""Checkpoints survive what befalls them: damage, a full disk, a kill between two files, a second process."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from tiny_runs import tiny_fit, tiny_state

from finetune.app.batch_size import DEFAULT_BATCH, divisors, largest_fitting, out_of_memory, with_batch
from finetune.config import Conf, TrainConf
from finetune.core.loop import TrainState
from finetune.runs import saving
from finetune.runs.checkpoint import (
    DamagedError,
    load_state,
    put_weights,
    read_state,
    read_weights,
    save_state,
    save_weights,
    snapshot,
)
from finetune.runs.saving import NoSpaceError, Saver, best_epochs, latest_state, settle
from finetune.system.files import write_text


def saver(folder: Path, **kwargs: int) -> Saver:
    return Saver(folder, {"classes": "[]"}, {"machine": "this one"}, **kwargs)


def at_step(step: int) -> TrainState:
    state = tiny_state(tiny_model(seed=step))
    state.step = step
    return state


# --- what is written is what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.95])
def test_a_state_with_one_flipped_bit_is_refused(tmp_path: Path, position: float) -> None:
    path = tmp_path / "last.pt"
    state = tiny_state(tiny_model())
    tiny_fit(state, TrainConf(epochs=1))
    save_state(path, state)
    weights = state.model.net.stem.weight.detach().numpy().tobytes()
    data = bytearray(path.read_bytes())
    place = data.index(weights) + int(position * len(weights))
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"last\.pt"):
        load_state(path, tiny_state(tiny_model()))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_state_cut_short_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "last.pt"
    save_state(path, tiny_state(tiny_model()))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DamagedError, match=r"last\.pt"):
        read_state(path)


def test_a_state_holds_no_frozen_tensor_and_goes_on_above_the_same_ones_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "last.pt", tiny_model(dropout=0.3)
    state = tiny_state(model, fix_layer=1)
    tiny_fit(state, TrainConf(epochs=1))
    save_state(path, state)
    saved = read_state(path)["model"]
    assert saved.keys() == {name for name in model.net.state_dict() if model.layer_ids[name] > 1} != set()

    same, other = tiny_model(dropout=0.3), tiny_model(seed=1, dropout=0.3)
    for each in (same, other):
        tiny_fit(tiny_state(each, fix_layer=1), TrainConf(epochs=2))  # what learns is elsewhere by now
    load_state(path, tiny_state(same, fix_layer=1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"other frozen layers.*no weights beside it.*model\.pretrained"):
        load_state(path, tiny_state(other, fix_layer=1))


def test_a_state_of_before_brings_its_frozen_tensors_along(tmp_path: Path) -> None:
    """Format 3 held the whole network; runs that were stopped then go on."""
    path, model, other = tmp_path / "last.pt", tiny_model(), tiny_model(seed=1)
    content = snapshot(tiny_state(model, fix_layer=1))
    torch.save({**content, "format": 3, "model": model.net.state_dict()}, path)
    load_state(path, tiny_state(other, fix_layer=1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_best_weights_are_at_hand_while_they_are_written_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, state, gates = saver(tmp_path), at_step(1), [threading.Event(), threading.Event()]
    first_gate, second_gate = gates
    state.epoch = state.best_epoch = 1
    write = saving.write_weights

    def slow(*args: object) -> None:
        gates.pop(0).wait(60)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_weights", slow)
    rows = [{"epoch": 1, "val/top1": 0.5}, {"epoch": 2, "val/top1": 0.9}]
    keeper.save_epoch(state, rows[:1], "val/top1")
    assert not (tmp_path / "best.safetensors").exists()
    first = keeper.best_weights()
    first_gate.set()
    with torch.no_grad():
        state.model.net.head.weight.add_(1)
    state.epoch = state.best_epoch = 2
    keeper.save_epoch(state, rows, "val/top1")  # the first may be under way still
    early = keeper.best_weights()
    assert torch.equal(early["head.weight"], state.model.net.head.weight)
    assert not torch.equal(early["head.weight"], first["head.weight"])
    second_gate.set()
    keeper.wait()
    late = keeper.best_weights()
    assert early.keys() == late.keys() and all(torch.equal(early[name], late[name]) for name in early)


def test_a_kill_behind_the_last_state_leaves_nothing_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, state = saver(tmp_path, keep=2), at_step(1)
    state.epoch = 2
    rows = [{"epoch": 1, "val/top1": 0.9}, {"epoch": 2, "val/top1": 0.5}]
    state.best_epoch = 1
    there: list[set[str]] = []
    monkeypatch.setattr(
        saving, "write_state", lambda path, *args, **kw: there.append({p.name for p in tmp_path.iterdir()})
    )
    keeper.save_epoch(state, rows, "val/top1", always=True)
    keeper.wait()
    assert there == [{"last.safetensors", "epoch_0002.safetensors"}]


def test_frozen_tensors_of_another_processor_are_taken_from_the_weights_beside(tmp_path: Path) -> None:
    """What is computed as a model is built differs there in its last bits: the run goes on with those of its start."""
    path, model = tmp_path / "last.pt", tiny_model()
    save_state(path, tiny_state(model, fix_layer=1))
    save_weights(tmp_path / "last.safetensors", model, {})
    other = tiny_model()
    with torch.no_grad():
        other.net.stem.weight.mul_(1 + 1e-6)
    load_state(path, tiny_state(other, fix_layer=1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_weights_carry_a_checksum(tmp_path: Path) -> None:
    path, model = tmp_path / "best.safetensors", tiny_model()
    save_weights(path, model, {"classes": "[]"})
    other = tiny_model(seed=3)
    put_weights(read_weights(path)[0], other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum"):
        read_weights(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_a_pickle_that_runs_code_is_refused_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 3, "model": _Runs()}, "last.pt")
    with pytest.raises(DamagedError, match=r"could run code|can run code"):
        read_state(Path("last.pt"))
    Path("old.pt").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(DamagedError):
        read_state(Path("old.pt"))
    assert not Path("ran").exists()


# --- one before is kept ---------------------------------------------------------------------------------------------


def test_a_damaged_last_falls_back_to_the_one_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = saver(tmp_path)
    for step in (1, 2, 3):
        keeper.save(at_step(step))
    keeper.wait()
    found = latest_state(tmp_path)
    assert found is not None and found[0]["counters"]["step"] == 3 and found[0]["notes"] == {"machine": "this one"}

    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    with caplog.at_level("WARNING", logger="finetune"):
        found = latest_state(tmp_path)
    assert found is not None and found[0]["counters"]["step"] == 2
    assert "Falling back" in caplog.text and "step 2" in caplog.text
    assert (tmp_path / "damaged.pt").exists()
    keeper.save(at_step(4))
    keeper.wait()
    assert read_state(tmp_path / "last.pt")["counters"]["step"] == 4
    assert read_state(tmp_path / "previous.pt")["counters"]["step"] == 2

    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"previous\.pt"):
        latest_state(tmp_path)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    found = latest_state(tmp_path)
    assert found is not None and found[0]["counters"]["step"] == 1
    assert latest_state(tmp_path / "nowhere") is None


def test_what_is_saved_is_the_state_at_that_moment(tmp_path: Path) -> None:
    """Training goes on while a thread writes: not a byte of what comes later may be in the file."""
    keeper, state = saver(tmp_path), at_step(1)
    before = {name: value.clone() for name, value in state.model.net.state_dict().items()}
    keeper.save(state)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(7.0)
    keeper.wait()
    saved = read_state(tmp_path / "last.pt")["model"]
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_a_kill_between_keeping_and_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    keeper.save(at_step(2))
    keeper.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert [read_state(tmp_path / name)["counters"]["step"] for name in ("previous.pt", "last.pt")] == [1, 2]


@pytest.mark.parametrize("saved", [True, False])
def test_the_best_weights_change_hands_only_with_the_state(tmp_path: Path, saved: bool) -> None:
    """Killed after the new best weights were written: they count if the state that says so is there, and else not."""
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    save_weights(tmp_path / "best.safetensors", old, {"epoch": "1"})
    save_weights(tmp_path / saving.PENDING, new, {"epoch": "2"})
    write_text(tmp_path / "epoch_0002.safetensors", "")
    write_text(tmp_path / ".last.pt.123.tmp", "half")
    state = at_step(5)
    state.epoch = state.best_epoch = 2 if saved else 1
    settle(tmp_path, state)
    tensors, metadata = read_weights(tmp_path / "best.safetensors")
    assert metadata["epoch"] == ("2" if saved else "1")
    assert torch.equal(tensors["head.weight"], (new if saved else old).net.head.weight)
    left = {"best.safetensors", "epoch_0002.safetensors"} if saved else {"best.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_best_k_and_last_are_kept(tmp_path: Path) -> None:
    keeper, rows = saver(tmp_path, keep=2), []
    for epoch, score in enumerate([0.3, 0.9, 0.5, 0.9, 0.7], start=1):
        state = at_step(epoch)
        state.epoch = epoch
        rows.append({"epoch": epoch, "val/top1": score})
        state.best_epoch = best_epochs(rows, "val/top1", 1)[0]
        keeper.save_epoch(state, rows, "val/top1")
    keeper.wait()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("last.pt", "previous.pt", "last.safetensors", "best.safetensors"),
        *("epoch_0002.safetensors", "epoch_0004.safetensors"),
    }
    assert read_weights(tmp_path / "best.safetensors")[1]["epoch"] == "2"


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, float("nan")]), min_size=1), st.integers(1, 5))
def test_the_best_epochs_are_those_of_a_stable_sort(scores: list[float], count: int) -> None:
    rows = [{"epoch": i, "val/loss": None if s != s else s} for i, s in enumerate(scores)]
    wanted = sorted(range(len(scores)), key=lambda i: scores[i] if scores[i] == scores[i] else 9.0)
    assert best_epochs(rows, "val/loss", count) == wanted[:count]


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_free_space_is_looked_at_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    keeper.save(at_step(2))
    with pytest.raises(NoSpaceError, match=r"MB are needed and 0\.0 MB are free.*that of step 1 is whole.*resume="):
        keeper.wait()
    assert read_state(tmp_path / "last.pt")["counters"]["step"] == 1
    keeper.check()  # told once


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()

    def torn(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", torn)
    keeper.save(at_step(2))
    with pytest.raises(NoSpaceError, match="that of step 1 is whole"):
        keeper.wait()
    assert read_state(tmp_path / "last.pt")["counters"]["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt"}


# --- data.batch_size=auto -------------------------------------------------------------------------------------------


@given(st.integers(1, 512), st.integers(0, 600))
def test_the_search_finds_the_largest_that_fits(batch: int, limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    expected = max((size for size in divisors(batch) if size <= limit), default=None)
    assert largest_fitting(divisors(batch), fits) == expected
    assert len(tried) <= len(divisors(batch)).bit_length()


def test_advice_where_memory_runs_out() -> None:
    """Who asked for `auto` is not sent in a circle."""
    parts = Mock(device=torch.device("cpu"), conf=Conf(), is_auto_batch=False)
    text = out_of_memory(parts, step=4)
    assert "in step 5" in text and "data.batch_size=32 train.accumulate=2" in text and "data.batch_size=auto" in text
    parts.is_auto_batch = True
    text = out_of_memory(parts)
    assert "out of memory on cpu. Try" in text and "data.batch_size=auto" not in text


def test_a_found_batch_keeps_the_images_of_a_step() -> None:
    conf = Conf()
    conf.train.accumulate = 3
    found = with_batch(conf, 48)
    assert found.data.batch_size * found.train.accumulate == DEFAULT_BATCH * 3
    conf.optim.recipe_batch = 2048
    assert with_batch(conf, 256).train.accumulate == 8


# --- saves that would take too much of the time ----------------------------------------------------------------------


def test_an_epoch_that_comes_too_soon_is_saved_with_a_later_one(tmp_path: Path) -> None:
    keeper, rows, kept = Saver(tmp_path, {}, {}, max_share=0.1), [], {}
    for epoch, (score, cost_s, is_saved) in enumerate([(0.3, 0, True), (0.9, 50, False), (0.5, 50, False)], start=1):
        keeper.wait()
        keeper._cost_s = cost_s
        state = at_step(epoch)
        state.epoch = epoch
        with torch.no_grad():
            state.model.net.head.weight.add_(epoch)
        kept[epoch] = state.model.net.head.weight.detach().clone()
        rows.append({"epoch": epoch, "val/top1": score})
        state.best_epoch = best_epochs(rows, "val/top1", 1)[0]
        assert keeper.save_epoch(state, rows, "val/top1") is is_saved
    keeper.wait()
    assert torch.equal(read_weights(tmp_path / "best.safetensors")[0]["head.weight"], kept[1])
    keeper.save(state)  # a signal, say: the state speaks of epoch 2 as the best, so its weights come along
    keeper.wait()
    tensors, metadata = read_weights(tmp_path / "best.safetensors")
    assert torch.equal(tensors["head.weight"], kept[2]) and metadata["epoch"] == "2"
    assert latest_state(tmp_path)[0]["counters"]["best_epoch"] == 2  # type: ignore[index]
    keeper.save_epoch(state, rows, "val/top1", always=True)
    keeper.wait()
    assert torch.equal(read_weights(tmp_path / "last.safetensors")[0]["head.weight"], kept[3])


def test_better_weights_of_a_run_that_diverged_do_not_cost_those_its_state_speaks_of(tmp_path: Path) -> None:
    """Epoch 1 is saved, epoch 2 is better and stays in memory, then the run diverges; it goes on from epoch 1."""
    keeper, rows, kept = Saver(tmp_path, {}, {}, max_share=0.1), [], {}
    for epoch, score in ((1, 0.3), (2, 0.9)):
        keeper.wait()
        keeper._cost_s = (epoch - 1) * 50
        state = at_step(epoch)
        state.epoch = state.best_epoch = epoch
        kept[epoch] = state.model.net.head.weight.detach().clone()
        rows.append({"epoch": epoch, "val/top1": score})
        assert keeper.save_epoch(state, rows, "val/top1") is (epoch == 1)
    keeper.save_weights(state)
    best = tmp_path / "best.safetensors"
    assert torch.equal(read_weights(best)[0]["head.weight"], kept[2])  # for a person to use
    content, path = latest_state(tmp_path)  # type: ignore[misc]
    again = at_step(7)
    load_state(path, again)
    assert content["counters"]["best_epoch"] == again.best_epoch == 1
    settle(tmp_path, again)
    assert torch.equal(read_weights(best)[0]["head.weight"], kept[1]) and not (tmp_path / saving.BEFORE).exists()


def test_weights_put_aside_for_another_state_go(tmp_path: Path) -> None:
    save_weights(tmp_path / "best.safetensors", tiny_model(seed=2), {"epoch": "2"})
    save_weights(tmp_path / saving.BEFORE, tiny_model(seed=1), {"epoch": "1"})
    before, state = (tmp_path / "best.safetensors").read_bytes(), at_step(2)
    state.epoch = state.best_epoch = 2
    settle(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]
    assert (tmp_path / "best.safetensors").read_bytes() == before


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    keeper = saver(folder)
    folder.rmdir()
    keeper.save(at_step(1))
    with pytest.raises(NoSpaceError, match=r"cannot save .*checkpoints: No such file or directory\. The"):
        keeper.wait()


def test_a_state_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop right behind a save finds everything on the disk."""
    written: list[Path] = []
    write = saving.write_state
    monkeypatch.setattr(saving, "write_state", lambda path, *a, **k: (written.append(path), write(path, *a, **k)))
    keeper, state = saver(tmp_path), at_step(3)
    for step in (3, 3, 4, 4):
        state.step = step
        keeper.save(state)
    state.epoch = 1
    keeper.save_epoch(state, [{"epoch": 1, "val/top1": 0.5}], "val/top1", always=True)
    keeper.save(state)
    keeper.wait()
    assert len(written) == 3


@pytest.mark.parametrize(("cost_s", "left_s", "is_saved"), [(5, 101, True), (5, 99, False), (0.05, 0, True)])
def test_shortly_before_the_end_the_last_save_will_do(
    tmp_path: Path, cost_s: float, left_s: float, is_saved: bool
) -> None:
    """A save of 5 seconds in every 100, where 5 % are allowed; one that costs nothing is made in any case."""
    keeper, state = Saver(tmp_path, {}, {}, max_share=0.05), at_step(1)
    state.epoch = 1
    row = {"epoch": 1, "val/top1": 0.5}
    keeper.save_epoch(state, [row], "val/top1", always=True)
    keeper.wait()
    keeper._cost_s, keeper._saved_at = cost_s, keeper._saved_at - 1000
    assert keeper.save_epoch(state, [row], "val/top1", left_s=left_s) is is_saved
    keeper.wait()


def test_the_same_weights_are_written_once(tmp_path: Path) -> None:
    keeper, state = Saver(tmp_path, {}, {}), at_step(1)
    state.epoch = state.best_epoch = 1
    keeper.save_epoch(state, [{"epoch": 1, "val/top1": 0.5}], "val/top1")
    keeper.wait()
    best, last = tmp_path / "best.safetensors", tmp_path / "last.safetensors"
    assert best.samefile(last)
    state.epoch = 2
    before = best.read_bytes()
    keeper.save_epoch(state, [{"epoch": 1, "val/top1": 0.5}, {"epoch": 2, "val/top1": 0.1}], "val/top1")
    keeper.wait()
    assert not best.samefile(last) and best.read_bytes() == before
