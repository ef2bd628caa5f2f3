"""Random numbers of the data: each is a pure function of a seed and of counters such as epoch and sample.

Nothing here reads or changes the global generators of torch, numpy or Python, and no result depends on the order of
the calls. So the number of workers, a cache or a resumed run changes no image.
"""

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
    """A 64-bit hash of all parts: BLAKE2b (RFC 7693) of `stream:part:part...`, little-endian.

    The same parts give the same number on every machine, unlike Python's `hash`. Only the last part may be free text,
    so that no two lists of parts give the same bytes.
    """
    text = ":".join([stream, *map(str, parts)])
    data = text.encode("utf-8", "surrogateescape")  # file names that are not valid UTF-8 count too
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, usedforsecurity=False).digest(), "little")


def ranks(stream: str, seed: int, names: Iterable[str]) -> Ranks:
    """`mix(stream, seed, name)` of every name, uint64 (n,). Names are hashed in the Unicode form NFC.

    File systems write an umlaut in different forms; in NFC the splits do not depend on that. The loop does the work of
    `mix` without calling it, since a split hashes millions of names.
    """
    begin = hashlib.blake2b(f"{stream}:{seed}:".encode(), digest_size=8, usedforsecurity=False).copy
    digests = bytearray()
    for data in (names if isinstance(names, PackedStrings) else PackedStrings(names)).encoded():
        state = begin()
        if data.isascii():
            state.update(data)
        else:
            name = unicodedata.normalize("NFC", data.decode("utf-8", "surrogateescape"))
            state.update(name.encode("utf-8", "surrogateescape"))
        digests += state.digest()
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0 to count - 1 by (seed, epoch), int64 (count,).

    It sorts raw PCG64 output, which numpy promises never to change. `Generator.permutation` has no such promise.
    """
    raw = np.random.PCG64(mix("order", seed, epoch)).random_raw(count)
    return torch.from_numpy(np.argsort(raw, kind="stable").astype(np.int64))


def num_views(augment: AugmentConf | None) -> int:
    """How many views of an image the epochs show in turn; 0: a new view every epoch; 1 without augmentation."""
    return 1 if augment is None or augment.recipe == Recipe.none else augment.views


def view_of(epoch: int, augment: AugmentConf | None) -> int:
    """The view that an epoch shows of its images: the epoch, or the epoch mod `num_views` if that is above 0."""
    views = num_views(augment)
    return epoch % views if views else epoch


def augment_generator(seed: int, view: int, sample: int, occurrence: int) -> torch.Generator:
    """A new CPU generator, from which the augmentation of one image is drawn once.

    `sample` is the image's index in its split, `occurrence` how often the epoch has shown it before.
    """
    return torch.Generator().manual_seed(mix("augment", seed, view, sample, occurrence))
