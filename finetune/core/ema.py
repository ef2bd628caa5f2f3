"""An exponential moving average of the weights: a second model, often a better one, without any extra step.

After every optimizer step each average moves a little towards its weight: `average += (1 - decay) * (weight - average)`
(Polyak and Juditsky, 1992). Validation scores both, and the better of the two counts for the best epoch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError


class Ema:
    """Averages of the parameters that learn and of the running statistics of their BatchNorm modules.

    A frozen tensor equals its average and needs no copy. Averages are fp32, on the device of the weights.
    """

    def __init__(self, model: LayeredModel, decay: float, *, warmup: bool = True) -> None:
        """Start at the present weights. Freeze the model and move it to its device before.

        `decay` is in (0, 1): the average remembers about 1 / (1 - decay) steps. For `warmup` see `update`.
        """
        if not 0 < decay < 1:
            raise UserError(f"train.ema={decay}: must be greater than 0 and less than 1; 0.9998 is usual")
        self.decay = decay
        self.warmup = warmup
        self.before_change: Callable[[], None] = lambda: None  # a save that shares the averages' memory finishes here
        self._weights = _moving_tensors(model)
        self._averages = {name: tensor.detach().clone() for name, tensor in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int, *, skipped: Tensor | None = None) -> None:
        """Move the averages towards the weights after optimizer step `step`, from 1. Does not wait for the device.

        A step that changed no weight moves no average either: `skipped` is 1.0 then, else 0.0, a scalar on the device.

        With `warmup` the decay is min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it
        with `num_updates`: the average then forgets the untrained head within some steps, not 1 / (1 - decay).
        """
        self.before_change()
        weight = 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)
        averages, weights = list(self._averages.values()), list(self._weights.values())
        if skipped is None:
            torch._foreach_lerp_(averages, weights, weight)
        else:  # the host does not know yet whether the step was skipped; a share of 0 leaves every bit of an average
            share = weight * (1 - skipped)
            torch._foreach_lerp_(averages, weights, [share.expand_as(average) for average in averages])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the model computes with the averages; afterwards its weights are back, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.before_change()
        # Values change places and tensors do not: the optimizer and compiled graphs still refer to the right tensor.
        # Tensor by tensor, since a copy of all weights would cost the memory of a second model.
        for name, weight in self._weights.items():
            average = self._averages[name]
            value = weight.detach().clone()
            weight.copy_(average)
            average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averages from `state_dict`.

        Raises:
            UserError: They are averages of other parameters.
        """
        if state.keys() != self._averages.keys():
            names = ", ".join(sorted(state.keys() ^ self._averages.keys())[:3])
            raise UserError(f"the checkpoint averages other parameters than this run, such as {names}")
        for name, average in self._averages.items():
            average.copy_(state[name])


def _moving_tensors(model: LayeredModel) -> dict[str, Tensor]:
    """The tensors that training changes, by name: parameters that learn, and their layers' running statistics."""
    found: dict[str, Tensor] = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    for path, module in model.net.named_modules():
        if isinstance(module, _NormBase):
            for name, buffer in module.named_buffers(path, recurse=False):
                if buffer.is_floating_point() and model.layer_ids[name] >= model.num_frozen:
                    found[name] = buffer
    return found
