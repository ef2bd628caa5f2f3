"""A name for the content of a split: what caches are known by."""

from __future__ import annotations

import hashlib

from finetune.data.images.decode import ImageError
from finetune.data.split import Split


def content_digest(split: Split) -> bytes:
    """Changes when an image of the split does, or their order: path, size and time of each, or its bytes. 16 bytes."""
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
