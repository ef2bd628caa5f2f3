"""One small run, and a folder of images with odd files in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import go, small


@pytest.fixture(scope="session")
def striped_run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on the three classes of `stripes`."""
    folder = tmp_path_factory.mktemp("striped")
    go(small(stripes), folder)
    return folder


@pytest.fixture
def pictures(folder: Path) -> Path:
    """`in/` in the current folder: 30 images at two depths, two that cannot be read, and files that are no images."""
    random = np.random.default_rng(1)
    for number in range(30):
        path = folder / "in" / ("deep" if number % 3 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, size=(24, 40, 3), dtype=np.uint8)).save(path)
    (folder / "in" / "deep" / "bad.jpg").write_bytes(b"no image")
    (folder / "in" / "cut.png").write_bytes((folder / "in" / "0.png").read_bytes()[:99])
    (folder / "in" / "notes.txt").write_text("x")
    return folder / "in"


@pytest.fixture(scope="session")
def labelled_run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on images with several labels, and its table."""
    folder = tmp_path_factory.mktemp("labelled")
    lines = ["path,label"]
    for path in sorted(stripes.rglob("*.png")):
        lines.append(f"{path},{path.parent.name};{'even' if int(path.stem) % 2 else '=odd'}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines))
    conf = small(stripes)
    conf.data.source, conf.data.table, conf.data.root, conf.data.label_separator = "table", str(table), None, ";"
    go(conf, folder / "run")
    return folder / "run", table
