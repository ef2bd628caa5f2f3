"""Metrics: numbers for each image, exact sums over images, and the meters of validation and test."""

from finetune.core.metrics.meters import LabelMeter, Meter, MultilabelMeter, build_meter
from finetune.core.metrics.multilabel import average_precision
from finetune.core.metrics.ranks import among_top, top1, top5
from finetune.core.metrics.sums import Sums

__all__ = [
    "LabelMeter",
    "Meter",
    "MultilabelMeter",
    "Sums",
    "among_top",
    "average_precision",
    "build_meter",
    "top1",
    "top5",
]
