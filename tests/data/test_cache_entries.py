"""Laws of the cache folder: entries are made once, limits are checked before writing, clearing removes ours alone."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.commands.cache import KINDS, main
from finetune.config import AugmentConf, CacheKind, Conf, DataConf, Recipe, SourceKind, find_problems
from finetune.core.preprocess import Preprocess
from finetune.data import Source, open_source
from finetune.data.caches.entries import (
    NAMES,
    beside,
    find_entries,
    lock_of,
    made_once,
    remove_entry,
    size_line,
    size_of,
)
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.system.locks import file_lock
from finetune.system.signals import Interrupted, StopSignals

SIZE = 1000
FORK = multiprocessing.get_context("fork")
PIXELS, ACTIVATIONS, SHARD = "0" * 32, f"{'1' * 32}-float16-{'2' * 32}-0", "3" * 16 + "-train-0000.tar"


def write(path: Path, *, age_days: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(SIZE))
    for old in (path, path.parent):
        os.utime(old, (time.time() - 86_400 * age_days,) * 2)
    return path


def fill(cache: Path) -> list[Path]:
    """Make an entry of each kind; the pixels were used ten days ago, the shard 30."""
    for name in ("activations", "meta.json"):
        write(cache / "activations" / ACTIVATIONS / name)
    for name in ("pixels.u8", "index.npy"):
        write(cache / "pixels" / PIXELS / name, age_days=10)
    return [
        cache / "activations" / ACTIVATIONS,
        cache / "pixels" / PIXELS,
        write(cache / "shards" / SHARD, age_days=30),
    ]


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_entries_are_listed_the_last_used_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_entries(tmp_path) == [] and size_line(tmp_path) is None and tuple(NAMES) == KINDS
    paths = fill(tmp_path)
    found = find_entries(tmp_path)
    assert [entry.path for entry in found] == paths
    assert [entry.num_bytes for entry in found] == [2 * SIZE, 2 * SIZE, SIZE] and size_of(tmp_path) == 5 * SIZE
    assert "`finetune cache clear` removes them" in str(size_line(tmp_path))
    before = all_files(tmp_path)
    assert main([f"data.cache_dir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["activations", "pixels", "shards", "total"]
    assert str(paths[1]) in lines[1] and "3 entries" in lines[3] and all_files(tmp_path) == before


def test_clear_removes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = fill(tmp_path)
    words = ["clear", f"data.cache_dir={tmp_path}"]
    assert main([*words, "--older-than", "20", "--kind", "pixels"]) == 0
    assert "0 entries" in capsys.readouterr().out and all(path.exists() for path in paths)
    assert main([*words, "--older-than", "20"]) == 0
    assert [path.exists() for path in paths] == [True, True, False]
    assert main(["clear", "--kind", "activations", *words[1:]]) == 0
    assert [path.exists() for path in paths] == [False, True, False]
    assert main(words) == 0
    assert size_of(tmp_path) == 0 and not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(SystemExit):
        main(["claer"])


def test_clear_leaves_every_foreign_file(tmp_path: Path) -> None:
    (entry, *_) = fill(tmp_path)
    other = tmp_path / "pixels" / ("f" * 32)
    for name in ("pixels.u8", "index.npy", "notes.txt"):  # a person put a file of their own beside ours
        write(other / name)
    foreign = ["note", "pixels/photo.png", "pixels/album/a.png", "activations/mine/meta.json", "shards/mine.tar"]
    foreign += ["checks/0123.npz", "pixels/album.7.tmp/a", f"elsewhere/{PIXELS}/pixels.u8"]
    for name in foreign:
        write(tmp_path / name)
    write(tmp_path / "data" / "pixels.u8"), write(tmp_path / "data" / "index.npy")
    (tmp_path / "pixels" / ("e" * 32)).symlink_to(tmp_path / "data")
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert not entry.exists() and len(left) >= len(foreign) + 5
    assert {tmp_path / name for name in foreign} < left and other / "pixels.u8" in left


def test_what_is_being_made_stays_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    (_, entry, _) = fill(tmp_path)
    half = entry.with_name(f"{'4' * 32}.77.tmp")
    write(half / "pixels.u8")
    part = write(tmp_path / "shards" / f"{'5' * 16}-b.tar.part")
    with file_lock(lock_of(entry)), file_lock(lock_of(entry.with_name("4" * 32))):
        assert not remove_entry(find_entries(tmp_path)[1])
        assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
        assert entry.exists() and half.exists()
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
    assert all_files(tmp_path / "pixels") == set() and not part.exists()


def _make(place: Path, seed: int, results: object) -> None:
    made = 0

    def make() -> None:
        nonlocal made
        made += 1
        beside(place).mkdir()
        for name in ("pixels.u8", "index.npy"):
            (beside(place) / name).write_bytes(bytes(SIZE))
        os.rename(beside(place), place)

    for turn in range(40):
        made_once(place, make)
        if turn % 4 == seed:
            for entry in find_entries(place.parent.parent):
                remove_entry(entry)
    results.put(made)  # type: ignore[attr-defined]


def test_makers_and_removers_at_once_never_see_half_an_entry(tmp_path: Path) -> None:
    results = FORK.Queue()
    place = tmp_path / "pixels" / PIXELS
    processes = [FORK.Process(target=_make, args=(place, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=60) for _ in processes) > 3  # removed and made again
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.parametrize("when", ["during the wait", "before it"])
def test_a_wait_for_another_run_is_told_and_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """The signal handler of a run only sets a flag, which no code reads while the run waits for a lock."""
    place, stop = tmp_path / "made", StopSignals()
    caplog.set_level("INFO", "finetune")
    with stop, open(lock_of(place), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # by a second descriptor, as another process has one
        if when == "before it":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Interrupted):
            made_once(place, pytest.fail, stop.check)
    assert stop.is_set and caplog.text.count(f"another run is making {place}: waiting for it") == 1
    made_once(place, place.mkdir)  # nothing of the wait is left


def images(tmp_path: Path) -> Source:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))


def test_pixel_caches_stay_under_their_limit(tmp_path: Path) -> None:
    folder, split = tmp_path / "cache" / "pixels", images(tmp_path).splits["train"]
    size = len(split) * 3 * 16 * 16
    gib = 2.4 * size / 2**30  # one cache and its index, and not two
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path / "cache"), cache_gib=gib)
    steps = [first_step(Preprocess(16, (0, 0, 0), (1, 1, 1), kind), None) for kind in ("bicubic", "bilinear")]
    crops = first_step(Preprocess(16, (0, 0, 0), (1, 1, 1)), AugmentConf(recipe=Recipe.crop))
    cache = open_cache(split, steps[0], conf)
    for step in (steps[1], crops):
        conf.cache_gib = 1.2 * size_of(folder) / 2**30
        with pytest.raises(ValueError, match=r"data\.cache_gib \(now .*\), `finetune cache clear`"):
            open_cache(split, step, conf)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1  # nothing half made is left
    assert main(["clear", f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    assert torch.equal(cache.load(1), steps[0](split.load(1)))  # type: ignore[arg-type]  # its map outlives the file
    conf.cache_gib = gib
    assert torch.equal(open_cache(split, steps[1], conf).load(1), steps[1](split.load(1)))  # type: ignore[arg-type]


def test_a_limit_without_a_cache_is_an_error() -> None:
    assert any(
        "data.cache_gib=1.0 would be ignored" in line for line in find_problems(Conf(data=DataConf(cache_gib=1.0)))
    )
