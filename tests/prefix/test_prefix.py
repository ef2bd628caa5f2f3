"""A frozen prefix, recomputed or cached, is the same training to the last bit; damage and lack of room are reported."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import CHAINS, small_images, small_model

from finetune.app import feeds
from finetune.app.build import build_run
from finetune.app.run import run
from finetune.config import (
    AugmentConf,
    Balance,
    Conf,
    DataConf,
    Family,
    HeadKind,
    ModelConf,
    OnError,
    OptimConf,
    Precision,
    PrefixCache,
    PrefixConf,
    PrefixDtype,
    Recipe,
    SourceKind,
    TrainConf,
    find_problems,
)
from finetune.core.freezing import freeze
from finetune.data import ImageError, open_source
from finetune.data.caches.entries import cache_folder, size_of
from finetune.data.loading import loader
from finetune.data.loading.order import epoch_order, most_showings
from finetune.prefix import choice, store
from finetune.prefix.cache import ActivationCache
from finetune.prefix.feed import Feed
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.measuring import Measured, measure
from finetune.prefix.sweep_memory import shared_between_runs, sweep_memory
from finetune.runs.history import timeless

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small pictures, 23 and 9: the last batch is short, and one class is rare."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    for name, count, level in (("dark", 23, 60), ("light", 9, 180)):
        (root / name).mkdir()
        for index in range(count):
            pixels = np.clip(random.normal(level, 40, (40, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def fast_attention() -> Iterator[None]:
    """The switch goes back to where it was."""
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def settings(root: Path, **changes: object) -> Conf:
    """A ViT with two of six blocks learning, 3 epochs in batches of 7."""
    conf = Conf(
        model=ModelConf(family=Family.vit, name="glyph_vit", head=HeadKind.random),
        data=DataConf(source=SourceKind.folder, root=str(root), batch_size=7, workers="0", cache_dir=str(root.parent)),
        optim=OptimConf(lr=0.003, fix_layer=4),
        augment=AugmentConf(recipe=Recipe.light, views=2),
        train=TrainConf(epochs=3),
        prefix=PrefixConf(cache=PrefixCache.none),
    )
    return replace(conf, **changes)


def with_cache(conf: Conf, kind: str) -> Conf:
    return replace(conf, prefix=replace(conf.prefix, cache=PrefixCache(kind)))


def came_out(conf: Conf, folder: Path) -> tuple[list[dict], dict, dict]:
    """(history without clocks, weights, result) of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    result = run(conf, folder, [], quiet=True)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    weights = load_file(folder / "checkpoints" / "last.safetensors")
    return timeless(rows), weights, result


def hits(folder: Path) -> list[float]:
    return [json.loads(line)["prefix_hits"] for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_same(first: tuple, second: tuple) -> None:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, tensor in first[1].items():
        assert torch.equal(tensor, second[1][name]), name
    assert {k: v for k, v in first[2].items() if k.startswith("test/")} == {
        k: v for k, v in second[2].items() if k.startswith("test/")
    }


VARIANTS = {
    "fp32": {},
    "bf16": {"precision": Precision.bf16},
    "rounded": {"prefix": PrefixConf(cache=PrefixCache.none, dtype=PrefixDtype.fp16)},
    "no augmentation": {"augment": AugmentConf(recipe=Recipe.none)},
    "whole tower": {"optim": OptimConf(lr=0.003, fix_layer=7)},
    "stem only": {"optim": OptimConf(lr=0.003, fix_layer=0)},
    "all blocks": {"optim": OptimConf(lr=0.003, fix_layer=6)},
    "repeats": {"augment": AugmentConf(recipe=Recipe.light, views=2, repeats=2)},
    "dropout, average": {
        "model": ModelConf(family=Family.vit, name="glyph_vit", head=HeadKind.random, drop_path=0.3),
        "train": TrainConf(epochs=3, ema=0.9),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_recomputed_bit_for_bit(pictures: Path, tmp_path: Path, name: str) -> None:
    conf = settings(pictures, **VARIANTS[name])
    plain = came_out(conf, tmp_path / "none")
    assert hits(tmp_path / "none") == [0.0, 0.0, 0.0]
    for kind in ("ram", "disk", "device") if name == "fp32" else ("disk",):
        assert_same(plain, came_out(with_cache(conf, kind), tmp_path / kind))
    assert hits(tmp_path / "disk")[-1] == 1.0


def test_balanced_sampling_keeps_every_showing(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures)
    conf = replace(conf, data=replace(conf.data, balance=Balance.sampling))
    assert_same(came_out(conf, tmp_path / "none"), came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert hits(tmp_path / "ram") == [0.0, 0.0, 1.0]


def test_every_showing_of_every_epoch_has_a_slot() -> None:
    labels = torch.tensor([0] * 11 + [1] * 3 + [2])
    most = most_showings(labels, balanced=True, repeats=2)
    for epoch in range(7):
        samples, occurrences = epoch_order(labels, seed=1, epoch=epoch, balanced=True).repeated(2)
        assert (occurrences < most[samples]).all()


def test_an_image_that_cannot_be_read_is_left_out_of_its_batch(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    conf = settings(root)
    data = replace(conf.data, on_error=OnError.skip, check_budget_s=0.0)
    conf = replace(conf, data=data)
    victim = sorted((root / "dark").iterdir())[4]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])  # its header is whole: the check at the start does not see it
    plain = came_out(conf, tmp_path / "none")
    for name in ("disk", "again"):  # the second reads the cache of the first, and names the image that is not in it
        assert_same(plain, came_out(with_cache(conf, "disk"), tmp_path / name))
        assert victim.name in (tmp_path / name / "skipped.txt").read_text()
        assert "left out" in (tmp_path / name / "run.log").read_text()
    assert hits(tmp_path / "again") == [1.0, 1.0, 1.0]
    with pytest.raises(ImageError, match=victim.name):
        came_out(replace(with_cache(conf, "disk"), data=replace(data, on_error=OnError.stop)), tmp_path / "stop")


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_as_many_bad_images_as_a_batch_holds(pictures: Path, tmp_path: Path, kind: str) -> None:
    """Filling the cache, they are a whole batch without an image; an epoch mixes them with readable ones."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    conf = settings(root, train=TrainConf(epochs=4))
    data = replace(conf.data, on_error=OnError.skip, check_budget_s=0.0, batch_size=5, test_fraction=0.3)
    conf = replace(conf, data=data)
    train = open_source(conf.data).splits["train"]
    bad = range(5, 10)
    for sample in bad:
        victim = Path(train.name_of(sample))
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    plain = came_out(conf, tmp_path / "none")
    assert_same(plain, came_out(with_cache(conf, kind), tmp_path / "cached"))
    assert hits(tmp_path / "cached") == [0.0, 0.0, 1.0, 1.0]
    assert {json.loads(line)["name"] for line in (tmp_path / "cached" / "skipped.txt").read_text().splitlines()} >= {
        train.name_of(sample) for sample in bad
    }


@pytest.mark.parametrize("kind", ["auto", "disk"])
def test_a_disk_that_fills_up_ends_the_run_only_where_it_was_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As with a quota: the free space looked sufficient."""

    def full(self: store.FileBuilder, values: torch.Tensor) -> None:
        with store._write_errors(self._folder):
            raise OSError(28, "No space left on device")

    conf = with_cache(settings(pictures), kind)
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    monkeypatch.setattr(choice, "free_memory", lambda: 0)
    monkeypatch.setattr(store.FileBuilder, "_append", full)
    if kind == "disk":
        with pytest.raises(OSError, match=r"prefix\.cache=disk: cannot write to .*activations: No space left"):
            came_out(conf, tmp_path / "run")
        return
    found = came_out(conf, tmp_path / "run")
    assert (tmp_path / "run" / "run.log").read_text().count("are not cached after all: prefix.cache=disk: cannot") == 2
    assert hits(tmp_path / "run") == [0.0, 0.0, 0.0]
    assert_same(found, came_out(with_cache(conf, "none"), tmp_path / "none"))


NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [("auto", NO_MEMORY, "[enforce fail"), ("auto", MemoryError(), "MemoryError"), ("ram", NO_MEMORY, "")],
)
def test_memory_that_runs_out_ends_the_run_only_where_it_was_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception, words: str
) -> None:
    def full(*_: object) -> None:
        raise error

    conf = with_cache(settings(pictures), kind)
    monkeypatch.setattr("finetune.prefix.cache.build_in_memory", full)
    if kind == "ram":
        with pytest.raises(ValueError, match=r"out of memory on cpu\. Try"):
            came_out(conf, tmp_path / "run")
        return
    found = came_out(conf, tmp_path / "run")
    assert (tmp_path / "run" / "run.log").read_text().count(f"are not cached after all: {words}") == 2
    assert_same(found, came_out(with_cache(conf, "none"), tmp_path / "none"))


def test_fresh_views_are_recomputed_and_validation_is_cached(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures, augment=AugmentConf(recipe=Recipe.light))
    plain = came_out(conf, tmp_path / "none")
    assert_same(plain, came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert hits(tmp_path / "ram") == [0.0, 0.0, 0.0]
    log = (tmp_path / "ram" / "run.log").read_text()
    assert "augment.views=K" in log and "val: computed once" in log


def test_mixup_is_not_cached(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures, augment=AugmentConf(recipe=Recipe.light, views=1, mixup=0.5))
    assert_same(came_out(conf, tmp_path / "none"), came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert "MixUp" in (tmp_path / "ram" / "run.log").read_text()
    assert hits(tmp_path / "ram") == [0.0, 0.0, 0.0]


def test_images_drawn_with_replacement_are_not_cached(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures)
    conf = replace(conf, data=replace(conf.data, epoch_images=20))
    assert_same(came_out(conf, tmp_path / "none"), came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert hits(tmp_path / "ram") == [0.0, 0.0, 0.0]
    assert "data.epoch_images" in (tmp_path / "ram" / "run.log").read_text()


def test_auto_caches_what_is_read_again(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "auto")
    came_out(conf, tmp_path / "long")
    assert hits(tmp_path / "long") == [0.0, 0.0, 1.0]  # two views, then the first again
    came_out(replace(conf, train=TrainConf(epochs=2)), tmp_path / "short")
    assert hits(tmp_path / "short") == [0.0, 0.0]


def test_stopped_and_resumed_with_another_cache(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures)
    straight = came_out(conf, tmp_path / "straight")
    folder = tmp_path / "resumed"
    half = with_cache(replace(conf, train=TrainConf(epochs=3, save_every_steps=2)), "disk")
    folder.mkdir()
    child = multiprocessing.get_context("spawn").Process(target=_run_and_be_stopped, args=(half, folder))
    child.start()
    child.join(120)
    assert (folder / "checkpoints" / "last.pt").exists()
    again = replace(with_cache(half, "ram"), resume=str(folder))
    resumed = came_out(again, folder)
    assert resumed[2]["resumed_at"]
    assert_same(straight, resumed)


def _run_and_be_stopped(conf: Conf, folder: Path) -> None:
    from finetune.app import training

    saved = training.Saver.save
    count = [0]

    def save(self: object, state: object) -> None:
        saved(self, state)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == 3:
            self.wait()  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)

    training.Saver.save = save  # type: ignore[method-assign]
    run(conf, folder, [], quiet=True)


# --- caches on disk --------------------------------------------------------------------------------------------------


def entries(root: Path) -> list[Path]:
    return sorted(path for path in (cache_folder(str(root)) / "activations").iterdir() if path.is_dir())


def test_jobs_share_what_is_on_disk_and_a_change_makes_another(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "disk")
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    came_out(conf, tmp_path / "a")
    first = entries(tmp_path / "cache")
    came_out(replace(conf, optim=replace(conf.optim, layer_decay=0.5)), tmp_path / "b")
    assert entries(tmp_path / "cache") == first and hits(tmp_path / "b") == [1.0, 1.0, 1.0]
    came_out(replace(conf, seed=1), tmp_path / "c")  # other views; validation is the same
    second = entries(tmp_path / "cache")
    assert len(second) == len(first) + 2
    came_out(replace(conf, optim=replace(conf.optim, fix_layer=3)), tmp_path / "d")
    assert len(entries(tmp_path / "cache")) == len(second) + len(first)


WEIGHTS = ModelConf(family=Family.vit, name="glyph_vit", head=HeadKind.random, pretrained="none")
CHANGES: dict[str, dict[str, object]] = {
    "other weights": {"model": WEIGHTS},
    "batch size": {"data.batch_size": 8},
    "precision": {"precision": Precision.bf16},
    "rounding": {"prefix.dtype": PrefixDtype.fp16},
    "views": {"augment": AugmentConf(recipe=Recipe.light, views=1, flip=0.5)},
    "what is done to bad images": {"data.on_error": OnError.skip},
    "how often each is shown": {"data.balance": Balance.sampling},
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_the_numbers_changes_the_name(pictures: Path, tmp_path: Path, name: str) -> None:
    conf = with_cache(settings(pictures, augment=AugmentConf(recipe=Recipe.light, views=1)), "disk")
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")), train=TrainConf(epochs=1))
    came_out(conf, tmp_path / "a")
    came_out(conf, tmp_path / "same")
    assert hits(tmp_path / "same") == [1.0]
    for key, value in CHANGES[name].items():
        group, _, field = key.partition(".")
        conf = replace(conf, **{group: replace(getattr(conf, group), **{field: value}) if field else value})
    came_out(conf, tmp_path / "b")
    assert hits(tmp_path / "b") == [0.0]


def test_a_changed_image_is_not_taken_for_what_it_was(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    conf = with_cache(settings(root, train=TrainConf(epochs=1)), "disk")
    came_out(conf, tmp_path / "a")
    victim = sorted((root / "dark").iterdir())[4]
    Image.open(victim).rotate(180).save(victim)
    assert_same(came_out(conf, tmp_path / "b"), came_out(with_cache(conf, "none"), tmp_path / "none"))


def test_the_words_of_the_name_tell_tf32_and_deterministic_kernels(pictures: Path, tmp_path: Path) -> None:
    """No processor here computes in TF32, so only what the name is made of can be looked at."""
    told = []
    for changes in ({}, {"precision": Precision.tf32}, {"deterministic": True}):
        conf = settings(pictures, **changes)
        parts = build_run(replace(conf, precision=Precision.fp32), tmp_path)
        told.append(feeds.computing(replace(parts, conf=conf)))
    assert told[0] != told[1] != told[2] != told[0]


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("first", [Balance.none, Balance.sampling])
def test_jobs_that_show_images_otherwise_do_not_read_each_others(
    pictures: Path, tmp_path: Path, kind: str, first: Balance
) -> None:
    """The same images, views and layers, but another number of showings: each finds its own."""
    conf = with_cache(settings(pictures, augment=AugmentConf(recipe=Recipe.light, views=1)), kind)
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    second = Balance.sampling if first == Balance.none else Balance.none
    with shared_between_runs():
        for balance in (first, second):
            job = replace(conf, data=replace(conf.data, balance=balance))
            found = came_out(job, tmp_path / balance)
            assert "damaged" not in (tmp_path / balance / "run.log").read_text()
    assert_same(found, came_out(with_cache(job, "none"), tmp_path / "alone"))


def test_the_limit_counts_what_other_runs_stored(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures, augment=AugmentConf(recipe=Recipe.light, views=3), train=TrainConf(epochs=6))
    conf = with_cache(replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache"))), "disk")
    came_out(conf, tmp_path / "a")
    size = size_of(cache_folder(str(tmp_path / "cache")) / "activations")
    full = replace(conf, prefix=replace(conf.prefix, max_gib=1.02 * size / 2**30))
    came_out(full, tmp_path / "again")  # what is there already needs no room
    assert hits(tmp_path / "again") == [1.0] * 6
    with pytest.raises(ValueError, match=r"that are there .* Try prefix\.max_gib=.*finetune cache clear"):
        came_out(replace(full, seed=1), tmp_path / "b")  # other views
    assert size_of(cache_folder(str(tmp_path / "cache")) / "activations") == size
    room = replace(conf, prefix=replace(conf.prefix, max_gib=2.1 * size / 2**30), seed=1)
    came_out(room, tmp_path / "c")
    assert hits(tmp_path / "c") == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_what_is_there_already_needs_no_room(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second job, and one with other views, where the memory is full of what the first has left."""
    conf = with_cache(settings(pictures), "ram")
    with shared_between_runs():
        came_out(conf, tmp_path / "a")
        memory, ram = sweep_memory(), PrefixCache.ram
        total = memory.num_bytes(ram) + 1000
        monkeypatch.setattr(choice, "free_memory", lambda: total - memory.num_bytes(ram))
        came_out(replace(conf, optim=replace(conf.optim, layer_decay=0.5)), tmp_path / "b")
        assert hits(tmp_path / "b") == [1.0, 1.0, 1.0]
        came_out(replace(conf, seed=1), tmp_path / "c")
        assert hits(tmp_path / "c") == [0.0, 0.0, 1.0]
        assert memory.num_bytes(ram) < total  # those of seed 0 were dropped
        came_out(replace(with_cache(conf, "auto"), optim=OptimConf(lr=0.003)), tmp_path / "d")
        assert not memory.num_bytes(ram)  # nothing is frozen: they would only take memory


@pytest.mark.parametrize("is_damaged", [False, True])
def test_only_a_pass_that_starts_processes_waits_for_the_save(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """An epoch from the cache waits for none; a kept block that turns out damaged is computed again."""
    conf = with_cache(settings(pictures), "disk" if is_damaged else "ram")
    conf = replace(conf, data=replace(conf.data, workers="1", cache_dir=str(tmp_path / "cache")))
    if is_damaged:
        came_out(conf, tmp_path / "before")
        for entry in entries(tmp_path / "cache"):
            (entry / "meta.json").write_text("{}")
        monkeypatch.setattr(ActivationCache, "has", lambda self, view: True)
    told: list[str] = []
    real, start = Feed.before_workers, loader.build_data_loader

    def noted(self: Feed, call: Callable[[], None]) -> None:
        real(self, lambda: (told.append(self._title), call())[0])

    def started(dataset: Any, keys: Any, workers: int, device: torch.device) -> Any:
        told.append("built")
        return start(dataset, keys, workers, device)

    monkeypatch.setattr(Feed, "before_workers", noted)
    monkeypatch.setattr(loader, "build_data_loader", started)
    came_out(conf, tmp_path / "run")
    # Validation's activations come first, before anything is saved; then two views of training, then the first again.
    built = [name for name in told if name != "built"]
    assert built == ["train", "train", "test"] and told.count("built") >= 4
    assert all(told[place - 1] == "built" for place, name in enumerate(told) if name != "built")


def test_jobs_of_one_process_share_memory(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "ram")
    with shared_between_runs():
        came_out(conf, tmp_path / "a")
        came_out(replace(conf, optim=replace(conf.optim, layer_decay=0.5)), tmp_path / "b")
        assert hits(tmp_path / "b") == [1.0, 1.0, 1.0]
    came_out(conf, tmp_path / "c")
    assert hits(tmp_path / "c")[0] == 0.0


def test_jobs_with_other_frozen_layers_between_them_share_memory(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "ram")
    with shared_between_runs():
        for name, fix_layer in (("a", 4), ("b", 1), ("c", 4), ("d", 1)):
            came_out(replace(conf, optim=replace(conf.optim, fix_layer=fix_layer)), tmp_path / name)
    assert [hits(tmp_path / name)[0] for name in "abcd"] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["ram", "auto", "none"])
def test_jobs_of_one_process_measure_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Frozen layers on the same images; other layers, images or another precision are measured anew."""
    measured = []

    def counted(*given: Any) -> Measured:
        measured.append(given)
        return measure(*given)

    monkeypatch.setattr(feeds, "measure", counted)
    conf = with_cache(settings(pictures, train=TrainConf(epochs=1)), kind)
    jobs = {
        "a": conf,
        "decay": replace(conf, optim=replace(conf.optim, layer_decay=0.5)),
        "dtype": replace(conf, prefix=replace(conf.prefix, dtype=PrefixDtype.bf16)),
        "layers": replace(conf, optim=replace(conf.optim, fix_layer=1)),
        "images": replace(conf, data=replace(conf.data, split_seed=5)),
    }
    counts = []
    with shared_between_runs():
        for name, job in jobs.items():
            found = came_out(job, tmp_path / name)
            counts.append(len(measured))
            assert_same(found, came_out(with_cache(job, "none"), tmp_path / f"{name} alone"))
            del measured[counts[-1] :]
    assert counts == ([1, 2, 3, 4, 5] if kind == "none" else [1, 1, 2, 3, 4])


@pytest.mark.parametrize("damage", ["byte", "short", "gone", "meta", "empty", "digit"])
def test_damage_is_found_said_and_mended(pictures: Path, tmp_path: Path, damage: str) -> None:
    conf = with_cache(settings(pictures), "disk")
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    whole = came_out(conf, tmp_path / "a")
    for entry in entries(tmp_path / "cache"):
        path = entry / ("activations" if damage in ("byte", "short", "gone") else "meta.json")
        data = bytearray(path.read_bytes())
        if damage == "byte":
            data[len(data) // 2] ^= 1
        elif damage == "digit":
            data[data.index(b"128")] ^= 2  # of the shape: 328, which is as good a number
        else:
            del data[0 if damage == "empty" else len(data) // 2 :]
        path.unlink()
        if damage != "gone":
            path.write_bytes(data)
    assert_same(whole, came_out(conf, tmp_path / "b"))
    assert "damaged" in (tmp_path / "b" / "run.log").read_text()
    came_out(conf, tmp_path / "c")
    assert hits(tmp_path / "c") == [1.0, 1.0, 1.0]


def test_activations_beyond_the_limit_of_the_disk_are_refused(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "disk")
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    conf = replace(conf, prefix=replace(conf.prefix, max_gib=1e-6))
    with pytest.raises(ValueError, match=r"those of val .* need .* enough for [\d,]+ images\. Try prefix\.max_gib="):
        came_out(conf, tmp_path / "run")


# --- the layers themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("half", [False, True])
def test_a_batch_may_be_short_and_in_any_order(name: str, half: bool, fast_attention: None) -> None:
    """The law that caching rests on: an image's activations depend on nothing but the image."""
    torch.backends.mha.set_fastpath_enabled(not half)
    model = small_model(name)
    freeze(model, max(0, model.num_blocks - 1))
    model.train()
    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    dtype = torch.bfloat16 if half else torch.float32
    prefix = FrozenPrefix(model, batch_size=8, autocast=autocast, dtype=dtype)
    images = small_images(name, batch=8)
    whole = prefix(images)
    order = torch.randperm(8)
    assert torch.equal(prefix(images[order]), whole[order])
    assert torch.equal(prefix(images[:3]), whole[:3])
    # Weights that were cast once give what autocast gives.
    with autocast, torch.no_grad():
        assert torch.equal(whole, model(images, stop=model.boundary))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_prefix_that_learns_is_refused() -> None:
    model = small_model("vit")
    freeze(model, 1)
    next(model.net.parameters()).requires_grad_(True)
    with pytest.raises(AssertionError, match="freeze"):
        FrozenPrefix(model, batch_size=8, autocast=contextlib.nullcontext(), dtype=torch.float32)


def test_values_too_large_for_fp16(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrozenPrefix.compute
    monkeypatch.setattr(FrozenPrefix, "compute", lambda self, images: real(self, images) * 1e5)
    conf = settings(pictures, precision=Precision.bf16)
    asked = replace(conf, prefix=PrefixConf(cache=PrefixCache.ram, dtype=PrefixDtype.fp16))
    with pytest.raises(ValueError, match=r"prefix\.dtype=fp16: .* use prefix\.dtype=bf16"):
        came_out(asked, tmp_path / "fp16")
    with contextlib.suppress(FloatingPointError):
        came_out(conf, tmp_path / "auto")
    assert "as bfloat16 at the boundary" in (tmp_path / "auto" / "run.log").read_text()


@pytest.mark.parametrize("kind", ["none", "ram"])
def test_an_image_beyond_fp16_that_comes_later_ends_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """fp16 was chosen by the first batch of validation; one activation of every later one is far above."""
    real = FrozenPrefix.compute
    seen: list[float] = []

    def run_on(self: FrozenPrefix, images: torch.Tensor) -> torch.Tensor:
        h = real(self, images)
        if self.stored_as is not None:
            h[:, 1, 1] = 1e6
        return h

    def noted(self: FrozenPrefix, images: torch.Tensor) -> torch.Tensor:
        values = call(self, images)
        seen.append(values.abs().max().item())
        return values

    call = FrozenPrefix.__call__
    monkeypatch.setattr(FrozenPrefix, "compute", run_on)
    monkeypatch.setattr(FrozenPrefix, "__call__", noted)
    conf = with_cache(settings(pictures, precision=Precision.bf16, train=TrainConf(epochs=1)), kind)
    rows, _, _ = came_out(conf, tmp_path / "run")
    assert "as float16 at the boundary" in (tmp_path / "run" / "run.log").read_text()
    assert max(seen) == 65504 and np.isfinite(rows[0]["train/loss"])


# --- settings that would be ignored ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "fix_layer", "words"),
    [
        (PrefixConf(cache=PrefixCache.ram), -1, "prefix.cache=ram would be ignored: nothing is frozen"),
        (PrefixConf(dtype=PrefixDtype.fp16), -1, "prefix.dtype=fp16 would be ignored"),
        (PrefixConf(cache=PrefixCache.ram, max_gib=3), 4, "prefix.max_gib=3 would be ignored"),
    ],
)
def test_ignored_settings_are_errors(prefix: PrefixConf, fix_layer: int, words: str) -> None:
    problems = find_problems(Conf(optim=OptimConf(fix_layer=fix_layer), prefix=prefix))
    assert len(problems) == 1 and words in problems[0]


def test_a_model_without_slices(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConf(family=Family.vit, name="test_efficientnet", pretrained="none", head=HeadKind.random)
    conf = settings(pictures, model=model, optim=OptimConf(fix_layer=1), train=TrainConf(epochs=1))
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ValueError, match=r"prefix\.cache=ram would be ignored: .*chain"),
    ):
        came_out(with_cache(conf, "ram"), tmp_path / "ram")
    came_out(with_cache(conf, "auto"), tmp_path / "auto")
