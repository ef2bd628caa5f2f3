"""`data=folder` where runs and checks write, too, and where links make many paths of a few folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.config import DataConf, SourceKind
from finetune.data.sources.folders import find_folder
from finetune.system.ours import MARKER, FolderKind, claim


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two classes of eight images each."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(8):
            pixels = np.random.default_rng([ord(name), number]).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(root: Path) -> list[str]:
    images = find_folder(DataConf(source=SourceKind.folder, root=str(root)))
    return [images.names[row] for row in range(len(images.names))]


def output(folder: Path, kind: FolderKind, *files: str) -> None:
    """A folder of ours with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, kind)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"of a run")


def test_a_run_may_start_in_the_folder_of_its_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=vit", "data=folder", "data.root=.", "data.workers=0", "augment=none"]
    assert main(["check", *words]) == 0
    for _ in range(2):
        assert main([*words, "train.epochs=1"]) == 0, capsys.readouterr().err
    runs = [path.parent for path in root.glob("outputs/*/*/result.json")]
    assert len(runs) == 2
    for run in runs:  # tests of this room draw no pictures
        shutil.copy(root / "a" / "0.png", run / "curves.png")
    assert main(["check", *words, "hydra.run.dir=a"]) == 0  # the sheet lies among the images of a class
    capsys.readouterr()
    assert main(["check", *words]) == 0
    assert "16 images checked: 16 decoded" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["classes", "splits"])
def test_output_is_no_class_and_its_pictures_are_no_images(root: Path, layout: str) -> None:
    if layout == "splits":
        for split in ("train", "val", "test"):
            for name in "ab":
                shutil.copytree(root / name, root / split / name)
        for name in "ab":
            shutil.rmtree(root / name)
    expected = found(root)
    inside = root / ("train/a" if layout == "splits" else "a")
    output(root, FolderKind.run, "lr.png", "checkpoints/last.pt", "bad_batch/step_3.pt")
    output(root / "outputs" / "2026-01-31" / "12-00-00", FolderKind.run, "lr.png", "curves.png", "checkpoints/last.pt")
    output(root / "outputs" / "sweeps" / "2026-01-31" / "12", FolderKind.sweep, "sweep.png", "jobs.jsonl")
    output(root / "outputs" / "sweeps" / "2026-01-31" / "12" / "0", FolderKind.run, "lr.png", "bad_batch/step_3.pt")
    (root / "outputs" / "README.md").write_text("mine")
    output(root / "my-check", FolderKind.check, "contact_sheet.png", "data.txt")
    output(root / "finetune-cache", FolderKind.cache, "pixels/entry.json")
    output(inside / "run", FolderKind.run, "lr.png", "confusion.png")
    output(inside, FolderKind.check, "contact_sheet.png")
    assert found(root) == expected


def test_images_of_a_person_count_also_in_a_folder_of_ours(root: Path) -> None:
    expected = found(root)
    output(root / "a", FolderKind.run, "lr.png", "checkpoints/last.pt")
    output(root / "c", FolderKind.run, "curves.png")
    for name in ("mine.png", "contact_sheet.png"):  # the second is no name of a run's
        shutil.copy(root / "b" / "0.png", root / "c" / name)
    shutil.copytree(root / "b", root / "d")
    shutil.copy(root / "b" / "0.png", root / "d" / "lr.png")  # nothing says that this folder is ours
    assert set(found(root)) - set(expected) == {
        *("c/mine.png", "c/contact_sheet.png", "d/lr.png"),
        *(f"d/{number}.png" for number in range(8)),
    }
    assert not (root / "d" / MARKER).exists()


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_do_not_multiply_folders(root: Path) -> None:
    """Thirty folders with two links each to the next one are 2^30 paths."""
    below = root.parent / "deep"
    below.mkdir()
    (below / "x.png").write_bytes((root / "a" / "0.png").read_bytes())
    for level in range(30):
        above = root.parent / f"level{level}"
        above.mkdir()
        for name in ("left", "right"):
            (above / name).symlink_to(below)
        below = above
    expected = found(root)
    (root / "a" / "links").symlink_to(below)
    (root / "a" / "self").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    assert [name for name in found(root) if not name.startswith("b/up")] == sorted(
        [*expected, f"a/links{'/left' * 30}/x.png"], key=lambda name: (name[0], name)
    )
