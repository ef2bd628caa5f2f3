"""The batch of a step that was not finite, put into the run directory, so that what happened can be seen again.

`bad_batch/step_N.pt` holds the very tensors that the step saw, `step_N.json` says what they are. They are made anew:
a batch depends on (seed, epoch, position) alone, so nothing has to be held back for the case that it goes wrong.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.finite import StepRecord
from finetune.core.loop import Batch
from finetune.runs.weights import DamagedError, copied_to_host
from finetune.system.files import write_atomic, write_json
from finetune.system.terminal import printable

FOLDER = "bad_batch"
# Batches stored of one run: a run that goes wrong at every step must not fill the disk.
MAX_STORED = 10


def store(
    run_dir: Path, record: StepRecord, window: Sequence[Batch], *, names: Sequence[str], rates: dict[str, float]
) -> Path | None:
    """Write the micro-batches of a step; None where enough are stored already.

    Args:
        run_dir: The run's.
        record: The step.
        window: Its micro-batches.
        names: Of its images, in order.
        rates: Each parameter group's learning rate.

    Raises:
        OSError: It could not be written.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{record.step}.pt"
    if not path.exists() and len(list(folder.glob("step_*.pt"))) >= MAX_STORED:
        return None
    content = {
        "images": [copied_to_host(images) for images, _, _ in window],
        "targets": [copied_to_host(targets) for _, targets, _ in window],
        "ids": [copied_to_host(ids) for _, _, ids in window],
    }
    write_atomic(path, lambda temporary: torch.save(content, temporary))
    facts = {
        "epoch": record.epoch + 1,
        "step": record.step,
        "first_micro_batch": record.batch,
        "images": list(names),
        "rates": rates,
        "replay": f"finetune replay {run_dir} --step {record.step}",
    }
    write_json(path.with_suffix(".json"), facts)
    return path


def load(path: Path) -> list[tuple[Tensor, Tensor]]:
    """(images, targets) of each micro-batch that `store` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It cannot be read.
    """
    if not path.exists():
        found = sorted(other.stem.partition("_")[2] for other in path.parent.glob("step_*.pt"))
        raise FileNotFoundError(f"{path} is not there; stored steps: {', '.join(found) or 'none'}")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return list(zip(content["images"], content["targets"], strict=True))


def shown_names(names: Sequence[str], most: int = 8) -> str:
    """Names in one line, control characters escaped."""
    return ", ".join(map(printable, names[:most])) + (" ..." if len(names) > most else "")
