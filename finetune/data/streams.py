"""Where chance comes from: pure functions of (seed, epoch, sample ...), never a generator that somebody else shares.

Nothing here reads or changes torch's, numpy's or Python's global generators, and nothing depends on who asks in which
order. So the number of workers, a resumed run and a cache change no image.

    split         blake2b("split", split_seed, name): images are ranked by the hash of their name
    data order    PCG64 seeded by blake2b("order", seed, epoch)
    resampling    PCG64 seeded by blake2b("resample", seed, epoch)
    augmentation  torch.Generator seeded by blake2b("augment", seed, view, sample, occurrence)
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from finetune.config import AugmentConf, Recipe
from finetune.data.packed import PackedStrings

Ranks = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


def mix(stream: str, *parts: int | str) -> int:
    """A 64-bit number that depends on every part: BLAKE2b (RFC 7693) of `stream:part:part...`, little-endian.

    The same on every machine and in every version, unlike Python's `hash`. At most one part may be free text, the last
    one, so that no two lists of parts give the same bytes.
    """
    text = ":".join([stream, *map(str, parts)])
    data = text.encode("utf-8", "surrogateescape")  # file names that are not valid UTF-8 count too
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, usedforsecurity=False).digest(), "little")


def ranks(stream: str, seed: int, names: Iterable[str]) -> Ranks:
    """`mix(stream, seed, name)` of every name, as NFC has it: file systems differ in how they write an umlaut. uint64.

    Written out because a split of millions of images waits for it.
    """
    begin = hashlib.blake2b(f"{stream}:{seed}:".encode(), digest_size=8, usedforsecurity=False).copy
    digests = bytearray()
    for data in names.encoded() if isinstance(names, PackedStrings) else map(_encoded, names):
        state = begin()
        state.update(data if data.isascii() else _normal(data))
        digests += state.digest()
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _normal(data: bytes | bytearray) -> bytes:
    return _encoded(unicodedata.normalize("NFC", data.decode("utf-8", "surrogateescape")))


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0 to count - 1 by (seed, epoch). int64 (count,).

    Sorts raw PCG64 output, the stream that numpy promises never to change; `Generator.permutation` carries no such
    promise.
    """
    raw = np.random.PCG64(mix("order", seed, epoch)).random_raw(count)
    return torch.from_numpy(np.argsort(raw, kind="stable").astype(np.int64))


def num_views(augment: AugmentConf | None) -> int:
    """How many views of an image are shown in turn; 0: a fresh one every epoch. Without augmentation there is one."""
    return 1 if augment is None or augment.recipe == Recipe.none else augment.views


def view_of(epoch: int, augment: AugmentConf | None) -> int:
    """Which view of its images an epoch shows: the epoch, or the epoch mod `augment.views` where that is above 0.

    Without augmentation every epoch shows view 0.
    """
    views = num_views(augment)
    return epoch % views if views else epoch


def augment_generator(seed: int, view: int, sample: int, occurrence: int) -> torch.Generator:
    """A fresh CPU generator for one showing of one image.

    Args:
        seed: The run's.
        view: From `view_of`.
        sample: Index into the split.
        occurrence: How often the image was shown before within the epoch, 0 for the first time.
    """
    return torch.Generator().manual_seed(mix("augment", seed, view, sample, occurrence))
