"""Laws of loading and its caches: a cache changes no pixel, is made once, and never gives pixels of an older file."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import AugmentConf, CacheKind, Conf, DataConf, OnError, Recipe, SourceKind, find_problems
from finetune.core.preprocess import Preprocess
from finetune.data import ImageError, Loader, Source, open_source
from finetune.data.caches.entries import beside, cache_folder
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.data.images.transforms import fit_square
from finetune.data.loading.workers import pick_workers
from finetune.data.sources.stores import FileStore

CPU = torch.device("cpu")
CROP = Preprocess(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), crop_fraction=0.9)
RECIPES = [None, AugmentConf(recipe=Recipe.none), AugmentConf(flip=0.5), AugmentConf(recipe=Recipe.crop)]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20 + i, 40 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.jpg")
    return reopened(tmp_path)


def reopened(tmp_path: Path) -> Source:
    return open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))


def conf(tmp_path: Path, cache: CacheKind, **changes: object) -> DataConf:
    return DataConf(batch_size=5, cache=cache, cache_dir=str(tmp_path / "cache"), **changes)  # type: ignore[arg-type]


def epoch_of(source: Source, data: DataConf, augment: AugmentConf | None, preprocess: Preprocess = CROP) -> list[str]:
    loader = Loader(source.splits["train"], preprocess, conf=data, augment=augment, seed=1, device=CPU)
    batches = [
        hashlib.sha256(b"".join(x.numpy().tobytes() for x in b)).hexdigest() for e in (0, 1) for b in loader.epoch(e)
    ]
    loader.close()
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("augment", RECIPES, ids=["eval", "none", "light", "crop"])
def test_pixels_are_the_same_with_any_cache_and_any_workers(
    tmp_path: Path, source: Source, augment: AugmentConf | None
) -> None:
    expected = epoch_of(source, conf(tmp_path, CacheKind.none, workers="0"), augment)
    for cache in (CacheKind.none, CacheKind.ram, CacheKind.disk):
        for workers in ("0", "2", "auto"):
            assert epoch_of(source, conf(tmp_path, cache, workers=workers), augment) == expected, (cache, workers)


@pytest.mark.parametrize("augment", RECIPES[:2], ids=["eval", "none"])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_pixels_are_the_same_from_the_device(
    tmp_path: Path, source: Source, augment: AugmentConf | None, resize: str
) -> None:
    preprocess = Preprocess(16, CROP.mean, CROP.std, resize=resize, crop_fraction=0.9)
    expected = epoch_of(source, conf(tmp_path, CacheKind.none, workers="0"), augment, preprocess)
    assert epoch_of(source, conf(tmp_path, CacheKind.device), augment, preprocess) == expected


@pytest.mark.parametrize("epoch_images", [0, 40])
def test_an_epoch_from_the_device_can_be_entered_anywhere(tmp_path: Path, source: Source, epoch_images: int) -> None:
    data = conf(tmp_path, CacheKind.device, epoch_images=epoch_images)
    none = AugmentConf(recipe=Recipe.none)
    loader = Loader(source.splits["train"], CROP, conf=data, augment=none, seed=1, device=CPU)
    whole, rest = [batch[0].clone() for batch in loader.epoch(3)], [x[0].clone() for x in loader.epoch(3, skip=1)]
    assert len(whole) == len(loader) and all(map(torch.equal, whole[1:], rest))


def test_what_the_host_augments_is_not_fed_from_the_device() -> None:
    data = DataConf(cache=CacheKind.device)
    for recipe in (Recipe.light, Recipe.crop):
        (problem,) = find_problems(Conf(data=data, augment=AugmentConf(recipe=recipe)))
        assert f"data.cache=device with augment={recipe}" in problem and "use data.cache=ram" in problem
    none = AugmentConf(recipe=Recipe.none)
    assert find_problems(Conf(data=data, augment=none)) == []
    data.workers = "2"
    assert any("data.workers=2 would be ignored" in problem for problem in find_problems(Conf(data=data, augment=none)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("images", [7, 90])
def test_resampled_epochs_are_the_same_for_any_workers_and_from_any_batch(
    tmp_path: Path, source: Source, images: int
) -> None:
    augment = AugmentConf(flip=0.5, repeats=2)
    found = []
    for workers in ("0", "2"):
        data = conf(tmp_path, CacheKind.none, workers=workers, epoch_images=images)
        loader = Loader(source.splits["train"], CROP, conf=data, augment=augment, seed=1, device=CPU)
        whole = list(loader.epoch(1))
        assert loader.num_images == 2 * images == sum(len(ids) for _, _, ids in whole) and len(loader) == len(whole)
        rest = list(loader.epoch(1, skip=2))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))
        found.append(torch.cat([images for images, _, _ in whole]))
        loader.close()
    assert torch.equal(*found)
    assert len(found[0].flatten(1).unique(dim=0)) == 2 * images  # every repeat is a view of its own
    val = Loader(source.splits["val"], CROP, conf=data, augment=None, seed=1, device=CPU)
    assert val.num_images == len(source.splits["val"])  # validation images are never drawn with replacement


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_squares_are_kept_where_the_transform_starts_with_them(resize: str) -> None:
    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1), resize=resize, crop_fraction=0.9)
    image = torch.randint(0, 256, (3, 31, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for augment in RECIPES[:3]:
        step = first_step(preprocess, augment)
        assert torch.equal(fit_square(step(image), step.rest), fit_square(image, preprocess))
    step = first_step(preprocess, RECIPES[3])
    assert step.square is None and step.rest == preprocess and step(image) is image


def pixels_in(tmp_path: Path) -> Path:
    return cache_folder(str(tmp_path / "cache")) / "pixels"


def test_a_cache_on_disk_is_built_once(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    data = conf(tmp_path, CacheKind.disk, workers="0")
    expected = epoch_of(source, data, None)
    monkeypatch.setattr(FileStore, "read", lambda *_: pytest.fail("read"))
    assert epoch_of(source, data, None) == expected
    assert [path.suffix for path in sorted((pixels_in(tmp_path)).iterdir())] == [
        "",
        ".lock",
    ]


def test_a_changed_file_or_resize_is_never_served_stale(tmp_path: Path, source: Source) -> None:
    data = conf(tmp_path, CacheKind.disk, workers="0")
    epoch_of(source, data, None)
    Image.new("RGB", (30, 30), "red").save(source.splits["train"].name_of(3))
    plain = conf(tmp_path, CacheKind.none, workers="0")
    assert epoch_of(source, data, None) == epoch_of(source, plain, None)
    for other in (Preprocess(16, CROP.mean, CROP.std), Preprocess(16, CROP.mean, CROP.std, interpolation="bilinear")):
        assert epoch_of(source, data, None, other) == epoch_of(source, plain, None, other)
    again = Preprocess(16, (0, 0, 0), (1, 1, 1), crop_fraction=0.9)
    places = set(os.listdir(pixels_in(tmp_path)))
    epoch_of(source, data, None, again)
    assert set(os.listdir(pixels_in(tmp_path))) == places  # normalising comes later: the same cache


def _open(tmp_path: Path, results: object) -> None:
    source = reopened(tmp_path)
    results.put(epoch_of(source, conf(tmp_path, CacheKind.disk, workers="0"), None))  # type: ignore[attr-defined]


def test_runs_that_build_at_once_share_one_cache(tmp_path: Path, source: Source) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [epoch_of(source, conf(tmp_path, CacheKind.none, workers="0"), None)] * 3
    assert len([path for path in (pixels_in(tmp_path)).iterdir() if path.is_dir()]) == 1


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path, source: Source) -> None:
    data = conf(tmp_path, CacheKind.disk, workers="0")
    epoch_of(source, data, None)
    (place,) = (path for path in (pixels_in(tmp_path)).iterdir() if path.is_dir())
    place.rename(beside(place))
    epoch_of(source, data, None)
    assert [path for path in place.parent.iterdir() if path.is_dir()] == [place]


@pytest.mark.parametrize("cache", [CacheKind.ram, CacheKind.disk, CacheKind.device])
def test_a_bad_file_follows_the_policy(tmp_path: Path, source: Source, cache: CacheKind) -> None:
    name = source.splits["train"].name_of(4)
    Path(name).write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        epoch_of(source, conf(tmp_path, cache, workers="0"), None)
    skip = {"on_error": OnError.skip, "workers": "0"}
    plain = epoch_of(source, conf(tmp_path, CacheKind.none, **skip), None)
    assert epoch_of(source, conf(tmp_path, cache, **skip), None) == plain


def test_too_little_room_is_said_before_it_is_used(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.caches.pixel_cache.free_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"data\.cache=ram: needs .* or more, .* use data\.cache=disk"):
        epoch_of(source, conf(tmp_path, CacheKind.ram, workers="0"), None)


def test_a_cache_travels_to_workers_that_are_not_forked(tmp_path: Path, source: Source) -> None:
    split = source.splits["train"]
    for cache in (CacheKind.disk, CacheKind.ram):
        here = open_cache(split, first_step(CROP, None), conf(tmp_path, cache))
        first = here.load(2)
        sent = pickle.dumps(here)
        assert first is not None and torch.equal(pickle.loads(sent).load(2), first)  # type: ignore[arg-type]
        assert cache == CacheKind.ram or len(sent) < 5_000


def test_memory_stays_over_epochs(tmp_path: Path, source: Source) -> None:
    import resource

    data = conf(tmp_path, CacheKind.disk, workers="0")
    loader = Loader(source.splits["train"], CROP, conf=data, augment=AugmentConf(), seed=1, device=CPU)
    list(loader.epoch(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for epoch in range(50):
        assert sum(len(ids) for _, _, ids in loader.epoch(epoch)) == len(source.splits["train"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_workers_are_as_many_as_the_device_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.loading.workers.cores", lambda: 8)
    cuda = torch.device("cuda")
    assert [pick_workers(cost, cuda) for cost in (1e-6, 1e-4, 1e-3, 0.1)] == [0, 1, 4, 8]
    assert [pick_workers(cost, CPU) for cost in (1e-4, 5e-3)] == [0, 2]
    monkeypatch.setattr("finetune.data.loading.workers.cores", lambda: 2)
    assert pick_workers(0.1, CPU) == 0
