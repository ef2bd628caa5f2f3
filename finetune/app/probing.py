"""LP-FT's first half: fit the head on frozen features before anything learns (Kumar et al., arXiv:2202.10054)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from finetune.app.build import Run
from finetune.core.loop import Batch
from finetune.models.heads.probe import Probe, features_of, linear_probe, set_head
from finetune.system.errors import UserError


def fit_head(run: Run, train: Iterable[Batch], val: Iterable[Batch]) -> Probe:
    """Fit the classifier by regularised logistic regression, and put it in the model's head.

    Args:
        run: The run's model; its head changes in place.
        train: The training images in order and without augmentation.
        val: The validation images, which pick the penalty.

    Raises:
        ValueError: Images with several labels, or a model without exactly one linear classifier.
    """
    if run.source.is_multilabel:
        raise UserError("model.head=linear_probe is fitted to one label an image; use model.head=random for several")
    features, labels = _features(run, train)
    probe = linear_probe(features, labels, *_features(run, val), num_classes=len(run.source.classes))
    set_head(run.model, probe)
    return probe


def _features(run: Run, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """(images, features) and (images,) of a whole split, on the CPU."""
    run.model.eval()
    features, labels = [], []
    for images, targets, _ in batches:
        with run.autocast(), torch.no_grad():
            features.append(features_of(run.model, images).cpu())
        labels.append(targets.cpu())
    return torch.cat(features), torch.cat(labels)
