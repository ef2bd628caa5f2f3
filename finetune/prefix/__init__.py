"""The frozen layers of a model: run once an image and view, and their output kept where it pays."""

from finetune.prefix.choice import SHARE, Need, choose, is_roomy, measure, why_not_in_training
from finetune.prefix.feed import Feed, Keep
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.identity import prefix_digest, split_digest

__all__ = [
    "SHARE",
    "Feed",
    "FrozenPrefix",
    "Keep",
    "Need",
    "choose",
    "is_roomy",
    "measure",
    "prefix_digest",
    "split_digest",
    "why_not_in_training",
]
