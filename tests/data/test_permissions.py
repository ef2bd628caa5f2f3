"""Laws of files and folders that a user may not read: one line names them and says why; files follow `data.on_error`.

Root may read everything, so the commands run in a forked child that gives up root's capabilities. It still owns the
files, and `chmod` counts again. A forked child has torch already; a new Python would import it anew for each test.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune.app.run
import finetune.data.checks.summary  # noqa: F401  (with torch, for the forked children)
from finetune.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are those of Linux")
CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of linux/capability.h: two words for each of three sets


def without_capabilities(work: Callable[[], int], output: Path) -> int:
    """The exit code of `work()` in a forked child without capabilities; `output` gets what it prints."""

    def child() -> None:
        header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, sets) == 0
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = work()
        sys.stdout.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / "d" / name / "deep").mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
        Image.fromarray(pixels[::-1]).save(tmp_path / "d" / name / "deep" / "8.png")
    return tmp_path / "d"


def start(tmp_path: Path, *words: str, command: str = "train") -> tuple[int, list[str]]:
    """(exit code, lines that speak of an error) of a command without the right to pass by `chmod`."""
    words = (command, *words, f"data.cache_dir={tmp_path / 'cache'}")
    if command == "train":
        words += ("model=vit", "train.epochs=1", "data.batch_size=8", "data.workers=0", f"hydra.run.dir={tmp_path}/run")
    code = without_capabilities(lambda: main(words), tmp_path / "output.txt")
    text = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "Traceback" not in text, text
    return code, [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("source", ["folder", "table"])
def test_a_file_follows_the_policy(tmp_path: Path, folder: Path, source: str) -> None:
    (folder / "a" / "3.png").chmod(0)
    words = ["data=folder", f"data.root={folder}"]
    if source == "table":
        rows = [f"{path.relative_to(tmp_path)},{path.parts[len(folder.parts)]}" for path in folder.rglob("*.png")]
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *sorted(rows)]))
        words = ["data=table", f"data.table={tmp_path}/t.csv"]
    code, (line,) = start(tmp_path, *words)
    assert code == 1 and "1 image cannot be read" in line and f"{folder}/a/3.png (Permission denied" in line
    shutil.rmtree(tmp_path / "run")
    code, lines = start(tmp_path, *words, "data.on_error=skip")
    assert code == 0 and not lines
    (skipped,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert f"{folder}/a/3.png" in skipped and "Permission denied" in skipped
    (folder / "a" / "3.png").chmod(0o644)  # what was remembered of it does not outlive the chmod
    shutil.rmtree(tmp_path / "run")
    assert start(tmp_path, *words)[0] == 0


CHECK, RUN = ("check", "stop"), ("train", "skip")  # a folder is no file, so it does not follow the policy


@pytest.mark.parametrize(
    ("command_and_policy", "place", "mode", "named", "reason"),
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
    tmp_path: Path, folder: Path, command_and_policy: tuple[str, str], place: str, mode: int, named: str, reason: str
) -> None:
    command, policy = command_and_policy
    above = tmp_path / "above"
    above.mkdir()
    folder = folder.rename(above / "d")
    (folder / place).chmod(mode)
    code, (line,) = start(tmp_path, "data=folder", f"data.root={folder}", f"data.on_error={policy}", command=command)
    (above if place == ".." else folder / place).chmod(0o755)  # so that pytest can remove it
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
    (tmp_path / "cache").chmod(0o755)  # so that pytest can remove it
    assert code == 1
    assert line.startswith(f"error: cannot use {tmp_path / 'cache'}/") and "data.cache_dir" in line, line
    assert without == (0, [])


def test_a_yaml_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nseed: 1\n")
    path.chmod(0)
    assert without_capabilities(lambda: main(["--cfg", "job", "experiment=mine"]), tmp_path / "said") == 1
    assert (tmp_path / "said").read_text() == ("error: conf/experiment/mine.yaml: cannot be read: Permission denied\n")
