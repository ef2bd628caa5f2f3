"""Shared by all tests: one torch thread a process, no window for plots, and the switch that rewrites golden files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

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
