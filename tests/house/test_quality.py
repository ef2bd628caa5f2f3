"""The benchmark of accuracy: its sets appear whole and once, its table counts pairs right, a killed bench goes on."""

import argparse
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_quality
import quality_sets
from quality_sets import check, lay_out, sha256_of, unpack
from quality_table import append_row, markdown, paired, read_rows


def row(arm: str, seed: int, test: float, **more: object) -> dict[str, object]:
    found = {"set": "letters", "arm": arm, "seed": seed, "version": "v", "test": test, "val": 0.5, "chosen": "x"}
    return found | {"seconds": 2.0, "steps": 3, "epochs": 4} | more


def fake_fashion(folder: Path, count: int) -> Path:
    """Files in MNIST's format: image i is filled with i, and its class is i modulo 10."""
    place = folder / "usr/share/datasets/fashion-mnist"
    place.mkdir(parents=True)
    for name in ("train", "t10k"):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        sizes = b"".join(size.to_bytes(4, "big") for size in images.shape)
        (place / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes + images.tobytes()))
        labels = bytes(i % 10 for i in range(count))
        content = b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels
        (place / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def test_set_is_laid_out_once_and_its_splits_share_no_image(tmp_path, monkeypatch):
    package = fake_fashion(tmp_path / "package", 60)
    monkeypatch.setitem(quality_sets.SETS, "small", quality_sets.Recipe(quality_sets.fashion(2)))
    folder = lay_out("small", tmp_path, lambda name: package)
    counts = {split: len(list((folder / split).rglob("*.png"))) for split in quality_sets.SPLITS}
    assert counts == {"train": 20, "val": 40, "test": 60}
    pixels = [{path.read_bytes() for path in (folder / split).rglob("*.png")} for split in ("train", "val")]
    assert not pixels[0] & pixels[1]
    manifest = folder.with_suffix(".json").read_text()
    lay_out("small", tmp_path, lambda name: pytest.fail("fetched again"))
    shutil.rmtree(folder)
    folder.with_suffix(".json").unlink()  # as after a kill ahead of the manifest: it is made anew, and the same
    lay_out("small", tmp_path, lambda name: package)
    assert folder.with_suffix(".json").read_text() == manifest


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_package_is_checked_and_unpacked(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (tree / "usr").mkdir()
    (tree / "usr/file").write_text("content")
    deb = tmp_path / "x_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(deb)], check=True, capture_output=True)
    assert (unpack(check(deb, sha256_of(deb)), tmp_path / "x") / "usr/file").read_text() == "content"
    with pytest.raises(SystemExit, match="SHA-256"):
        check(deb, "0" * 64)
    assert not deb.exists()


def test_difference_has_students_interval():
    gap = paired([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])  # 2, 3, 4: mean 3, sd 1, and t(2) = 4.3027
    assert (gap.mean, gap.sd, gap.pairs) == (3.0, 1.0, 3)
    assert gap.half == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert paired([1.0], [0.5]).half is None


def test_table_pairs_seeds_and_takes_the_newest_line():
    rows = [row("ours", 0, 0.1), row("ours", 0, 0.8), row("ours", 1, 0.6), row("timm", 1, 0.7), row("timm", 2, 0.9)]
    lines = markdown(rows).splitlines()
    assert "| ours | 70.0 (14.1) [2] |" in lines
    assert "| timm | 80.0 (14.1) [2] |" in lines
    assert "| timm | -10.0 | -10.0 |" in lines  # of seed 1 alone, which both have


def test_killed_bench_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_quality, "data_version", lambda task, out: "images")
    arguments = argparse.Namespace(sets=["letters"], arms=["ours", "ours:fast", "timm"], seeds=[0, 1], version=None,
                                   ours={"fast": ["optim.lr=3e-3"]}, out=tmp_path, same_seconds=False)  # fmt: skip
    cells = bench_quality.cells_of(arguments, [])
    assert len(cells) == 6 and len({cell.version for cell in cells}) == 3
    path = tmp_path / "results.jsonl"
    append_row(path, row("ours", 0, 0.5, version=cells[0].version))
    path.write_text(path.read_text() + '{"set": "lett')  # the kill
    left = bench_quality.cells_of(arguments, read_rows(path))
    assert left == cells[1:]
    append_row(path, row("timm", 0, 0.5, version="of older code"))
    assert [found["arm"] for found in read_rows(path)] == ["ours", "timm"]
    assert bench_quality.cells_of(arguments, read_rows(path)) == cells[1:]


def test_words_of_an_arm_replace_those_of_the_task(tmp_path):
    task = bench_quality.TASKS["letters"]
    cell = bench_quality.Cell("letters", "ours:x", 1, "v", ("train.epochs=3", "optim.lr=3e-3"))
    words = bench_quality.our_overrides(task, cell, tmp_path)
    assert [word for word in words if word.startswith("train.epochs")] == ["train.epochs=3"]
    assert {"optim.lr=3e-3", "seed=1"} <= set(words)


def test_an_arm_with_our_seconds_trains_the_chosen_setting_that_long():
    rows = [row("ours", 0, 0.5, seconds=20.0), row("timm", 0, 0.5, seconds=8.0, chosen="(0.001, 0.75)")]
    cell = bench_quality.with_seconds_of_ours(bench_quality.Cell("letters", "timm", 0, "v"), rows)
    assert (cell.arm, cell.epochs) == ("timm@seconds", 10)
    assert bench_quality.settings_of("timm")[cell.setting] == (0.001, 0.75)
