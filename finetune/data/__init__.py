"""Images and labels: sources, the square a model sees, and the batches of an epoch."""

from finetune.data.images import ImageError, natural_key, read_image
from finetune.data.loaders import Batch, Loader
from finetune.data.sources import Source, Split, open_source
from finetune.data.start import SkippedList, check_at_start

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
