"""Laws of bounded caches: the oldest goes first, never what is used or being made; nobody ever finds half an entry."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune.data.caches.evict as evict_module
from finetune.config import CacheKind, Conf, DataConf, SourceKind, find_problems
from finetune.core.preprocess import Preprocess
from finetune.data import Source, open_source
from finetune.data.caches.evict import evict, held_bytes, hold, lock_of, made_once
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.data.checks.verdicts import locked
from finetune.system.signals import Interrupted, StopSignals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no locks")
SIZE = 1000
AGES = [("old", 20), ("older", 30), ("new", 10), ("keep", 40)]
FORK = multiprocessing.get_context("fork")


def entry(folder: Path, name: str, *, age_s: float = 0) -> Path:
    (folder / name / "deeper").mkdir(parents=True)
    (folder / name / "deeper" / "file").write_bytes(bytes(SIZE))
    os.utime(folder / name, (time.time() - age_s, time.time() - age_s))
    return folder / name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_the_least_recently_used_go_until_the_rest_fits(tmp_path: Path) -> None:
    old, older, new, keep = (entry(tmp_path, name, age_s=age) for name, age in AGES)
    assert held_bytes(tmp_path) == 4 * SIZE
    assert evict(tmp_path, keep, 4 * SIZE) == []
    assert evict(tmp_path, keep, 3 * SIZE) == [older]
    held = hold(old)  # using it makes it the newest
    assert held is not None
    held.release()
    assert evict(tmp_path, keep, 2 * SIZE) == [new] and names(tmp_path) == {old.name, keep.name}
    assert evict(tmp_path, keep, 0) == [old] and names(tmp_path) == {keep.name}  # what is kept stays, at any limit
    assert evict(tmp_path / "nowhere", keep, 0) == []


def _use(path: Path, ready: object, done: object) -> None:
    held = hold(path)
    ready.set()  # type: ignore[attr-defined]
    done.wait(60)  # type: ignore[attr-defined]
    assert held is not None


def _make(path: Path, ready: object, done: object) -> None:
    with locked(path.with_name(f"{path.name}.lock")):
        path.with_name(f"{path.name}.7.tmp").mkdir()
        ready.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


@pytest.mark.parametrize("work", [_use, _make])
def test_what_another_process_uses_or_makes_stays_until_it_ends(tmp_path: Path, work: object) -> None:
    used, other = entry(tmp_path, "used", age_s=50), entry(tmp_path, "other", age_s=5)
    ready, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=work, args=(used, ready, done))  # type: ignore[arg-type]
    process.start()
    assert ready.wait(60)
    assert evict(tmp_path, tmp_path / "none", 0) == [other]
    assert "used" in names(tmp_path)
    assert len(names(tmp_path)) == (2 if work is _make else 1)
    process.kill()  # a killed process holds nothing, and what it left half made goes
    process.join()
    assert evict(tmp_path, tmp_path / "none", 0) == [used] and names(tmp_path) == set()


def test_what_this_process_uses_stays_too_until_released(tmp_path: Path) -> None:
    used = entry(tmp_path, "used")
    first, second = hold(used), hold(used)
    assert first is not None and second is not None
    first.release()
    assert evict(tmp_path, tmp_path / "none", 0) == []
    second.release()
    assert evict(tmp_path, tmp_path / "none", 0) == [used] and hold(used) is None


def test_an_entry_that_goes_while_it_is_looked_at_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = entry(tmp_path, "gone")
    real = os.path.isdir

    def isdir(path: Path) -> bool:
        monkeypatch.setattr(os.path, "isdir", real)
        assert path == gone and real(path)
        shutil.rmtree(gone)  # another process, between the look and the lock
        return True

    monkeypatch.setattr(os.path, "isdir", isdir)
    assert hold(gone) is None and os.path.isdir is real


def _stress(folder: Path, seed: int, results: object) -> None:
    made = 0

    def make() -> None:
        nonlocal made
        made += 1
        beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        beside.mkdir()
        (beside / "a").write_text(place.name)
        (beside / "b").write_bytes(bytes(SIZE))
        os.rename(beside, place)

    for turn in range(60):
        place = folder / f"k{(seed + turn * (seed + 1)) % 4}"
        held = made_once(place, make)
        evict(folder, place, 2 * SIZE)
        assert (place / "a").read_text() == place.name and (place / "b").stat().st_size == SIZE
        held.release()
    results.put(made)  # type: ignore[attr-defined]


def test_makers_users_and_removers_at_once_never_see_half_an_entry(tmp_path: Path) -> None:
    results = FORK.Queue()
    processes = [FORK.Process(target=_stress, args=(tmp_path, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=60) for _ in processes) > 4  # entries were removed and made again
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def images(tmp_path: Path) -> Source:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))


def test_pixel_caches_stay_under_their_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, split = tmp_path / "cache" / "pixels", images(tmp_path).splits["train"]
    size = len(split) * 3 * 16 * 16
    gib = 2.6 * size / 2**30  # two caches and their indices, not three
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path / "cache"), cache_gib=gib)
    kinds = ["bicubic", "bilinear", "nearest-exact"]
    caches = []
    for kind in kinds:
        step = first_step(Preprocess(16, (0, 0, 0), (1, 1, 1), interpolation=kind), None)
        caches.append(open_cache(split, step, conf))
        expected = step(split.load(0))
        assert torch.equal(caches[-1].load(0), expected)  # type: ignore[arg-type]
    assert len(names(folder)) == 3 and "all in use" in caplog.text
    del caches[:2]
    open_cache(split, step, conf)
    assert len(names(folder)) == 2
    assert torch.equal(caches[0].load(1), step(split.load(1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["during the wait", "ahead of it"])
def test_a_wait_for_another_run_is_told_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The handler of a run only sets a flag, which nobody would read while the other one works."""
    place, stop = tmp_path / "made", StopSignals()
    caplog.set_level("INFO", "finetune")
    monkeypatch.setattr(evict_module.time, "sleep", lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with stop, locked(lock_of(place)):  # a second descriptor, as another process has one
        if when == "ahead of it":
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(evict_module.time, "sleep", pytest.fail)
        with pytest.raises(Interrupted):
            made_once(place, pytest.fail, stop.check)
    assert stop.is_set and caplog.text.count(f"another run is making {place}: waiting for it") == 1
    made_once(place, place.mkdir)  # nothing of the wait is left


def test_without_locks_nothing_is_removed_and_the_reason_is_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: what looks left by a killed run may be what a living one is making."""
    monkeypatch.setattr("finetune.data.caches.evict.LOCKS", None)
    folder, split = tmp_path / "cache" / "pixels", images(tmp_path).splits["train"]
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path / "cache"), cache_gib=1e-9)
    for kind in ("bicubic", "bilinear"):
        step = first_step(Preprocess(16, (0, 0, 0), (1, 1, 1), interpolation=kind), None)
        open_cache(split, step, conf)
    assert len(names(folder)) == 2 and "no locks that tell" in caplog.text and "all in use" not in caplog.text
    made = tmp_path / "made"
    beside = made.with_name("made.7.tmp")
    beside.mkdir()
    assert made_once(made, made.mkdir) is not None and beside.is_dir()


def test_a_bound_without_a_cache_is_an_error() -> None:
    assert any(
        "data.cache_gib=1.0 would be ignored" in line for line in find_problems(Conf(data=DataConf(cache_gib=1.0)))
    )
