"""How a step is named whose loss or gradient is NaN or infinite, and the error that ends a run after such steps.

`FiniteGuard` in `loop.py` finds these steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """A training step and the images that it learns from.

    Attributes:
        epoch: Epoch of the step, from 0.
        step: Number of the optimizer step over the whole run, from 1.
        batch: Micro-batches of the epoch before this step.
        ids: Numbers of the step's training images, int64 (images,), in host memory.
    """

    epoch: int
    step: int
    batch: int
    ids: Tensor


class NotFiniteError(FloatingPointError):
    """The loss or the gradient norm was NaN or infinite; the weights are those from before that step.

    Attributes:
        record: The step that ended the run.
        limit: How many such steps `train.max_nonfinite` allows.
    """

    def __init__(self, record: StepRecord, limit: int) -> None:
        """Name the step, and how many steps like it were skipped before."""
        many = f", after {limit} such steps that train.max_nonfinite={limit} let pass" if limit else ""
        super().__init__(
            f"the loss or the gradient norm was not finite in epoch {record.epoch + 1}, step {record.step}{many}"
        )
        self.record = record
        self.limit = limit
