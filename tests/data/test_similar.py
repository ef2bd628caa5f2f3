"""Images that look alike: which are found, how fast, and that `data.group=similar` keeps them together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.__main__ import main
from finetune.config import DataConf, SourceKind
from finetune.data import open_source
from finetune.data.checks.looks import FLAT, RADIUS, look_of, near_pairs
from finetune.system.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed: int) -> Image.Image:
    """Some coarse shapes, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def write(folder: Path, name: str, image: Image.Image, **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)


def look(image: Image.Image) -> int:
    return look_of(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def bits(one: int, other: int) -> int:
    return bin(one ^ other).count("1")


def test_copies_look_alike_and_other_pictures_do_not(tmp_path: Path) -> None:
    looks, near = [], []
    for seed in range(20):
        image = picture(seed)
        image.save(tmp_path / "worse.jpg", quality=60)
        copies = [
            image.resize((80, 60)),
            image.resize((333, 250)),
            image.convert("L"),
            Image.open(tmp_path / "worse.jpg"),
        ]
        near += [bits(look(image), look(copy)) <= RADIUS for copy in copies]
        looks.append(look(image))
    assert sum(near) >= 0.95 * len(near)
    assert min(bits(one, other) for i, one in enumerate(looks) for other in looks[:i]) > 4 * RADIUS


def test_pictures_of_one_colour_are_compared_with_nothing() -> None:
    for colour in ("white", "black", "red"):
        assert look(Image.new("RGB", (50, 40), colour)) == FLAT
    first, _ = near_pairs(np.array([FLAT, FLAT, 0, 0], dtype=np.uint64))
    assert not len(first)
    assert look(Image.new("RGB", (1, 1), "red")) == FLAT and look(picture(0).resize((1, 90))) > 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 2**64 - 1), max_size=12), st.data())
def test_all_near_pairs_are_found_and_no_other(starts: list[int], data: st.DataObject) -> None:
    looks = list(starts)
    for start in starts:
        for _ in range(data.draw(st.integers(0, 3))):
            flipped = data.draw(st.sets(st.integers(0, 63), max_size=RADIUS + 1))
            looks.append(max(2, start ^ sum(1 << bit for bit in flipped)))
    first, second = near_pairs(np.array(looks, dtype=np.uint64))
    found = set(zip(first.tolist(), second.tolist(), strict=True))
    assert all(i < j and bits(looks[i], looks[j]) <= RADIUS for i, j in found)
    one_each = {value: looks.index(value) for value in looks}
    for i, one in enumerate(looks):
        for j in range(i + 1, len(looks)):
            if one == looks[j]:
                assert (one_each[one], j) in found  # each copy is paired with the first one
            elif bits(one, looks[j]) <= RADIUS:
                assert tuple(sorted((one_each[one], one_each[looks[j]]))) in found


def test_many_images_of_one_look_are_no_work() -> None:
    looks = np.full(200_000, 12345, dtype=np.uint64)
    first, second = near_pairs(looks)
    assert (first == 0).all() and second.tolist() == list(range(1, 200_000))


def make_data(root: Path) -> DataConf:
    """Ten pictures of each of two classes, each also as a small JPEG of the other class's folder."""
    for seed in range(20):
        name, other = "ab"[seed % 2], "ba"[seed % 2]
        write(root / name, f"{seed}.png", picture(seed))
        write(root / other, f"{seed}-small.jpg", picture(seed).resize((80, 60)), quality=95)
    return DataConf(source=SourceKind.folder, root=str(root))


@pytest.mark.parametrize("folds", [0, 4])
def test_images_that_look_alike_stay_together(tmp_path: Path, folds: int) -> None:
    conf = make_data(tmp_path / "data")
    conf.folds = folds

    def shared(conf: DataConf) -> int:
        splits = open_source(conf).splits.values()
        seeds = [{Path(split.name_of(i)).stem.partition("-")[0] for i in range(len(split))} for split in splits]
        return len((seeds[0] & seeds[1]) | (seeds[0] & seeds[2]) | (seeds[1] & seeds[2]))

    assert shared(conf) > 0
    conf.group = "similar"
    assert shared(conf) == 0
    assert "40 images of 20 groups that stay together" in open_source(conf).description


def test_where_nothing_is_cut_similar_would_be_ignored(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_data(tmp_path / "data" / split)
    with pytest.raises(UserError, match=r"data\.group=similar would be ignored: no split of .* is cut"):
        open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data"), group="similar"))


def test_the_check_lists_images_that_look_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data(tmp_path / "data")
    (tmp_path / "data" / "b" / "same.png").write_bytes((tmp_path / "data" / "a" / "0.png").read_bytes())
    words = ["data=folder", f"data.root={tmp_path / 'data'}", f"hydra.run.dir={tmp_path / 'out'}"]
    assert main(["check", *words]) == 0
    shown = capsys.readouterr().out
    lines = (tmp_path / "out" / "similar.txt").read_text().splitlines()
    assert "images that look alike" in shown and "20 lines in" in shown and len(lines) == 20
    assert any("0.png" in line and "0-small.jpg" in line and "same.png" in line for line in lines)
    assert len((tmp_path / "out" / "duplicates.txt").read_text().splitlines()) == 1
    # A training start has decoded the images without their looks; the check still computes them.
    assert main(["check", *words[:2], f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "similar.txt").read_text() == (tmp_path / "out" / "similar.txt").read_text()
