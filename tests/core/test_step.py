"""`core/layers.py` and `core/loop.py` are the whole of a training step, and short enough to read at one go."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from tiny import tiny_batches, tiny_model
from tiny_runs import tiny_state

import finetune
from finetune.config import TrainConf
from finetune.core.loop import train_step

PACKAGE = Path(finetune.__file__).parent
STEP = ("core/layers.py", "core/loop.py")
# What a step is computed with, and not how: the loss and the metrics that a run has chosen.
CHOSEN = ("core/losses.py", "core/metrics/")


def test_every_function_of_a_step_is_declared_in_two_files() -> None:
    """A real step with clipping. The network's own forward functions stand in `tests/tiny.py`."""
    state, batches = tiny_state(tiny_model(batch_norm=True)), tiny_batches([8, 3])
    conf = TrainConf(accumulate=2, clip_grad=0.5)
    ran: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            ran.add(f"{path.relative_to(PACKAGE).as_posix()}: {frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        train_step(state, batches, conf)
    finally:
        sys.setprofile(None)
    assert state.step == 1
    assert {"core/loop.py: train_step", "core/layers.py: forward", "core/loop.py: judge"} <= ran
    assert {name for name in ran if not name.startswith((*STEP, *CHOSEN))} == set()


def test_a_step_is_at_most_300_lines() -> None:
    lines = [line for name in STEP for line in (PACKAGE / name).read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 300
