"""Laws of folders in which odd things lie: each is named, none hangs, none takes the machine's memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.checks.examine import examine
from finetune.data.checks.known_images import KnownImages
from finetune.data.images.decode import ImageError, read_header, read_image

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no such files")
# What is no file at all, and in which words it is named.
ODD = {
    "pipe.jpg": "a pipe or a device",
    "pipe_link.jpg": "a pipe or a device",
    "zeros.png": "a pipe or a device",  # a link to /dev/zero: it has no end
    "socket.jpg": "a pipe or a device",
    "self.png": "Too many levels",
    "one.png": "Too many levels",
    "two.png": "Too many levels",
    "huge.jpg": "data.max_image_mib raises the limit",
    "empty\n.jpg": "empty",
    "\x1b[31mred.jpg": "not an image",
    os.fsdecode(b"\xff\xfe.jpg"): "not an image",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
    a = tmp_path / "d" / "a"
    os.mkfifo(a / "pipe.jpg")
    for name, target in (("pipe_link.jpg", "pipe.jpg"), ("zeros.png", "/dev/zero"), ("self.png", "self.png")):
        (a / name).symlink_to(target)
    (a / "one.png").symlink_to("two.png")
    (a / "two.png").symlink_to("one.png")
    (a / "up").symlink_to("..")
    monkeypatch.chdir(a)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    with open(a / "huge.jpg", "wb") as file:
        file.truncate(2**32)
    (a / "empty\n.jpg").touch()
    for name in list(ODD)[-2:]:
        (a / name).write_text("no image")
    return tmp_path / "d"


def opened(folder: Path) -> Source:
    return open_source(DataConf(source=SourceKind.folder, root=str(folder)))


def test_each_is_named_and_nothing_else_is(tmp_path: Path, folder: Path) -> None:
    for _ in range(2):  # the second time from what is remembered
        report = examine(opened(folder), KnownImages(str(tmp_path / "cache"), str(folder)))
        found = {os.path.basename(bad.name): bad.reason for bad in report.unreadable}
        assert found.keys() == ODD.keys()
        for name, words in ODD.items():
            assert words in found[name] and str(folder) not in found[name], name


@pytest.mark.parametrize("name", list(ODD), ids=ascii)
def test_no_way_of_reading_hangs(folder: Path, name: str) -> None:
    path = str(folder / "a" / name)
    for read in (read_image, read_header):
        with pytest.raises(ImageError) as error:
            read(path)
        assert ODD[name] in error.value.reason or read is read_header


def test_a_run_stops_with_the_list_or_goes_without_them(tmp_path: Path, folder: Path) -> None:
    words = ["data=folder", f"data.root={folder}", "model=vit", "train.epochs=1", "data.batch_size=8"]
    words += [f"data.cache_dir={tmp_path / 'cache'}", "data.cache=disk", "data.workers=1"]

    def run(policy: str) -> tuple[int, str]:
        more = [f"data.on_error={policy}", f"hydra.run.dir={tmp_path / policy}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "finetune", *words, *more]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=240, check=False)
        return done.returncode, (done.stdout + done.stderr).decode("utf-8")

    code, text = run("stop")
    assert code == 1 and f"{len(ODD)} images cannot be read" in text and "\x1b[31m" not in text
    code, text = run("skip")
    assert code == 0 and f"left out: {len(ODD)} images" in text and "\x1b[31m" not in text
    assert len((tmp_path / "skip" / "skipped.txt").read_text().splitlines()) == len(ODD)


def test_damage_beside_the_pixels_is_no_news(tmp_path: Path) -> None:
    """Pillow warns of it without the name of the file; the pixels are whole."""
    tag = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\xff\xff\0\0"
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.jpg", exif=tag)
    code = "import sys; from finetune.data.images.decode import read_image; print(tuple(read_image(sys.argv[1]).shape))"
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 7, 9)\n" and done.stderr == ""
