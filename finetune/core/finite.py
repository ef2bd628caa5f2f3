"""A step whose loss or gradient is NaN or infinite changes nothing: judged on the device, looked at now and then.

Asking the device after every step whether all was well would make it wait. So the answer stays there, as a mask that
fused optimizers' kernels read, and the host reads the answers of many steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer


@dataclass(frozen=True)
class Seen:
    """A training step and what it was to learn from.

    Attributes:
        epoch: From 0.
        step: The optimizer step, from 1, over the whole run.
        batch: Micro-batches of the epoch ahead of it.
        ids: Numbers of its training images, int64 (images,), on the host.
    """

    epoch: int
    step: int
    batch: int
    ids: Tensor


class NotFiniteError(FloatingPointError):
    """A loss or gradient norm was NaN or infinite; the weights are those before that step.

    Attributes:
        seen: The step that ended the run.
        limit: How many bad steps were to be skipped.
    """

    def __init__(self, seen: Seen, limit: int) -> None:
        """Name the step; `limit` is how many bad ones were to be skipped."""
        many = f", after {limit} such steps that train.max_nonfinite={limit} let pass" if limit else ""
        super().__init__(
            f"the loss or the gradient norm was not finite in epoch {seen.epoch + 1}, step {seen.step}{many}"
        )
        self.seen = seen
        self.limit = limit

    @property
    def step(self) -> int:
        """The optimizer step, from 1, over the whole run."""
        return self.seen.step

    @property
    def ids(self) -> list[int]:
        """Numbers of the training images that the step would have learned from."""
        return [int(index) for index in self.seen.ids]


def optimizer_reads_mask(optimizer: Optimizer) -> bool:
    """Whether its kernels skip a step by the flag `found_inf`, as torch's GradScaler asks it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class FiniteGuard:
    """Keeps steps that are not finite from changing anything.

    Attributes:
        limit: So many bad steps are skipped; the next one ends the run, and masks every step after it.
        mask: On the device, float32 (): 1.0 where the optimizer must leave weights and moments alone.
        total: Bad steps that the host knows of, over the whole run.
        found: Of those, the ones not yet taken by `take`.
    """

    def __init__(self, model: nn.Module, device: torch.device, limit: int = 0) -> None:
        """Guard `model`, which is on `device`."""
        self.limit = limit
        self.total = 0
        self.found: list[Seen] = []
        self.mask = torch.zeros((), device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._recent: list[tuple[Seen, Tensor]] = []
        # A forward pass over a NaN ruins BatchNorm's running statistics, update or not.
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._statistics = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Before a step's forward pass."""
        self._kept = [buffer.clone() for buffer in self._statistics]

    def judge(self, is_finite: Tensor, seen: Seen) -> None:
        """After a step's backward pass and before its update; no wait for the device.

        Args:
            is_finite: Truth value () on the device.
            seen: The step.
        """
        is_bad = ~is_finite
        self._count += is_bad
        self.mask.copy_(is_bad | (self._count > self.limit))
        for buffer, kept in zip(self._statistics, self._kept, strict=True):
            buffer.copy_(torch.where(self.mask > 0, kept, buffer))
        self._recent.append((seen, is_bad))

    def step(self, optimizer: Optimizer) -> None:
        """The update, after `judge`; where the mask is set, weights, moments and step counts keep every bit.

        torch's fused kernels read the mask on the device. No other optimizer does, so with those the host reads it,
        which waits for the device once a step; on a CPU that costs nothing.
        """
        if optimizer_reads_mask(optimizer):
            optimizer.found_inf = self.mask  # type: ignore[attr-defined]
        elif self.mask.item():
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone, by every optimizer
        optimizer.step()

    def look(self) -> None:
        """Read what the device knows. Waits for it.

        Raises:
            NotFiniteError: More steps were bad than `limit`; names the first beyond it.
        """
        if not self._recent:
            return
        flags = torch.stack([flag for _, flag in self._recent]).tolist()
        bad = [seen for (seen, _), flag in zip(self._recent, flags, strict=True) if flag]
        self._recent.clear()
        first_beyond = self.limit - self.total
        self.total += len(bad)
        self.found += bad
        if self.total > self.limit:
            raise NotFiniteError(bad[first_beyond], self.limit)

    def take(self) -> Sequence[Seen]:
        """The bad steps found since the last call."""
        found, self.found = self.found, []
        return found

    def state_dict(self) -> dict[str, int]:
        """The number of bad steps, for a checkpoint; call `look` first."""
        assert not self._recent, "a step that nobody has looked at yet"
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up where `state_dict` left off."""
        self.total = state["total"]
        self._count.fill_(self.total)
