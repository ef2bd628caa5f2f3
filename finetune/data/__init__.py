"""Images and labels: where they come from, how they are split, and the batches of an epoch.

The room knows its own section of the settings, and neither models nor runs. Read `split.py` first: a `Source` is what
every part of this room makes or uses. From the bottom to the top: `streams` (random numbers), `images` (decode, resize,
crop, mix), `split`, `cutting`, `selection` and `caches`, `loading` (workers and batches), `checks`, `grouping` (what
stays together), `sources`.
"""

from finetune.data.checks.start import SkippedList, check_at_start
from finetune.data.images.decode import ImageError
from finetune.data.loading.loader import Loader
from finetune.data.sources import open_source
from finetune.data.split import Source

__all__ = ["ImageError", "Loader", "SkippedList", "Source", "check_at_start", "open_source"]
