"""A step whose loss or gradient is NaN or infinite, and the error after too many; `loop.FiniteGuard` finds them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """A training step and the images that it learns from."""

    epoch: int  # from 0
    step: int  # number of the optimizer step over the whole run, from 1
    batch: int  # micro-batches of the epoch before this step
    ids: Tensor  # numbers of the step's training images, int64 (images,), in host memory


class NotFiniteError(FloatingPointError):
    """The loss or gradient norm of `record` was NaN or infinite; the weights are those from before that step."""

    def __init__(self, record: StepRecord, limit: int) -> None:
        """Name the step; `limit` (`train.max_nonfinite`) steps like it were skipped before."""
        many = f", after {limit} such steps that train.max_nonfinite={limit} let pass" if limit else ""
        super().__init__(
            f"the loss or the gradient norm was not finite in epoch {record.epoch + 1}, step {record.step}{many}"
        )
        self.record = record
        self.limit = limit
