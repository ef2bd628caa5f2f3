"""Damaged decoded images on disk never reach a batch, whatever is damaged: the batches are those without a cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import AugmentConf, CacheKind, DataConf, Recipe, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import Loader, Source, open_source
from finetune.data.caches.entries import cache_folder
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.system.seals import read_sealed, seal

CROP = Preprocess(16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), crop_fraction=0.9)
WHOLE = AugmentConf(recipe=Recipe.crop)  # images are stored in sizes of their own


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20 + i, 40 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))


def epochs(source: Source, folder: Path, kind: CacheKind, augment: AugmentConf | None, workers: int = 0) -> list[str]:
    """A checksum of each batch of two epochs."""
    conf = DataConf(batch_size=5, cache=kind, cache_dir=str(folder), workers=str(workers))
    loader = Loader(source.splits["train"], CROP, conf=conf, augment=augment, seed=1, device=torch.device("cpu"))
    parts = [torch.cat([part.reshape(-1).double() for part in b]) for e in (0, 1) for b in loader.epoch(e)]
    loader.close()
    return [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts]


def entry(folder: Path) -> Path:
    (place,) = (path for path in (cache_folder(str(folder)) / "pixels").iterdir() if path.is_dir())
    return place


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(3000) + data[3100:])


def foreign(path: Path) -> None:
    """A whole index of fewer images."""
    path.write_bytes(read_sealed(path))
    np.save(path, np.load(path)[:-1])
    seal(path)


DAMAGES = {
    "flip": ("pixels.u8", lambda path: flip(path, 5000)),
    "last byte": ("pixels.u8", lambda path: flip(path, -1)),
    "zeros": ("pixels.u8", zero),
    "cut": ("pixels.u8", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "empty": ("pixels.u8", lambda path: os.truncate(path, 0)),
    "gone": ("pixels.u8", os.unlink),
    "longer": ("pixels.u8", lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "index flip": ("index.npy", lambda path: flip(path, 200)),
    "index header": ("index.npy", lambda path: flip(path, 20)),
    "index cut": ("index.npy", lambda path: os.truncate(path, path.stat().st_size - 8)),
    "index empty": ("index.npy", lambda path: os.truncate(path, 0)),
    "index gone": ("index.npy", os.unlink),
    "index longer": ("index.npy", lambda path: path.write_bytes(path.read_bytes() + b"\0" * 28)),
    "index foreign": ("index.npy", foreign),
    "index of no array": ("index.npy", lambda path: path.write_bytes(b"{}")),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_changes_no_batch_is_said_once_and_mended(
    tmp_path: Path, source: Source, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    augment = WHOLE if "e" in damage else None
    workers = 2 if damage in ("flip", "zeros", "index cut") else 0
    expected = epochs(source, tmp_path / "cache", CacheKind.none, augment)
    assert epochs(source, tmp_path / "cache", CacheKind.disk, augment) == expected
    place = entry(tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    name, do = DAMAGES[damage]
    do(place / name)
    with caplog.at_level("INFO", logger="finetune"):
        assert epochs(source, tmp_path / "cache", CacheKind.disk, augment, workers) == expected
    said = [line for line in caplog.messages if "damaged" in line]
    assert len(said) == (0 if damage == "longer" else 1), caplog.messages
    assert {path.name: path.read_bytes()[: len(before[path.name])] for path in place.iterdir()} == before
    caplog.clear()
    assert epochs(source, tmp_path / "cache", CacheKind.disk, augment) == expected and not caplog.messages


def test_damage_that_cannot_be_mended_on_disk_still_changes_no_batch(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in the cache of another user."""
    expected = epochs(source, tmp_path / "cache", CacheKind.disk, None)
    path = entry(tmp_path / "cache") / "pixels.u8"
    flip(path, 1000)
    damaged = path.read_bytes()
    monkeypatch.setattr("finetune.data.caches.records.os.O_NOFOLLOW", os.O_CREAT | os.O_EXCL)  # refuses to open it
    assert epochs(source, tmp_path / "cache", CacheKind.disk, None) == expected
    assert path.read_bytes() == damaged


def test_an_image_that_could_not_be_read_at_first_is_no_damage(tmp_path: Path, source: Source) -> None:
    split = source.splits["train"]
    Path(split.name_of(3)).write_bytes(b"")
    conf = DataConf(cache=CacheKind.disk, cache_dir=str(tmp_path / "cache"), on_error="skip")
    cache = open_cache(split, first_step(CROP, None), conf)
    assert cache.load(3) is None and not cache.mend(3, torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert cache.load(2) is not None
