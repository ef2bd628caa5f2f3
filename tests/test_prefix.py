"""A frozen prefix, computed or kept, is the same training to the last bit; damage and lack of room are told."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import CHAINS, small_images, small_model

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
    validate,
)
from finetune.data.order import epoch_order, most_showings
from finetune.layers import freeze
from finetune.prefix import FrozenPrefix
from finetune.prefix.feed import found_in
from finetune.prefix.store import Builder, open_on_disk
from finetune.records import timeless
from finetune.run import run
from finetune.shelf import shared_between_runs


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
def test_kept_equals_computed_bit_for_bit(pictures: Path, tmp_path: Path, name: str) -> None:
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
    assert_same(plain, came_out(with_cache(conf, "disk"), tmp_path / "disk"))


def test_fresh_views_are_computed_and_validation_is_kept(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures, augment=AugmentConf(recipe=Recipe.light))
    plain = came_out(conf, tmp_path / "none")
    assert_same(plain, came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert hits(tmp_path / "ram") == [0.0, 0.0, 0.0]
    log = (tmp_path / "ram" / "run.log").read_text()
    assert "augment.views=K" in log and "val: computed once" in log


def test_mixup_is_not_kept(pictures: Path, tmp_path: Path) -> None:
    conf = settings(pictures, augment=AugmentConf(recipe=Recipe.light, views=1, mixup=0.5))
    assert_same(came_out(conf, tmp_path / "none"), came_out(with_cache(conf, "ram"), tmp_path / "ram"))
    assert "MixUp" in (tmp_path / "ram" / "run.log").read_text()


def test_auto_keeps_what_is_read_again(pictures: Path, tmp_path: Path) -> None:
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
    from finetune import training

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


# --- what is kept on disk --------------------------------------------------------------------------------------------


def entries(root: Path) -> list[Path]:
    return sorted(path for path in (root / "activations").iterdir() if path.is_dir())


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


def test_jobs_of_one_process_share_memory(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "ram")
    with shared_between_runs():
        came_out(conf, tmp_path / "a")
        came_out(replace(conf, optim=replace(conf.optim, layer_decay=0.5)), tmp_path / "b")
        assert hits(tmp_path / "b") == [1.0, 1.0, 1.0]
    came_out(conf, tmp_path / "c")
    assert hits(tmp_path / "c")[0] == 0.0


@pytest.mark.parametrize("damage", ["byte", "short", "meta", "present"])
def test_damage_is_found_said_and_mended(pictures: Path, tmp_path: Path, damage: str) -> None:
    conf = with_cache(settings(pictures), "disk")
    conf = replace(conf, data=replace(conf.data, cache_dir=str(tmp_path / "cache")))
    whole = came_out(conf, tmp_path / "a")
    for entry in entries(tmp_path / "cache"):
        path = entry / {"byte": "activations", "short": "activations", "meta": "meta.json"}.get(damage, "present.npy")
        data = bytearray(path.read_bytes())
        if damage == "byte":
            data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "byte" else data[: len(data) // 2])
    assert_same(whole, came_out(conf, tmp_path / "b"))
    assert "damaged" in (tmp_path / "b" / "run.log").read_text()
    came_out(conf, tmp_path / "c")
    assert hits(tmp_path / "c") == [1.0, 1.0, 1.0]


def _slow_fill(builder: Builder) -> None:
    for value in range(4):
        builder.put(torch.full((1, 3), float(value)), torch.tensor([True]), torch.float32)
        time.sleep(0.2)


def _build(place: Path, built: object) -> None:
    built.put(open_on_disk(place, 4, _slow_fill)[1])  # type: ignore[attr-defined]


def test_two_builders_make_one_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    context, place = multiprocessing.get_context("spawn"), tmp_path / "folder" / "block"
    built = context.Queue()
    doomed = context.Process(target=_build, args=(place, built))
    doomed.start()
    while not list((tmp_path / "folder").glob("*.tmp")):
        time.sleep(0.02)
    doomed.kill()
    doomed.join()
    assert not place.exists()
    pair = [context.Process(target=_build, args=(place, built)) for _ in range(2)]
    for process in pair:
        process.start()
    assert sorted(built.get(timeout=60) for _ in pair) == [False, True]
    for process in pair:
        process.join()
    assert not list((tmp_path / "folder").glob("*.tmp"))
    block, again = open_on_disk(place, 4, _slow_fill)
    assert not again and torch.equal(block.values[:, 0], torch.arange(4.0))


def test_what_is_kept_has_a_bound(pictures: Path, tmp_path: Path) -> None:
    conf = with_cache(settings(pictures), "disk")
    conf = replace(conf, prefix=replace(conf.prefix, max_gib=1e-6))
    with pytest.raises(ValueError, match=r"need 0\.0. GiB .* enough for [\d,]+ images\. Try prefix\.max_gib="):
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
    real = FrozenPrefix._run
    monkeypatch.setattr(FrozenPrefix, "_run", lambda self, images: real(self, images) * 1e5)
    conf = settings(pictures, precision=Precision.bf16)
    asked = replace(conf, prefix=PrefixConf(cache=PrefixCache.ram, dtype=PrefixDtype.fp16))
    with pytest.raises(ValueError, match=r"prefix\.dtype=fp16: .* use prefix\.dtype=bf16"):
        came_out(asked, tmp_path / "fp16")
    with contextlib.suppress(FloatingPointError):
        came_out(conf, tmp_path / "auto")
    assert "as bfloat16 at the boundary" in (tmp_path / "auto" / "run.log").read_text()


def test_found_in() -> None:
    wanted = torch.tensor([3, 3, 5, 9, 9])
    assert found_in(wanted, torch.tensor([5, 9, 9])).tolist() == [False, False, True, True, True]
    assert found_in(wanted, wanted).all()


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
    problems = validate(Conf(optim=OptimConf(fix_layer=fix_layer), prefix=prefix))
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
