"""Cached activations are kept over every change of the program but one of the code that computes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.app.run import run
from finetune.config import (
    AugmentConf,
    Conf,
    DataConf,
    Family,
    HeadKind,
    ModelConf,
    OptimConf,
    PrefixCache,
    PrefixConf,
    Recipe,
    SourceKind,
    TrainConf,
)
from finetune.data.caches.made_by import is_part, source_digest
from finetune.models.build import build_model
from finetune.prefix.feed import Feed
from finetune.prefix.identity import COMPUTING

PACKAGE = Path(finetune.__file__).parent
# Run while activations are computed, but change none of their numbers: the bar, locks and messages; the class that
# counts the errors of images; the settings as plain values; the check of settings, and errors.
HARMLESS = ("system", "config")


def pictures(root: Path) -> Path:
    for name, level in (("dark", 60), ("light", 180)):
        (root / name).mkdir(parents=True)
        for index in range(9):
            pixels = np.random.default_rng([level, index]).normal(level, 40, (40, 36, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("family", [Family.vit, Family.clip])
def test_every_file_that_runs_while_activations_are_made_is_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    used: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            used.add(path.relative_to(PACKAGE).as_posix())

    def watched(function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            sys.setprofile(note)
            try:
                return function(*args, **kwargs)  # type: ignore[operator]
            finally:
                sys.setprofile(None)

        return call

    monkeypatch.setattr(Feed, "_compute", watched(Feed._compute))
    name = {Family.vit: "glyph_vit", Family.clip: "glyph_clip"}[family]
    conf = Conf(
        model=ModelConf(family=family, name=name, head=HeadKind.random),
        data=DataConf(source=SourceKind.folder, root=str(pictures(tmp_path / "images")), batch_size=7, workers="0"),
        optim=OptimConf(lr=0.003, fix_layer=3),
        augment=AugmentConf(recipe=Recipe.crop, views=1),
        train=TrainConf(epochs=1),
        prefix=PrefixConf(cache=PrefixCache.disk),
    )
    conf.data.cache_dir = str(tmp_path / "cache")
    (tmp_path / "run").mkdir()
    run(conf, tmp_path / "run", [], quiet=True)
    assert {"core/layers.py", "prefix/feed.py", "data/images/transforms.py"} <= used
    assert not [name for name in used if not is_part(name, COMPUTING) and name.split("/")[0] not in HARMLESS]


def test_what_builds_a_network_and_its_layers_is_in_the_list() -> None:
    assert is_part(Path(build_model.__code__.co_filename).relative_to(PACKAGE).as_posix(), COMPUTING)
    assert all((PACKAGE / part).exists() for part in COMPUTING)
    assert not [
        name for name in ("app/run.py", "core/sched.py", "report/tables.py", "commands") if is_part(name, COMPUTING)
    ]


def test_a_change_elsewhere_keeps_activations(tmp_path: Path) -> None:
    names = ["core/layers.py", "core/optim.py", "prefix/frozen.py", "commands/train.py", "data/images/decode.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")

    def digest() -> str:
        return source_digest.__wrapped__(COMPUTING, tmp_path)

    for name in names:
        before = digest()
        (tmp_path / name).write_text("x = 2\n")
        assert (digest() == before) == (name in ("core/optim.py", "commands/train.py"))
    (tmp_path / "report.py").write_text("x = 1\n")
    assert digest() == digest()
    before = digest()
    (tmp_path / "prefix" / "new.py").write_text("")
    assert digest() != before
