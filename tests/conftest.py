"""Shared by all tests: one torch thread a process, no window for plots, and the switch that rewrites golden files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before anything imports torch: two test processes with two threads each spin and starve on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# What runs remember between starts is the person's own; tests have theirs, gone with the process.
_cache = tempfile.TemporaryDirectory(prefix="finetune-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*, then read the difference")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 small images each: stripes across, down, and none."""
    root = tmp_path_factory.mktemp("stripes")
    random = np.random.default_rng(0)
    for name, pattern in {"across": (1, 4), "down": (4, 1), "flat": (1, 1)}.items():
        (root / name).mkdir()
        for index in range(20):
            pixels = np.kron(
                random.integers(0, 2, size=(32 // pattern[0] // 4, 32 // pattern[1] // 4)),
                np.ones((pattern[0] * 4, pattern[1] * 4)),
            )
            noisy = np.clip(pixels * 200 + random.normal(20, 15, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((32, 32)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in these rooms' tests draw no pictures, which take a third of a small run; tests/app looks at them."""
    if request.path.parent.name in ("core", "data", "prefix", "runs"):
        monkeypatch.setattr("finetune.report.run_figures.plot_rates", lambda run_dir: None)
        monkeypatch.setattr("finetune.report.run_figures.plot_curves", lambda run_dir: None)
