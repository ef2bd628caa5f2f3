"""A digest of the content of a split, which is part of the names of caches."""

from __future__ import annotations

import hashlib

from finetune.data.images.decode import ImageError
from finetune.data.split import Split


def content_digest(split: Split) -> bytes:
    """16 bytes that change when an image of the split changes, or their order.

    Of each image the path, size and time count; where the source has no such thing, its bytes.
    """
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    for row in split.rows.tolist():
        try:
            stamp = split.store.stamp(row)
            mark = stamp.encode("utf-8", "surrogateescape") if stamp else split.store.read(row)
        except ImageError:
            mark = b"unreadable"
        state.update(len(mark).to_bytes(8, "little"))
        state.update(mark)
    return state.digest()
