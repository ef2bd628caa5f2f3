"""Images and labels: sources, the square a model sees, and the batches of an epoch."""

from finetune.data.checks.start import SkippedList, check_at_start
from finetune.data.images.decode import ImageError, natural_key, read_image
from finetune.data.loading.loader import Batch, Loader
from finetune.data.sources.opening import Source, Split, open_source

__all__ = [
    "Batch",
    "ImageError",
    "Loader",
    "SkippedList",
    "Source",
    "Split",
    "check_at_start",
    "natural_key",
    "open_source",
    "read_image",
]
