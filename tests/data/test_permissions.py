"""Laws of what may not be read: a run names it and says why in one line, and files follow `data.on_error`.

Root reads everything, so a child of root gives up its capabilities: it owns the files, and `chmod` counts again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BARE = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.name == "posix" and os.geteuid() == 0 else []


def is_effective() -> bool:
    """Whether a file of mode 000 keeps such a process out."""
    if os.name != "posix" or (BARE and shutil.which(BARE[0]) is None):
        return False
    code = "import os,tempfile; f=tempfile.NamedTemporaryFile(); os.chmod(f.name,0); open(f.name)"
    done = subprocess.run([*BARE, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return "PermissionError" in done.stderr


pytestmark = pytest.mark.skipif(not is_effective(), reason="nothing here takes the right to read from a process")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / "d" / name / "deep").mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
        Image.fromarray(pixels[::-1]).save(tmp_path / "d" / name / "deep" / "8.png")
    return tmp_path / "d"


def start(tmp_path: Path, *words: str, module: tuple[str, ...] = ("finetune",)) -> tuple[int, list[str]]:
    """(exit code, lines that speak of an error) of a command without the right to pass by `chmod`."""
    words = (*words, f"data.cache_dir={tmp_path / 'cache'}")
    if module == ("finetune",):
        words += ("model=vit", "train.epochs=1", "data.batch_size=8", "data.workers=0", f"hydra.run.dir={tmp_path}/run")
    command = [*BARE, sys.executable, "-m", *module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    return done.returncode, [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("source", ["folder", "table"])
def test_a_file_follows_the_policy(tmp_path: Path, folder: Path, source: str) -> None:
    (folder / "a" / "3.png").chmod(0)
    words = ["data=folder", f"data.root={folder}"]
    if source == "table":
        rows = [f"{path.relative_to(tmp_path)},{path.parts[len(folder.parts)]}" for path in folder.rglob("*.png")]
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *sorted(rows)]))
        words = ["data=table", f"data.table={tmp_path}/t.csv"]
    code, (line,) = start(tmp_path, *words)
    assert code == 1 and "1 images cannot be read" in line and f"{folder}/a/3.png (Permission denied" in line
    shutil.rmtree(tmp_path / "run")
    code, lines = start(tmp_path, *words, "data.on_error=skip")
    assert code == 0 and not lines
    (skipped,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert f"{folder}/a/3.png" in skipped and "Permission denied" in skipped
    (folder / "a" / "3.png").chmod(0o644)  # what was remembered of it does not outlive the chmod
    shutil.rmtree(tmp_path / "run")
    assert start(tmp_path, *words)[0] == 0


CHECK, RUN = (("finetune", "check"), "stop"), (("finetune",), "skip")  # a folder is no file: the policy is none for it


@pytest.mark.parametrize(
    ("command", "place", "mode", "named", "reason"),
    [
        (RUN, "a", 0, "a", "listed"),
        (CHECK, "a", 0, "a", "listed"),
        (CHECK, "a/deep", 0, "a/deep", "listed"),
        (CHECK, "a", 0o111, "a", "listed"),
        (CHECK, "a", 0o444, "a/deep", "reached"),  # its names can be listed, and nothing in it can be looked at
        (RUN, "", 0, "", "listed"),
        (CHECK, "", 0o444, "a", "reached"),
        (CHECK, "..", 0o600, "", "reached"),  # whether the root is there cannot be told
    ],
)
def test_a_folder_ends_the_run_with_one_line(
    tmp_path: Path, folder: Path, command: tuple[str, str], place: str, mode: int, named: str, reason: str
) -> None:
    module, policy = command
    above = tmp_path / "above"
    above.mkdir()
    folder = folder.rename(above / "d")
    (folder / place).chmod(mode)
    code, (line,) = start(tmp_path, "data=folder", f"data.root={folder}", f"data.on_error={policy}", module=module)
    (above if place == ".." else folder / place).chmod(0o755)  # for who clears up
    assert code == 1
    assert line.startswith(f"error: {folder / named}: may not be {reason} (permission denied)"), line


@pytest.mark.parametrize("place", ["t/train/1.tar", "t/val", "t"])
def test_shards(tmp_path: Path, folder: Path, place: str) -> None:
    """A split's folder that may not be listed is no missing split, which would be cut from train instead."""
    for name, images in {"train/0": range(3), "train/1": range(3, 6), "val/0": range(6, 8)}.items():
        path = tmp_path / "t" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for i in images:
                for kind in "ab":
                    (tmp_path / "label").write_text(kind)
                    tar.add(folder / kind / f"{i}.png", f"{kind}{i}.png")
                    tar.add(tmp_path / "label", f"{kind}{i}.cls")
    words = ["data=webdataset", f"data.root={tmp_path / 't'}"]
    (tmp_path / place).chmod(0)
    code, (line,) = start(tmp_path, *words)
    (tmp_path / place).chmod(0o755)
    what = "read" if place.endswith("tar") else "listed"
    assert code == 1 and f"{tmp_path / place} may not be {what} (permission denied)" in line, line


@pytest.mark.parametrize(
    ("cache", "mode"),
    [("data.cache=disk", 0o500), ("data.cache=disk", 0), ("prefix.cache=disk", 0o500), ("prefix.cache=disk", 0)],
)
def test_a_cache_that_may_not_be_written_ends_the_run_only_where_it_was_asked_for(
    tmp_path: Path, folder: Path, cache: str, mode: int
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    words = ["data=folder", f"data.root={folder}", "augment=none", "optim.fix_layer=2"]
    code, (line,) = start(tmp_path, *words, cache)
    shutil.rmtree(tmp_path / "run")
    without = start(tmp_path, *words)
    (tmp_path / "cache").chmod(0o755)  # for who clears up
    assert code == 1
    assert line.startswith(f"error: cannot use {tmp_path / 'cache'}/") and "data.cache_dir" in line, line
    assert without == (0, [])
