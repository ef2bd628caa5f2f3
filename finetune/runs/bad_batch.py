"""The batch of a step whose loss or gradient was not finite, stored in the run directory for `finetune replay`.

`bad_batch/step_N.pt` holds the tensors that the step learned from, `step_N.json` names images, epoch and rates. The
tensors are made again for this: a batch depends on (seed, epoch, position) alone, so no step keeps its batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.finite import StepRecord
from finetune.core.loop import Batch
from finetune.runs.checkpoint import check_state, load_tensors
from finetune.runs.weights import copied_to_host, write_whole
from finetune.system.files import write_json
from finetune.system.ours import COPIED, read_marker
from finetune.system.reading import DamagedError
from finetune.system.seals import damaged_if_unreadable, seal
from finetune.system.terminal import printable

FOLDER = "bad_batch"
MAX_STORED = 10  # so that a run whose every step fails does not fill the disk


def store(
    run_dir: Path, record: StepRecord, window: Sequence[Batch], *, names: Sequence[str], rates: dict[str, float]
) -> Path | None:
    """Write the micro-batches `window` of a step and return their file; None once MAX_STORED steps are stored.

    `names` are those of its images, in order; `rates` the learning rates of the parameter groups.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{record.step}.pt"
    if not path.exists() and len(_stored(folder)) >= MAX_STORED:
        return None
    parts = enumerate(("images", "targets", "ids"))
    content: dict[str, Any] = {part: [copied_to_host(batch[index]) for batch in window] for index, part in parts}
    content |= {"run": _id_of(run_dir), "step": record.step}  # else another run's file would pass for this one's

    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        seal(temporary)

    write_whole(path, write)
    facts = {"epoch": record.epoch + 1, "step": record.step, "first_micro_batch": record.batch}
    again = f"finetune replay {run_dir} --step {record.step}"
    write_json(path.with_suffix(".json"), {**facts, "images": list(names), "rates": rates, "replay": again})
    return path


def load(run_dir: Path, step: int | None) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """A step that `store` wrote, by default the first one; and (images, targets) of each of its micro-batches.

    Raises:
        FileNotFoundError: The step is not stored.
        DamagedError: The file cannot be read, or is not what was written.
    """
    steps = _stored(run_dir / FOLDER)
    if not steps:
        raise FileNotFoundError(f"{run_dir} has no stored batch: all of its steps were finite")
    step = steps[0] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{run_dir} has no batch of step {step}; stored steps: {', '.join(map(str, steps))}")
    path = run_dir / FOLDER / f"step_{step}.pt"
    check_state(path)
    content = load_tensors(path)
    with damaged_if_unreadable(path):
        origin = content.get("run"), content.get("step")
        if origin != (_id_of(run_dir), step):
            why = "it is not the batch that this run stored for this step, but of another run, step or version"
            raise DamagedError.because(path, why, f"put the run's own file back; {COPIED}")
        return step, list(zip(content["images"], content["targets"], strict=True))


def _id_of(run_dir: Path) -> str:
    """The id of a run, which a copy of its folder keeps."""
    marker = read_marker(run_dir)
    return "" if marker is None else marker.id


def _stored(folder: Path) -> list[int]:
    """The steps that are stored, in order; other files in the folder are somebody's."""
    found = (path.stem.partition("_")[2] for path in folder.glob("step_*.pt"))
    return sorted(int(digits) for digits in found if digits.isascii() and digits.isdigit())


def shown_names(names: Sequence[str], most: int = 8) -> str:
    """The first `most` names in one line, control characters escaped."""
    return ", ".join(map(printable, names[:most])) + (" ..." if len(names) > most else "")
