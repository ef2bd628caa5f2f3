"""Where images come from: each source is a builder that finds images and labels; the rest is the same for all.

The splits are cut class by class by ranking the hash of (split_seed, name of the image): the same on every machine,
whatever `seed` is, and an image that is added later moves hardly any other.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune.config import DataConf, SourceKind, member_of
from finetune.data.selection import split_up
from finetune.data.sources.digits import find_digits
from finetune.data.sources.folders import find_folder
from finetune.data.sources.hugging_face import find_hugging_face
from finetune.data.sources.shards import find_shards
from finetune.data.sources.tables import find_table
from finetune.data.sources.torchvision_sets import find_torchvision
from finetune.data.split import Found, Source, Split

__all__ = ["Source", "Split", "open_source"]


def open_source(conf: DataConf) -> Source:
    """Find the images, label, select and split them. No image file is opened yet.

    Raises:
        ValueError: A source that does not exist, or data that cannot be split.
        FileNotFoundError: `data.root` or `data.table` is missing.
    """
    return split_up(_BUILDERS[member_of(SourceKind, conf.source, "data.source")](conf), conf)


_BUILDERS: dict[SourceKind, Callable[[DataConf], Found]] = {
    SourceKind.digits: find_digits,
    SourceKind.folder: find_folder,
    SourceKind.table: find_table,
    SourceKind.torchvision: find_torchvision,
    SourceKind.hf: find_hugging_face,
    SourceKind.webdataset: find_shards,
}
