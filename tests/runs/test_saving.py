"""Checkpoints survive damage, a full disk and a kill at any moment of a save."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import tiny_batches, tiny_model
from tiny_runs import load_state, save_state, save_weights, tiny_fit, tiny_state

from finetune.config import OptimConf, TrainConf
from finetune.core.ema import Ema
from finetune.core.loop import TrainState, train_step
from finetune.runs import saver as saving
from finetune.runs.checkpoint import read_state, snapshot
from finetune.runs.epoch_files import best_epochs, latest_state, settle
from finetune.runs.saver import NoSpaceError, Saver
from finetune.runs.weights import put_weights, read_weights
from finetune.system.errors import UserError
from finetune.system.ours import FolderKind, claim, sweep_temporaries
from finetune.system.reading import DamagedError
from finetune.system.seals import seal


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


def test_a_state_made_to_keep_python_busy_or_to_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """A run folder from elsewhere: numbers of one hash for keys, in a zip or before one, and records of nothing."""
    path, inner = tmp_path / "last.pt", io.BytesIO()
    keys = b"".join(b"\x8a\x0b" + (number * (2**61 - 1)).to_bytes(11, "little") + b"N" for number in range(30_000))
    busy = b"\x80\x02}(" + keys + b"u."
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("last/data.pkl", busy)
    behind = io.BytesIO(busy)
    behind.seek(0, os.SEEK_END)
    with zipfile.ZipFile(behind, "a") as archive:
        archive.writestr("last/data.pkl", pickle.dumps({}, protocol=2))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("last/data/0", bytes(2**26))
    for made, reason in ((inner, "odd keys"), (behind, "odd keys"), (bomb, "claim to hold")):
        path.write_bytes(made.getvalue())
        seal(path)
        with pytest.raises(UserError, match=reason):
            read_state(path)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({**snapshot(tiny_state(tiny_model())), "format": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="no checkpoint of this version"):
        read_state(tmp_path / "last.pt")


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_step_on_a_cpu_waits_for_the_save_that_shares_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finite: bool
) -> None:
    """A step that is not finite calls no optimizer without a fused kernel, and yet it writes to the averages."""
    conf = OptimConf(lr=0.02) if is_finite else OptimConf(name="adafactor", lr=0.02)
    keeper, state, gate = saver(tmp_path), tiny_state(tiny_model(), conf), threading.Event()
    state.ema, state.guard.limit = Ema(state.model, 0.9), 1
    train_step(state, tiny_batches([4]), TrainConf())
    write = saving.write_state

    def slow(*args: Any, **kwargs: Any) -> None:
        gate.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_state", slow)
    before = {name: tensor.clone() for name, tensor in state.model.net.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    keeper.save(state)
    threading.Timer(0.5, gate.set).start()
    inputs, targets, ids = tiny_batches([4])[0]
    train_step(state, [(inputs if is_finite else inputs * float("nan"), targets, ids)], TrainConf())
    assert gate.is_set()
    keeper.wait()
    saved = read_state(tmp_path / "last.pt")
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(saved["ema"][name], tensor) for name, tensor in averages.items())
    for after, earlier in ((state.ema.state_dict(), averages), (state.model.net.state_dict(), before)):
        is_same = all(torch.equal(after[name], tensor) for name, tensor in earlier.items())
        assert is_same is not is_finite


def test_a_snapshot_on_a_cpu_copies_no_weights_moments_or_averages(tmp_path: Path) -> None:
    state = tiny_state(tiny_model())
    state.ema = Ema(state.model, 0.9)
    tiny_fit(state, TrainConf(epochs=1))
    content = snapshot(state)
    held = {value.data_ptr() for value in state.model.net.parameters()}
    held |= {value.data_ptr() for moments in state.optimizer.state.values() for value in moments.values()}
    held |= {value.data_ptr() for value in state.ema.state_dict().values()}
    moments = [value for of_one in content["optimizer"]["state"].values() for value in of_one.values()]
    assert all(value.data_ptr() in held for value in [*content["model"].values(), *moments, *content["ema"].values()])


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


def test_a_damaged_name_or_method_in_the_zip_of_last_falls_back_too(tmp_path: Path) -> None:
    """Zip readers raise NotImplementedError, UnicodeDecodeError and more there."""
    keeper = saver(tmp_path)
    for step in (1, 2):
        keeper.save(at_step(step))
        keeper.wait()
    path = tmp_path / "last.pt"
    data = path.read_bytes()
    directory = data.index(b"PK\1\2")
    for place in [*range(0, 60, 7), *range(directory, directory + 60, 3), *range(len(data) - 60, len(data), 3)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 128]) + data[place + 1 :])
        found = latest_state(tmp_path)
        assert found is not None and found[0]["counters"]["step"] == 1 and found[1].name == "previous.pt"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    found = latest_state(tmp_path)
    assert found is not None and found[0]["counters"]["step"] == 1
    assert latest_state(tmp_path / "nowhere") is None


def test_a_kill_between_keeping_and_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    keeper = saver(tmp_path)
    keeper.save(at_step(1))
    keeper.wait()
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    keeper.save(at_step(2))
    keeper.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "previous.pt"}
    assert [read_state(tmp_path / name)["counters"]["step"] for name in ("previous.pt", "last.pt")] == [1, 2]


def save_epochs(keeper: Saver, scores: list[float]) -> None:
    """Save an epoch for each score; the head's weights of epoch n are those of `at_step(n)`."""
    rows: list[dict[str, float]] = []
    for epoch, score in enumerate(scores, start=1):
        state = at_step(epoch)
        rows.append({"epoch": epoch, "val/top1": score})
        state.epoch, state.best_epoch = epoch, best_epochs(rows, "val/top1", 1)[0]
        keeper.save_epoch(state, rows, "val/top1")
    keeper.wait()


def assert_best_is_what_the_state_names(folder: Path) -> int:
    """Settle the folder as a resumed run does; the step of the state that it continues from."""
    found = latest_state(folder)
    state = at_step(99)
    if found is not None:
        load_state(found[1], state)
    sweep_temporaries(folder, FolderKind.run)
    settle(folder, state, 4, {} if found is None else found[0]["weights"])
    if state.best_epoch:
        tensors, metadata = read_weights(folder / "best.safetensors")
        assert metadata["epoch"] == str(state.best_epoch)
        assert torch.equal(tensors["head.weight"], at_step(state.best_epoch).model.net.head.weight)
    assert not list(folder.glob(".*.tmp"))
    return state.step


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("has_links", [True, False])
def test_a_kill_at_any_moment_of_a_save_leaves_the_best_weights_that_the_state_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, has_links: bool
) -> None:
    """Each write, rename, link and removal of a save is the last one in turn; so is `last.pt` without its new bytes."""
    calls, limit = 0, 0

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KilledError
            return original(*args, **named)

        return call

    class KilledError(OSError):
        """Stands for SIGKILL; in a thread any exception ends the save."""

    def refused(*_: object) -> None:
        raise OSError("no hard links")

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    scores, steps = [0.3, 0.9, 0.5, 0.95], set()
    for limit in range(200):
        folder, calls = tmp_path / str(limit), 0
        folder.mkdir()
        claim(folder, FolderKind.run)
        save_epochs(saver(folder, keep=keep), scores[:3])
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            keeper = saver(folder, keep=keep, best_epoch=2)
            state = at_step(4)
            state.epoch = state.best_epoch = 4
            rows = [{"epoch": epoch, "val/top1": score} for epoch, score in enumerate(scores, start=1)]
            keeper.save_epoch(state, rows, "val/top1")
            with contextlib.suppress(OSError):
                keeper.wait()
            is_whole = calls <= limit
        steps.add(assert_best_is_what_the_state_names(folder))
        if (folder / "last.pt").exists():
            (folder / "last.pt").unlink()  # else its other name, previous.pt, may be damaged with it
            (folder / "last.pt").write_bytes(b"damaged")
        assert assert_best_is_what_the_state_names(folder) in (2, 3)
        if is_whole:
            break
    assert limit > 5 and steps == {3, 4}


@pytest.mark.parametrize("epochs_before", [3, 9])
def test_a_run_removes_only_weights_that_it_wrote(tmp_path: Path, epochs_before: int) -> None:
    """Names of ours with other content, and copies, stay through a save, a resume from an older state, and the end."""
    keeper = saver(tmp_path, keep=2)
    save_epochs(keeper, [0.3, 0.9, 0.5])
    own = {path.name for path in tmp_path.iterdir()}
    foreign = ["epoch_0003 (copy).safetensors", "epoch_0001.safetensors.bak", "my_best.safetensors", "best.pending"]
    foreign += [
        "epoch_0099.safetensors",
        "epoch_0005.safetensors",
        "epoch_7.safetensors",
        "epoch_\u0663.safetensors",
        "notes.txt",
    ]
    for name in foreign:  # a later epoch than any that the run has finished, too
        save_weights(tmp_path / name, at_step(1).model, {"epoch": "99" if "99" in name else "3"})
    (tmp_path / "epoch_0006.safetensors").write_bytes(b"of another program")
    save_file({"x": torch.zeros(1)}, tmp_path / "epoch_0007.safetensors", metadata={"epoch": "7"})
    foreign += ["epoch_0006.safetensors", "epoch_0007.safetensors"]
    save_weights(tmp_path / "elsewhere", at_step(1).model, {"epoch": "8"})
    (tmp_path / "epoch_0008.safetensors").symlink_to(tmp_path / "elsewhere")
    foreign += ["elsewhere", "epoch_0008.safetensors"]
    before = {name: (tmp_path / name).read_bytes() for name in foreign}
    settle(tmp_path, at_step(0), epochs_before, {})
    keeper = saver(tmp_path, keep=1)
    save_epochs(keeper, [0.3, 0.9, 0.5, 0.95])
    keeper.finish([{"epoch": epoch, "val/top1": 0.1} for epoch in range(1, 10)], "val/top1")
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == before
    assert (tmp_path / "epoch_0008.safetensors").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= own | set(foreign)


def test_best_k_and_last_are_kept(tmp_path: Path) -> None:
    keeper, scores = saver(tmp_path, keep=2), [0.3, 0.9, 0.5, 0.9, 0.7]
    save_epochs(keeper, scores)
    names = {"last.pt", "last.safetensors", "best.safetensors", "epoch_0002.safetensors", "epoch_0004.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"previous.pt"}
    assert read_weights(tmp_path / "best.safetensors")[1]["epoch"] == "2"
    keeper.finish([{"epoch": i, "val/top1": score} for i, score in enumerate(scores, start=1)], "val/top1")
    assert {path.name for path in tmp_path.iterdir()} == names


def test_of_a_finished_run_the_best_and_the_last_weights_stay(tmp_path: Path) -> None:
    keeper = saver(tmp_path)
    save_epochs(keeper, [0.3, 0.9, 0.95, 0.5])
    epochs = {"epoch_0003.safetensors"}  # both states on the disk name epoch 3
    names = {"last.pt", "last.safetensors", "best.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | epochs | {"previous.pt"}
    keeper.finish([{"epoch": 1}] * 9, "val/top1")
    assert {path.name for path in tmp_path.iterdir()} == names
    assert assert_best_is_what_the_state_names(tmp_path) == 4  # as if more epochs were asked for
    assert {path.name for path in tmp_path.iterdir()} == names | epochs


def test_a_save_copies_no_tensor_twice_and_lets_go_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state and the weights of an epoch share their tensors, and nothing outlives the writing."""
    seen: list[tuple[int, int]] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def write_state(path: Path, content: dict[str, Any], *args: object, **named: object) -> None:
        alive.extend(weakref.ref(tensor) for tensor in content["model"].values())
        seen.append((content["model"]["head.weight"].data_ptr(), weights["head.weight"].data_ptr()))

    def write_weights(path: Path, tensors: Any, metadata: object, **kwargs: bool) -> None:
        weights.update(tensors)
        path.touch()

    weights: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(saving, "write_state", write_state)
    monkeypatch.setattr(saving, "write_weights", write_weights)
    keeper = saver(tmp_path)
    save_epochs(keeper, [0.3])
    weights.clear()
    (pair,) = seen
    assert pair[0] == pair[1]
    assert alive and all(reference() is None for reference in alive)


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
    with pytest.raises(NoSpaceError, match=r"iB are needed and 1,000 bytes are free.*that of step 1 is whole.*resume="):
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
    with pytest.raises(NoSpaceError, match=r"last\.pt could not be written whole: .*that of step 1 is whole") as caught:
        keeper.wait()
    assert "inline_container" not in str(caught.value)  # a place in torch's own source
    assert read_state(tmp_path / "last.pt")["counters"]["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt"}


def test_a_run_that_continues_says_that_its_older_state_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    for step, words in ((0, "None was saved before it"), (7, "that of step 7 is whole")):
        keeper = saver(tmp_path)
        keeper.safe_step = step
        keeper.save(at_step(step + 1))
        with pytest.raises(NoSpaceError, match=rf"free\. .*{words}\. Make room"):
            keeper.wait()


# --- saves that would take too much of the time ----------------------------------------------------------------------


# Best weights that no save takes yet wait in memory or, where a copy would be large, in a file of their own.
in_memory_or_file = pytest.mark.parametrize("large_bytes", [1 << 26, 0], ids=["in memory", "in a file"])


@in_memory_or_file
def test_an_epoch_that_comes_too_soon_is_saved_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    monkeypatch.setattr(saving, "LARGE_BYTES", large_bytes)
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


@in_memory_or_file
def test_better_weights_of_a_run_that_diverged_do_not_cost_those_its_state_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """Epoch 1 is saved, epoch 2 is better and waits for a save, then the run diverges; it goes on from epoch 1."""
    monkeypatch.setattr(saving, "LARGE_BYTES", large_bytes)
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
    settle(tmp_path, again, 9, content["weights"])
    assert torch.equal(read_weights(best)[0]["head.weight"], kept[1])


def test_large_best_weights_take_no_memory_and_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs 1 to 3, each the best so far, come too soon after one another; a kill then leaves nothing to resume."""
    monkeypatch.setattr(saving, "LARGE_BYTES", 0)
    keeper, rows = Saver(tmp_path, {}, {}, max_share=1e-9), []
    monkeypatch.setattr(saving, "CHEAP_S", 0)
    for epoch in (1, 2, 3):
        state = at_step(epoch)
        state.epoch = state.best_epoch = epoch
        rows.append({"epoch": epoch, "val/top1": epoch / 10})
        assert not keeper.save_epoch(state, rows, "val/top1")
    keeper.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0003.safetensors"]
    assert keeper._best is None
    settle(tmp_path, at_step(0), 3, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    keeper = saver(folder)
    folder.rmdir()
    keeper.save(at_step(1))
    with pytest.raises(NoSpaceError, match=r"cannot save .*checkpoints: No such file or directory\. None was saved"):
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
