"""Laws of the cache folder: entries are made once, limits are checked before writing, clearing removes ours alone."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
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
    FILES,
    NAMES,
    begin,
    beside,
    cache_folder,
    claim_cache,
    entry_lock,
    find_entries,
    header_of,
    is_own,
    lock_of,
    made_once,
    remove_entry,
    size_line,
    size_of,
    write_header,
)
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.system.locks import file_lock
from finetune.system.ours import RefusedError
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
    claim_cache(cache)
    for kind, key, age_days in (("activations", ACTIVATIONS, 0), ("pixels", PIXELS, 10)):
        (cache / kind / key).mkdir(parents=True)
        write_header(cache / kind / key, header_of(cache / kind / key))
        for name in FILES[kind]:
            write(cache / kind / key / name, age_days=age_days)
    shard = write(cache / "shards" / SHARD, age_days=30)
    write_header(shard, header_of(shard))
    return [cache / "activations" / ACTIVATIONS, cache / "pixels" / PIXELS, shard]


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_entries_are_listed_the_last_used_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_entries(tmp_path) == [] and size_line(tmp_path) is None and tuple(NAMES) == KINDS
    paths = fill(tmp_path)
    found = find_entries(tmp_path)
    assert [entry.path for entry in found] == paths
    headers = [header_of(path).stat().st_size for path in paths]
    assert [entry.num_bytes for entry in found] == [2 * SIZE + headers[0], 2 * SIZE + headers[1], SIZE]
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
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".finetune.json"]
    with pytest.raises(SystemExit):
        main(["claer"])


def test_clear_leaves_every_foreign_file(tmp_path: Path) -> None:
    (entry, *_) = fill(tmp_path)
    ident = json.loads((tmp_path / ".finetune.json").read_text())["id"]
    own = begin(tmp_path / "pixels" / ("f" * 32)).rename(tmp_path / "pixels" / ("f" * 32))
    foreign = [f"pixels/{'f' * 32}/{name}" for name in ("pixels.u8", "index.npy", "notes.txt", "entry.json")]
    for name in foreign[:3]:  # a person put a file of their own beside ours
        write(tmp_path / name)
    bare = [f"pixels/{'c' * 32}/pixels.u8", f"pixels/{'c' * 32}/index.npy", f"shards/{'5' * 16}-train.tar"]
    bare += [f"pixels/{'4' * 32}.77.tmp/pixels.u8", f"pixels/{'4' * 32}.lock", f"shards/{'5' * 16}-b.tar.part"]
    bare += [f"pixels/{'4' * 32}.{'0' * 16}-77.tmp/pixels.u8", f"activations/{ACTIVATIONS[:-1]}7/meta.json"]
    bare += ["note", "pixels/photo.png", "pixels/album/a.png", "activations/mine/meta.json", "shards/mine.tar"]
    bare += ["checks/0123.npz", "pixels/album.7.tmp/a", f"elsewhere/{PIXELS}/pixels.u8"]
    for name in bare:
        write(tmp_path / name)
    half = f"pixels/{'b' * 32}.{ident}-77.tmp/letter.txt"  # in a folder that a killed run left
    write(tmp_path / half)
    for number, header in enumerate(["", "[]", '{"kind": "pixels"}', f'{{"kind": "shards", "cache": "{ident}"}}']):
        folder = tmp_path / "pixels" / f"{number}{'d' * 31}"
        folder.mkdir()
        (folder / "entry.json").write_text(header)
        foreign.append(str((folder / "entry.json").relative_to(tmp_path)))
    another = tmp_path / "another"
    (theirs, *_) = fill(another)
    shutil.copytree(theirs, entry.with_name(f"{'7' * 32}-float16-{'2' * 32}-0"))  # of another cache
    (tmp_path / "pixels" / ("e" * 32)).symlink_to(another / "pixels" / PIXELS)
    before = {name: (tmp_path / name).read_bytes() for name in all_files(tmp_path) if (tmp_path / name).is_file()}
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
    gone = {name for name in before if not (tmp_path / name).exists()}
    assert (
        not entry.exists()
        and own.exists()
        and all(name.startswith((str(PIXELS), "activations/1", "pixels/0000", "shards/3333")) for name in gone)
    ), gone
    assert {name: (tmp_path / name).read_bytes() for name in before if name not in gone} == {
        name: data for name, data in before.items() if name not in gone
    }
    assert not set([*foreign, *bare, half]) & gone and (tmp_path / "pixels" / ("e" * 32)).is_symlink()


def test_a_folder_of_others_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data.cache_dir` may hold anything: our caches lie in a folder of their own, which nobody else may have made."""
    others = [tmp_path / "pixels" / PIXELS / "pixels.u8", tmp_path / "pixels" / PIXELS / "index.npy"]
    for path in others:
        write(path)
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0 and "0 entries" in capsys.readouterr().out
    source = images(tmp_path)
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path))
    step = first_step(Preprocess(16, (0, 0, 0), (1, 1, 1)), None)
    open_cache(source.splits["train"], step, conf)
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0 and "1 entry in" in capsys.readouterr().out
    assert all(path.read_bytes() == bytes(SIZE) for path in others)
    shutil.rmtree(cache_folder(str(tmp_path)))
    write(cache_folder(str(tmp_path)) / "shards" / "mine.tar")
    for attempt in (
        lambda: open_cache(source.splits["train"], step, conf),
        lambda: main(["clear", f"data.cache_dir={tmp_path}"]),
    ):
        with pytest.raises(RefusedError, match=r"finetune-cache has shards but no \.finetune\.json"):
            attempt()
    assert size_line(cache_folder(str(tmp_path))) is None
    assert all_files(cache_folder(str(tmp_path))) == {"shards", "shards/mine.tar"}


def test_a_folder_in_the_place_of_an_entry_is_not_removed(tmp_path: Path) -> None:
    source = images(tmp_path)
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path))
    step = first_step(Preprocess(16, (0, 0, 0), (1, 1, 1)), None)
    open_cache(source.splits["train"], step, conf)
    (entry,) = find_entries(cache_folder(str(tmp_path)))
    (entry.path / "index.npy").write_bytes(b"damaged")
    (entry.path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"damaged and cannot be removed: .* did not write all of it"):
        open_cache(source.splits["train"], step, conf)
    (entry.path / "notes.txt").unlink()
    open_cache(source.splits["train"], step, conf)
    assert is_own(entry.path)


def test_what_is_being_made_stays_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    (_, entry, _) = fill(tmp_path)
    half = begin(entry.with_name("4" * 32))
    write(half / "pixels.u8")
    half = half.rename(half.with_name(half.name.replace(f"-{os.getpid()}.", "-77.")))
    part = write(beside(tmp_path / "shards" / f"{'5' * 16}-b.tar"))
    write_header(part, header_of(tmp_path / "shards" / f"{'5' * 16}-b.tar"))
    with file_lock(lock_of(entry)), file_lock(lock_of(entry.with_name("4" * 32))):
        assert not remove_entry(find_entries(tmp_path)[1])
        assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
        assert entry.exists() and half.exists()
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
    assert all_files(tmp_path / "pixels") == all_files(tmp_path / "shards") == set()


@pytest.mark.parametrize("place", [f"pixels/{PIXELS}", f"activations/{ACTIVATIONS}", f"shards/{SHARD}", "checks/0.npz"])
def test_who_holds_the_lock_of_an_entry_meets_nothing_that_killed_processes_left_of_it(
    tmp_path: Path, place: str
) -> None:
    ident, entry = claim_cache(tmp_path).id, tmp_path / place
    kind = entry.parent
    kind.mkdir()
    ours = [
        f"{entry.name}.{ident}-77.tmp",
        f".{entry.name}.{ident}-77.tmp",
        f".{entry.name}.{ident}.json.{ident}-8.tmp",
    ]
    others = [f"{'4' * 32}.{ident}-77.tmp", f"{entry.name}.{'0' * 16}-77.tmp", f"{entry.name}.77.tmp", "a.tmp"]
    for name in (*ours, *others):
        (kind / name).write_text("x")
    with entry_lock(entry):
        assert all_files(kind) == {*others, lock_of(entry).name}


def test_clear_waits_for_the_lock_of_the_shard_whose_header_is_being_written(tmp_path: Path) -> None:
    shard = tmp_path / "shards" / SHARD
    ident = claim_cache(tmp_path).id
    half = write(shard.with_name(f".{SHARD}.{ident}.json.{ident}-77.tmp"))
    with file_lock(lock_of(shard)):
        assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0 and half.exists()
    assert main(["clear", f"data.cache_dir={tmp_path}"]) == 0
    assert all_files(tmp_path / "shards") == set()


def _make(place: Path, seed: int, results: object) -> None:
    made = 0

    def make() -> None:
        nonlocal made
        made += 1
        begin(place)
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
    place, stop = tmp_path / "pixels" / PIXELS, StopSignals()
    claim_cache(tmp_path)
    place.parent.mkdir()
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
    folder, split = cache_folder(str(tmp_path / "cache")) / "pixels", images(tmp_path).splits["train"]
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
