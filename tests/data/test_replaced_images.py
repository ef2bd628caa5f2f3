"""A replaced image is never served as it was, also where path, size and date of the file are the same as before."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import CacheKind, DataConf, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import open_source
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.data.split import Split
from finetune.prefix.identity import split_digest
from tests.data.test_counts import SOURCES, Cell, made

SQUARE = Preprocess(size=6, mean=(0, 0, 0), std=(1, 1, 1), resize="squash")


def pictures(seed: int) -> list[Cell]:
    """Pictures of the classes a and b, which take as many bytes each whatever they show."""
    random, rows = np.random.default_rng(seed), []
    for word in "aabbab":
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(buffer, format="BMP")
        rows.append(("train", word, buffer.getvalue()))
    return rows


def cached(split: Split, conf: DataConf) -> list[torch.Tensor]:
    """Every image of a split as the cache on disk gives it."""
    cache = open_cache(split, first_step(SQUARE, None), conf)
    images = [cache.load(index) for index in range(len(split))]
    return [image.clone() for image in images if image is not None]


def assert_never_as_it_was(conf: DataConf, root: Path, replace: Callable[[], object]) -> None:
    """Fill the caches, `replace` the images below `root` with all dates and fingerprints kept, and look again."""
    conf.cache, conf.cache_dir = CacheKind.disk, str(root.parent / "caches")
    conf.val_fraction = conf.test_fraction = 0
    files = [path for path in root.rglob("*") if path.is_file()]
    dates = {path: os.stat(path).st_mtime_ns for path in files}
    states = {path: path.read_bytes() for path in files if path.name == "state.json"}
    sizes, found = {path: os.stat(path).st_size for path in files if path.suffix != ".parquet"}, []  # it is packed
    for number in range(2):
        split = open_source(conf).splits["train"]
        digest = split_digest(split, torch.ones(len(split)), SQUARE, None, 0, skip=False)
        again = open_source(conf).splits["train"]
        assert digest == split_digest(again, torch.ones(len(split)), SQUARE, None, 0, skip=False)
        images = cached(split, conf)
        assert all(torch.equal(image, split.load(index)) for index, image in enumerate(images)) and len(images) == 6
        assert all(map(torch.equal, images, cached(again, conf)))
        found.append((digest, torch.stack(images)))
        if not number:
            del split, again
            replace()
            for path, content in states.items():
                path.write_bytes(content)
            for path, date in dates.items():
                os.utime(path, ns=(date, date))
    assert {path: os.stat(path).st_mtime_ns for path in files} == dates
    assert {path: os.stat(path).st_size for path in sizes} == sizes
    assert found[0][0] != found[1][0] and not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", SOURCES)
def test_replaced_images_are_read_anew(tmp_path: Path, kind: str) -> None:
    root = made(tmp_path / "data")
    conf = SOURCES[kind](root, pictures(0), False)
    assert_never_as_it_was(conf, root, lambda: SOURCES[kind](root, pictures(1), False))


def test_replaced_images_of_torchvision_are_read_anew(tmp_path: Path) -> None:
    root = tmp_path / "data"
    inside = root / "eurosat" / "2750"
    SOURCES["folder"](inside, pictures(0), False)
    for path in inside.glob("*/*.png"):
        path.rename(path.with_suffix(".jpg"))  # torchvision and Pillow look at the content

    def replace() -> None:
        SOURCES["folder"](inside, pictures(1), False)
        for path in inside.glob("*/*.png"):
            path.replace(path.with_suffix(".jpg"))

    assert_never_as_it_was(DataConf(source=SourceKind.torchvision, name="EuroSAT", root=str(root)), root, replace)
