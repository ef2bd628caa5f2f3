"""The frozen layers of a model: they run once for each image and view, and their output, the activations, is cached.

May know `system`, `config`, `core` and `data`; not the whole configuration, nor a run's folder. Read `feed.py` first
(how a batch of activations reaches the training loop), then `planning.py` (where activations are cached).
"""

from finetune.prefix.cache import ActivationCache
from finetune.prefix.choice import SHARE
from finetune.prefix.feed import Feed
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.identity import prefix_digest, split_digest
from finetune.prefix.measuring import measure
from finetune.prefix.planning import CachePlanner, why_not_cacheable
from finetune.prefix.sweep_memory import sweep_memory

__all__ = [
    "SHARE",
    "ActivationCache",
    "CachePlanner",
    "Feed",
    "FrozenPrefix",
    "measure",
    "prefix_digest",
    "split_digest",
    "sweep_memory",
    "why_not_cacheable",
]
