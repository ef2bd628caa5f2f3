"""Meters: validation and test put batches of logits in, and read metrics by name.

A meter sums on the device, and the sums move to the host once, in `results`. Only average precision stores all logits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from finetune.core.metrics.classes import Calibration, ClassCounts
from finetune.core.metrics.multilabel import BestK, F1Curve, average_precision
from finetune.core.metrics.ranks import top1, top5
from finetune.core.metrics.sums import Sums

# (logits (batch, classes), targets) -> loss of each image (batch,)
Losses = Callable[[Tensor, Tensor], Tensor]


class Meter(ABC):
    """Metrics of one pass over a split."""

    def __init__(self, losses: Losses, names: Collection[str] = ("top5",)) -> None:
        """Measure `losses`, top1, and the metrics `names`."""
        self._losses = losses
        self._names = frozenset(names)
        self.reset()

    def reset(self) -> None:
        """Forget all batches; `add` makes the sums anew on the device of its logits."""
        self._sums: Sums | None = None

    @abstractmethod
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take one batch: (batch, classes), and labels int64 (batch,) or 0 and 1 for every class (batch, classes)."""

    def running(self) -> dict[str, float]:
        """Means of `loss` and `top1` over the batches so far, for a progress bar. Waits for the device."""
        means = {} if self._sums is None else self._sums.means()
        return {name: means[name] for name in ("loss", "top1") if name in means}

    @abstractmethod
    def results(self) -> dict[str, float]:
        """Exact metrics over all images so far: `loss`, `top1` and those by name. Waits for the device."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """Metrics of each class in plain types: `classes`, and `confusion` or `threshold`. NaN becomes None."""

    def threshold(self) -> float | None:
        """The sigmoid from which on a label is predicted, best for all images so far; None: one label an image."""
        return None


class LabelMeter(Meter):
    """One label an image: `top5`, `balanced_accuracy`, `macro_f1` and `ece` beside `loss` and `top1`.

    `balanced_accuracy` is the mean accuracy of the classes that occur, `macro_f1` the mean F1 of the classes that occur
    or are predicted; scikit-learn leaves absent classes out in the same way. `ece`: see `classes.Calibration`.
    """

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take one batch: (batch, classes) and int64 (batch,)."""
        if self._sums is None:
            self._sums = Sums(logits.device)
            self._counts = ClassCounts(logits.shape[1], logits.device)
            self._calibration = Calibration(logits.device)
        right = top1(logits, targets)
        values = {"loss": self._losses(logits, targets), "top1": right}
        if "top5" in self._names:
            values["top5"] = top5(logits, targets)
        self._sums.add(**values)
        self._counts.add(logits.argmax(dim=1), targets)
        if "ece" in self._names:
            self._calibration.add(logits, right)

    def results(self) -> dict[str, float]:
        """See `Meter`."""
        assert self._sums is not None, "no batch was added"
        found = self._sums.means()
        by_class = self._counts.by_class()
        for name, column in (("balanced_accuracy", "accuracy"), ("macro_f1", "f1")):
            if name in self._names:
                found[name] = by_class[column].nanmean().item()
        if "ece" in self._names:
            found["ece"] = self._calibration.error().item()
        return found

    def details(self) -> dict[str, Any]:
        """`classes`: images, accuracy, precision and F1 of each; `confusion`: rows true, columns predicted, or None."""
        matrix = None if self._counts.matrix is None else self._counts.matrix.tolist()
        return {"classes": _rows(self._counts.present, self._counts.by_class()), "confusion": matrix}


class MultilabelMeter(Meter):
    """Any number of labels an image: `map`, `f1_micro`, `f1_macro`; `precision`, `recall`, `f1` `_at_3` and `_at_5`.

    `top1` is the share of images whose best scored class is one of their labels. `map` is the mean of
    `average_precision` over the classes that occur. Both F1 predict the labels whose sigmoid reaches one threshold for
    all classes: the given one, or else the one with the highest micro F1 on these images. Validation chooses it, which
    makes its F1 a little too good; the test must be given it.
    """

    def __init__(self, losses: Losses, names: Collection[str], *, threshold: float | None = None) -> None:
        """Measure `losses`, top1, and the metrics `names`; F1 at `threshold`."""
        super().__init__(losses, names)
        self._threshold = threshold

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take one batch: (batch, classes) and 0 or 1 for every class, (batch, classes)."""
        if self._sums is None:
            self._sums = Sums(logits.device)
            self._curve = F1Curve(logits.shape[1], logits.device)
            wanted = [k for k in (3, 5) if any(name.endswith(f"_at_{k}") for name in self._names)]
            self._best = [BestK(k, logits.device) for k in wanted]
        labels = targets > 0.5
        self._sums.add(loss=self._losses(logits, targets), top1=top1(logits, targets))
        self._curve.add(logits, labels)
        for best in self._best:
            best.add(logits, labels)
        if "map" in self._names:
            # Stored as they come, since bfloat16 takes half the memory; `average_precision` sorts any type.
            self._scores.append(logits.detach())
            self._labels.append(labels)

    def results(self) -> dict[str, float]:
        """See `Meter`."""
        assert self._sums is not None, "no batch was added"
        _, micro, by_class = self._curve.at_best(self._threshold)
        found = {"f1_micro": micro, "f1_macro": by_class.nanmean()}
        for best in self._best:
            found |= best.results()
        if "map" in self._names:
            found["map"] = self._average_precision().nanmean()
        return self._sums.means() | {name: value.item() for name, value in found.items() if name in self._names}

    def details(self) -> dict[str, Any]:
        """`threshold`; `classes`: images with each label, F1 at the threshold and average precision if measured."""
        threshold, _, by_class = self._curve.at_best(self._threshold)
        columns = {"f1": by_class}
        if "map" in self._names:
            columns["average_precision"] = self._average_precision()
        return {"classes": _rows(self._curve.present(), columns), "threshold": threshold}

    def threshold(self) -> float | None:
        """See `Meter`."""
        return self._curve.at_best(self._threshold)[0]

    def _average_precision(self) -> Tensor:
        return average_precision(torch.cat(self._scores), torch.cat(self._labels))


def build_meter(
    losses: Losses, names: Collection[str], *, is_multilabel: bool, threshold: float | None = None
) -> Meter:
    """The meter for one or several labels an image; only the F1 of several labels reads `threshold`."""
    return MultilabelMeter(losses, names, threshold=threshold) if is_multilabel else LabelMeter(losses, names)


def _rows(present: Tensor, columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One dictionary for each class, in plain types."""
    values = {"images": present.tolist(), **{name: column.tolist() for name, column in columns.items()}}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]
