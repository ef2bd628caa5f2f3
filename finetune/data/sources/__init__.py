"""Where images and labels come from: one builder for each word of `data.source`.

A builder reads `data.*` and returns `FoundImages`, of which `selection.split_up` makes three splits, by image names and
`data.split_seed` alone. Read `open_source` below, then `folders.py`, the plainest builder. A new source is a file here,
a line of `_BUILDERS` and a word in `config/data.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune.config import DataConf, SourceKind, member_of
from finetune.config.data import group_pattern
from finetune.data.grouping import find_groups
from finetune.data.labels import name_warnings
from finetune.data.selection import split_up
from finetune.data.sources.digits import find_digits
from finetune.data.sources.folders import find_folder
from finetune.data.sources.hugging_face import find_hugging_face
from finetune.data.sources.shards import find_shards
from finetune.data.sources.tables import find_table
from finetune.data.sources.torchvision_sets import find_torchvision
from finetune.data.split import FoundImages, Groups, Source
from finetune.system.errors import UserError
from finetune.system.limits import CLASSES, image_limit
from finetune.system.terminal import counted

_BUILDERS: dict[SourceKind, Callable[[DataConf], FoundImages]] = {
    SourceKind.digits: find_digits,
    SourceKind.folder: find_folder,
    SourceKind.table: find_table,
    SourceKind.torchvision: find_torchvision,
    SourceKind.hf: find_hugging_face,
    SourceKind.webdataset: find_shards,
}


def open_source(conf: DataConf) -> Source:
    """Find images and labels, select among them, and split them.

    If splits are cut, images of equal size are compared, and equal ones stay together. No other image file is opened.

    Raises FileNotFoundError if `data.root` or `data.table` is missing; UserError if the data cannot be used or split.
    """
    found = _BUILDERS[member_of(SourceKind, conf.source, "data.source")](conf)
    found.store.max_pixels = image_limit(conf.max_image_mib).most // 3
    CLASSES.check(found.place, len(found.classes))
    if conf.max_image_mib != DataConf().max_image_mib:  # another limit makes other images unreadable
        found = replace(found, location=f"{found.location}:{conf.max_image_mib}")
    pattern = group_pattern(conf)
    if pattern is not None:
        matches = map(pattern.search, found.names)
        found = replace(found, groups=Groups.of(match and match[1] for match in matches))
    found = replace(found, warnings=(*found.warnings, *name_warnings(found.classes)))
    if found.groups is not None:
        found = replace(found, warnings=(*found.warnings, *_check_groups(found, found.groups, conf)))
    return split_up(found, conf, find_groups(found, conf))


def _check_groups(found: FoundImages, groups: Groups, conf: DataConf) -> list[str]:
    """A warning where some images have no group; raises UserError where none has one."""
    alone = int((groups.numbers < 0).sum())
    name = found.names[0] if isinstance(found.names, Sequence) else ""
    if not groups.names:
        raise UserError(f"{found.place}: data.group={conf.group} gives no image a group; a name here is {name}")
    if not alone:
        return []
    return [
        f"data.group={conf.group} gives {alone:,} of {counted(len(groups.numbers), 'image')} no group: each is alone"
    ]
