"""The batch of a step whose loss or gradient was not finite, stored in the run directory for `finetune replay`.

`bad_batch/step_N.pt` holds the tensors that the step learned from, `step_N.json` names images, epoch and rates. The
tensors are made again for this: a batch depends on (seed, epoch, position) alone, so no step keeps its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.finite import StepRecord
from finetune.core.loop import Batch
from finetune.runs.checkpoint import load_tensors
from finetune.runs.weights import copied_to_host
from finetune.system.files import write_atomic, write_json
from finetune.system.terminal import printable

FOLDER = "bad_batch"
MAX_STORED = 10  # so that a run whose every step fails does not fill the disk


def store(
    run_dir: Path, record: StepRecord, window: Sequence[Batch], *, names: Sequence[str], rates: dict[str, float]
) -> Path | None:
    """Write the micro-batches of a step and return their file; None once MAX_STORED steps are stored.

    Args:
        run_dir: The run directory.
        record: The step.
        window: Its micro-batches.
        names: Of its images, in order.
        rates: Each parameter group's learning rate.

    Raises:
        OSError: The files cannot be written.
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
        DamagedError: The file cannot be read.
    """
    if not path.exists():
        found = sorted(other.stem.partition("_")[2] for other in path.parent.glob("step_*.pt"))
        raise FileNotFoundError(f"{path} is not there; stored steps: {', '.join(found) or 'none'}")
    content = load_tensors(path)
    return list(zip(content["images"], content["targets"], strict=True))


def shown_names(names: Sequence[str], most: int = 8) -> str:
    """The first `most` names in one line, control characters escaped."""
    return ", ".join(map(printable, names[:most])) + (" ..." if len(names) > most else "")
