"""What decoding gave under another version of the program or a library is made again and not believed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.config import AugmentConf, CacheKind, DataConf, OnError, Recipe, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import Source, open_source
from finetune.data.caches import made_by
from finetune.data.caches.entries import cache_folder
from finetune.data.caches.made_by import DECODING, decoded_by, is_part, source_digest
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.data.checks.examine import DataReport, examine
from finetune.data.checks.known_images import KnownImages

CROP = Preprocess(16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
PACKAGE = Path(finetune.__file__).parent
# Run while images are decoded, but change no pixel: files, bars and messages; settings; which images are looked at.
HARMLESS = ("system", "config", "data/checks", "data/streams.py")


@pytest.fixture
def conf(tmp_path: Path) -> DataConf:
    """Two classes of nine images, and a cache folder of its own."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(9):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    root, cache = str(tmp_path / "images"), str(tmp_path / "cache")
    return DataConf(source=SourceKind.folder, root=root, cache=CacheKind.disk, cache_dir=cache)


def cached(source: Source, conf: DataConf) -> None:
    open_cache(source.splits["train"], first_step(CROP, AugmentConf(recipe=Recipe.none)), conf)


def checked(source: Source, conf: DataConf, *, with_looks: bool = False) -> DataReport:
    return examine(source, KnownImages(conf.cache_dir, source.location), with_looks=with_looks)


def entries(conf: DataConf) -> int:
    return sum(path.is_dir() for path in (cache_folder(conf.cache_dir) / "pixels").iterdir())


def other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_version(monkeypatch, "torch")


def other_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_version(monkeypatch, "pillow")


def _with_version(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    known = made_by.version
    monkeypatch.setattr(made_by, "version", lambda name: "0.0.1" if name == library else known(name))


def other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_by, "source_digest", lambda parts: "0" * 32)


def other_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_by.torch.backends.cpu, "get_cpu_capability", lambda: "another")


@pytest.mark.parametrize("change", [other_torch, other_pillow, other_code, other_processor])
def test_what_another_version_has_stored_is_not_believed(
    conf: DataConf, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    source = open_source(conf)
    for _ in range(2):
        cached(source, conf)
        report = checked(source, conf)
    assert (entries(conf), report.remembered) == (1, 18)
    change(monkeypatch)
    cached(source, conf)
    assert (entries(conf), checked(source, conf).remembered) == (2, 0)
    assert checked(source, conf).remembered == 18
    monkeypatch.undo()
    cached(source, conf)
    assert (entries(conf), checked(source, conf).remembered) == (2, 0)


def test_a_lower_limit_of_an_image_is_no_known_image(conf: DataConf, tmp_path: Path) -> None:
    Image.new("RGB", (700, 700)).save(tmp_path / "images" / "a" / "large.png")
    conf.on_error = OnError.skip
    assert checked(open_source(conf), conf).unreadable == []
    conf.max_image_mib = 1
    for _ in range(2):
        (image,) = checked(open_source(conf), conf).unreadable
        assert Path(image.name).name == "large.png" and "data.max_image_mib" in image.reason
    conf.max_image_mib = 512
    report = checked(open_source(conf), conf)
    assert report.unreadable == [] and report.remembered == 19


def test_every_file_that_runs_while_images_are_decoded_is_in_the_list(conf: DataConf) -> None:
    used: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            used.add(path.relative_to(PACKAGE).as_posix())

    source = open_source(conf)
    sys.setprofile(note)
    try:
        cached(source, conf)
        checked(source, conf, with_looks=True)
        for row in range(4):
            first_step(CROP, None)(source.splits["train"].load(row))
    finally:
        sys.setprofile(None)
    assert {"data/images/decode.py", "data/images/transforms.py", "data/split.py"} <= used
    assert not [name for name in used if not is_part(name, (*DECODING, *HARMLESS))]
    assert all((PACKAGE / part).exists() for part in DECODING)


def test_only_code_that_decodes_counts(tmp_path: Path) -> None:
    def digest() -> str:
        return source_digest.__wrapped__(DECODING, tmp_path)

    for name, counts in {"data/images/decode.py": True, "data/split.py": True, "core/sched.py": False}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        before = digest()
        (tmp_path / name).write_text("x = 1\n")
        assert (digest() != before) == counts
    assert len(decoded_by().split()) == 12
