"""Metrics: numbers for each image, exact sums over images, and the meters of validation and test."""

from finetune.core.metrics.meters import LabelMeter as LabelMeter
from finetune.core.metrics.meters import Meter as Meter
from finetune.core.metrics.meters import MultilabelMeter as MultilabelMeter
from finetune.core.metrics.meters import build_meter as build_meter
from finetune.core.metrics.multilabel import average_precision as average_precision
from finetune.core.metrics.ranks import top1 as top1
from finetune.core.metrics.ranks import top5 as top5
from finetune.core.metrics.sums import Sums as Sums
