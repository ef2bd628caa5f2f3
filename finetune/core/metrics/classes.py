"""Accuracy, precision and F1 of each class from counts, and calibration from sums over bins of confidence.

Batches are added one by one, and the memory does not grow with the number of images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.core.metrics.sums import sum_dtype

ECE_BINS = 15

# With more classes there is no confusion matrix, which would take more than 32 MiB.
MATRIX_CLASSES = 2048


class ClassCounts:
    """How often each class occurs, is predicted, and is predicted correctly; counts are int64.

    `present`, `predicted` and `right` count images by class, (classes,): those of the class, those with this
    prediction, and those with both. `matrix` counts images of class [row] with prediction [column], (classes, classes);
    None with too many classes.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        """Start from zero."""
        self.present, self.predicted, self.right = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        self.matrix: Tensor | None = None
        if num_classes <= MATRIX_CLASSES:
            self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Count one batch; class indices, int64 (batch,) each."""
        ones = torch.ones_like(labels)
        self.present.index_add_(0, labels, ones)
        self.predicted.index_add_(0, predictions, ones)
        self.right.index_add_(0, labels, (predictions == labels).to(ones.dtype))
        if self.matrix is not None:
            self.matrix.view(-1).index_add_(0, labels * len(self.matrix) + predictions, ones)

    def by_class(self) -> dict[str, Tensor]:
        """`accuracy`, `precision` and `f1` of each class, float (classes,).

        NaN for a class without images, without predictions, or without both.
        """
        present, predicted, right = (n.to(sum_dtype(n.device)) for n in (self.present, self.predicted, self.right))
        return {"accuracy": right / present, "precision": right / predicted, "f1": 2 * right / (present + predicted)}


class Calibration:
    """Sums for the expected calibration error over bins of equal width (Guo et al., arXiv:1706.04599, equation 5).

    An image falls into the bin of its confidence, the highest softmax probability: bin i holds (i/15, (i + 1)/15]. The
    error is the mean over images of |accuracy - mean confidence| of their bin. It is a sum over fixed bins, so it is
    exact however the images were batched; as an estimate of calibration it is biased upwards for few images.
    """

    def __init__(self, device: torch.device) -> None:
        """Start from zero."""
        self._edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=sum_dtype(device), device=device)[1:-1]
        self._sums = torch.zeros(3, ECE_BINS, dtype=sum_dtype(device), device=device)  # images, confidences, hits

    def add(self, logits: Tensor, right: Tensor) -> None:
        """Add one batch: (batch, classes), and 1.0 where the highest is right, (batch,)."""
        confidence = logits.float().softmax(dim=1).amax(dim=1).to(self._sums.dtype)
        bins = F.one_hot(torch.bucketize(confidence.nan_to_num(0.0), self._edges), ECE_BINS)
        rows = torch.stack([torch.ones_like(confidence), confidence, right.to(self._sums.dtype)])
        # A matrix product, since `index_add_` sums floats in a random order on a GPU. A NaN makes the whole error NaN.
        self._sums += rows @ bins.to(self._sums.dtype)

    def error(self) -> Tensor:
        """The expected calibration error, in [0, 1]; a 0-D tensor."""
        images, confidences, hits = self._sums
        error: Tensor = (hits - confidences).abs().sum() / images.sum()
        return error
