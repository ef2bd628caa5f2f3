"""Metrics for several labels an image: average precision, F1 at a threshold, and the best k labels of each image."""

import torch
from torch import Tensor

from finetune.core.metrics.sums import sum_dtype

STEPS = 1000  # thresholds on the sigmoid in `F1Curve`: 0.000, 0.001, ... 0.999

# Logits that `average_precision` sorts at once; sorting 2**24 takes about 0.5 GiB.
SORTED_AT_ONCE = 2**24


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class. (n, classes), bool (n, classes) -> float (classes,).

    The sum over thresholds of (recall - recall before) times precision, as scikit-learn computes it: images of equal
    score share a threshold, and nothing is interpolated. NaN for a class that no image has (scikit-learn gives 0).
    """
    width = max(1, SORTED_AT_ONCE // max(1, len(scores)))
    parts = zip(torch.split(scores, width, dim=1), torch.split(labels, width, dim=1), strict=True)
    return torch.cat([_average_precision(*part) for part in parts])


def _average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    dtype = sum_dtype(scores.device)
    ordered, order = scores.T.sort(dim=1, descending=True)  # a row a class
    hits = labels.T.gather(1, order)
    found = hits.cumsum(dim=1)
    rank = torch.arange(1, ordered.shape[1] + 1, device=scores.device)
    # An image counts at the end of its run of equal scores: the smallest end at or after it.
    is_end = torch.ones_like(hits)
    is_end[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    ends = torch.where(is_end, rank, len(scores)).flip(1).cummin(dim=1).values.flip(1)
    precision = found.gather(1, ends - 1).to(dtype) / ends.to(dtype)
    return (precision * hits).sum(dim=1) / hits.sum(dim=1).to(dtype)


class F1Curve:
    """Predicted and correct labels of every class at each of 1,000 thresholds, counted batch by batch.

    A label is predicted where the sigmoid of its logit is at least the threshold.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        """Start from zero."""
        self._counts = torch.zeros(2, num_classes * STEPS, dtype=torch.int64, device=device)  # all scores, and labels'
        self._num_classes = num_classes

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: (batch, classes) and bool (batch, classes)."""
        steps = (torch.sigmoid(logits.float()).nan_to_num(0.0) * STEPS).long().clamp_(max=STEPS - 1)
        places = (steps + torch.arange(self._num_classes, device=logits.device) * STEPS).flatten()
        self._counts[0].index_add_(0, places, torch.ones_like(places))
        self._counts[1].index_add_(0, places, labels.flatten().long())

    def present(self) -> Tensor:
        """How many images have each label, int64 (classes,)."""
        return self._counts[1].view(self._num_classes, STEPS).sum(dim=1)

    def at_best(self, threshold: float | None = None) -> tuple[float, Tensor, Tensor]:
        """(threshold, micro F1 as a 0-D tensor, F1 of each class (classes,), NaN where none is present or predicted).

        `threshold` is a multiple of 0.001 in [0, 1). None takes the one with the highest micro F1 here, of equals the
        one nearest to 0.5.
        """
        predicted, hits = self._counts.view(2, self._num_classes, STEPS).flip(2).cumsum(dim=2).flip(2)
        labels = hits[:, :1]
        micro = _f1(hits.sum(dim=0), predicted.sum(dim=0), labels.sum(dim=0))
        if threshold is None:
            middle = (torch.arange(STEPS, device=micro.device) - STEPS // 2).abs()
            ties = torch.where(micro.nan_to_num(0.0) == micro.nan_to_num(0.0).max(), middle, STEPS)
            step = int(ties.argmin())
        else:
            step = round(threshold * STEPS)
        return step / STEPS, micro[step], _f1(hits, predicted, labels)[:, step]


def _f1(hits: Tensor, predicted: Tensor, labels: Tensor) -> Tensor:
    dtype = sum_dtype(hits.device)
    return 2 * hits.to(dtype) / (predicted + labels).to(dtype)


class BestK:
    """Precision, recall and F1 where the `k` labels with the highest logits are predicted, over all images together.

    As zero-shot tagging reports it (He et al., arXiv:2207.01887). With fewer than `k` classes all are predicted.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        """Start from zero."""
        self.k = k
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # hits, predicted, labels

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: (batch, classes) and bool (batch, classes). Of equal scores the first classes count."""
        # Stable, so that ties fall the same way on every device; `topk` leaves them open.
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        hits = labels.gather(1, best).sum()
        self._counts += torch.stack([hits, torch.full_like(hits, best.numel()), labels.sum()])

    def results(self) -> dict[str, Tensor]:
        """`precision_at_k`, `recall_at_k` and `f1_at_k`, 0-D tensors; recall is NaN where no image has a label."""
        hits, predicted, labels = self._counts.to(sum_dtype(self._counts.device))
        names = ("precision", "recall", "f1")
        values = (hits / predicted, hits / labels, 2 * hits / (predicted + labels))
        return {f"{name}_at_{self.k}": value for name, value in zip(names, values, strict=True)}
