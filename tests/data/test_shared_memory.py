"""Loader processes without the memory that they share, or ended by the system: one line, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import DataConf, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import Loader, open_source
from finetune.data.loading import loader as loader_module
from finetune.data.loading import workers
from finetune.system.errors import UserError
from finetune.system.limits import LimitError

pytestmark = [
    pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this memory is a folder on Linux alone"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture
def split(tmp_path: Path) -> object:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng([ord(name), i]).integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return open_source(DataConf(source=SourceKind.folder, root=str(tmp_path))).splits["train"]


def build(split: object, count: str = "1") -> Loader:
    conf = DataConf(batch_size=2, workers=count)
    return Loader(
        split,  # type: ignore[arg-type]
        Preprocess(8, (0.5,) * 3, (0.5,) * 3),
        conf=conf,
        augment=None,
        seed=0,
        device=torch.device("cpu"),
    )


def full(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_batch_that_finds_no_room_is_one_line(split: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the process that is forked next, too
    loader = build(split)
    with pytest.raises(LimitError, match=r"data\.workers: no room for 384 bytes .*data\.workers=0 needs none"):
        list(loader.epoch(0))
    loader.close()
    assert len(list(build(split, "0").epoch(0))) == len(loader)


def test_a_process_that_the_system_ends_is_one_line(split: object) -> None:
    loader = build(split)
    batches = loader.epoch(0)
    next(batches)
    for worker in loader._batches._workers:  # type: ignore[attr-defined]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with pytest.raises(UserError, match=r"a loader process was ended from outside.*lower data.workers"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("place", ["/nowhere", "/dev/shm"])
def test_no_such_memory_is_known_before_the_processes_start(
    split: object, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SHARED", place)
    if place == "/dev/shm":
        monkeypatch.setattr(workers, "BATCHES", 2**60)
    why = "cannot be used" if place == "/nowhere" else "1 loader process needs .* are free in /dev"
    with pytest.raises(LimitError, match=rf"data\.workers=1: .*{why}.*; data\.workers=0 needs none"):
        list(build(split).epoch(0))
    monkeypatch.setattr(loader_module, "pick_workers", lambda cost_s, device: 1)
    expected = [ids.tolist() for _, _, ids in build(split, "0").epoch(0)]
    assert [ids.tolist() for _, _, ids in build(split, "auto").epoch(0)] == expected
    assert len([line for line in caplog.messages if "images are loaded without such processes" in line]) == 1
