"""Where images and labels come from: one builder for each word of `data.source`.

A builder reads `data.*` and returns `FoundImages`, of which `selection.split_up` makes three splits, by image names and
`data.split_seed` alone. Read `open_source` below, then `folders.py`, the plainest builder. A new source is a file here,
a line of `_BUILDERS` and a word in `config/data.py`.
"""

from collections.abc import Callable
from dataclasses import replace

from finetune.config import DataConf, SourceKind, member_of
from finetune.data.selection import split_up
from finetune.data.sources.digits import find_digits
from finetune.data.sources.folders import find_folder
from finetune.data.sources.hugging_face import find_hugging_face
from finetune.data.sources.shards import find_shards
from finetune.data.sources.tables import find_table
from finetune.data.sources.torchvision_sets import find_torchvision
from finetune.data.split import FoundImages, Source
from finetune.system.limits import CLASSES, image_limit

_BUILDERS: dict[SourceKind, Callable[[DataConf], FoundImages]] = {
    SourceKind.digits: find_digits,
    SourceKind.folder: find_folder,
    SourceKind.table: find_table,
    SourceKind.torchvision: find_torchvision,
    SourceKind.hf: find_hugging_face,
    SourceKind.webdataset: find_shards,
}


def open_source(conf: DataConf) -> Source:
    """Find images and labels, select among them, and split them. No image file is opened yet.

    Raises FileNotFoundError if `data.root` or `data.table` is missing; UserError if the data cannot be used or split.
    """
    found = _BUILDERS[member_of(SourceKind, conf.source, "data.source")](conf)
    found.store.max_pixels = image_limit(conf.max_image_mib).most // 3
    CLASSES.check(found.place, len(found.classes))
    if conf.max_image_mib != DataConf().max_image_mib:  # another limit makes other images unreadable
        found = replace(found, location=f"{found.location}:{conf.max_image_mib}")
    return split_up(found, conf)
