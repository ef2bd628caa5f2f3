"""One micro-batch: the key that asks for it, and the code that makes it, in the training process or in a worker.

A key holds everything that the random numbers of a batch depend on. So workers have no state, and it does not matter
which of them makes which batch.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from finetune.data.caches.pixel_cache import FirstStep, PixelCache
from finetune.data.images.decode import ImageError
from finetune.data.images.recipes import ImageToShow
from finetune.data.images.transforms import BatchTransform
from finetune.data.loading.order import Showings
from finetune.data.loading.workers import MORE_SHARED
from finetune.data.split import Split
from finetune.data.streams import augment_generator
from finetune.system.limits import LimitError, in_bytes
from finetune.system.reading import DamagedError

# Pixels that are normalised at a time, so that all four operations find them in the cache of a core.
CACHED_PIXELS = 2**16

Failure = ImageError | DamagedError | LimitError  # why there is no micro-batch


class BatchKey(NamedTuple):
    """Which images a micro-batch holds, and in which view."""

    samples: list[int]  # indices into the split
    occurrences: list[int]  # for each, how often this epoch has shown it before
    view: int  # see `view_of`


class PixelBatch(NamedTuple):
    """A micro-batch before it goes to the device."""

    images: Tensor  # uint8 (batch, 3, size, size)
    labels: Tensor  # int64 (batch,), or float32 (batch, classes)
    ids: Tensor  # indices into the split, int64 (batch,)
    left_out: list[ImageError]  # an error for each image of the key that could not be read and is not in the batch
    mended: Sequence[int] = ()  # indices of images that a cache had damaged, so they were read from their files


@dataclass(eq=False)
class BatchMaker(Dataset["PixelBatch | Failure"]):
    """A map from keys to micro-batches, as a DataLoader wants it; small to pickle."""

    split: Split
    transform: BatchTransform
    seed: int  # the run's
    skip: bool = False  # leave out unreadable images
    cached: tuple[PixelCache, FirstStep] | None = None  # read images from this cache, which stores them after this step

    def __getitem__(self, key: BatchKey) -> PixelBatch | Failure:
        """Return the micro-batch of `key`, or the error of an image that cannot be read, or of a damaged shard.

        The error is returned and not raised, since a worker's exception arrives with a page of traceback. With `skip`
        no other image takes the place of an unreadable one. So every other image keeps its batch and its view, for any
        number of workers and whenever the file became unreadable. A batch without any readable image is an error, too.
        """
        ids: list[int] = []
        left_out: list[ImageError] = []
        mended: list[int] = []
        try:
            images = self.transform(self._read(key, ids, left_out, mended), len(key.samples))
        except (ImageError, DamagedError) as error:
            return error
        samples = torch.tensor(ids, dtype=torch.int64)
        batch = PixelBatch(images, self.split.labels[samples], samples, left_out, mended)
        return batch if get_worker_info() is None else _shared(batch)

    def _read(
        self, key: BatchKey, ids: list[int], left_out: list[ImageError], mended: list[int]
    ) -> Iterator[ImageToShow]:
        """Yield the images one at a time, so that a batch of large ones takes the memory of one; note them in `ids`."""
        for sample, occurrence in zip(key.samples, key.occurrences, strict=True):
            try:
                image = self._load(sample, mended)
            except ImageError as error:
                if not self.skip:
                    raise
                left_out.append(error)
                continue
            ids.append(sample)
            yield image, functools.partial(augment_generator, self.seed, key.view, sample, occurrence)
        if not ids:
            raise left_out[0]

    def _load(self, sample: int, mended: list[int]) -> Tensor:
        if self.cached is None:
            return self.split.load(sample)
        cache, step = self.cached
        stored = cache.load(sample)
        if stored is None:
            stored = step(self.split.load(sample))
            if cache.mend(sample, stored):
                mended.append(sample)
        return stored


def _shared(batch: PixelBatch) -> PixelBatch | LimitError:
    """The batch in memory that processes share, or the error that there is no room.

    The queue to the training process would do this in a thread of its own, whose error nobody hears: both would wait.
    """
    try:
        for part in (batch.images, batch.labels, batch.ids):
            part.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        why = f"no room for {in_bytes(batch.images.nbytes)} of a batch in the memory that processes share"
        return LimitError(f"data.workers: {why} ({' '.join(str(error).split())}); {MORE_SHARED}")
    return batch


class EpochPlan(Sampler[BatchKey]):
    """The keys of the next epoch's batches, in order."""

    def __init__(self, batch_size: int) -> None:
        """Plan an epoch without images; `set` replaces it."""
        self._batch_size = batch_size
        nothing = torch.empty(0, dtype=torch.int64)
        self.set(Showings(nothing, nothing), 0)

    def set(self, showings: Showings, view: int) -> None:
        """Plan an epoch of `showings` in the view `view`."""
        self._showings, self._view = showings, view

    def __iter__(self) -> Iterator[BatchKey]:
        """Yield the key of each batch; the last batch may be short."""
        (samples, occurrences), view, size = self._showings, self._view, self._batch_size
        starts = range(0, len(samples), size)
        return (BatchKey(samples[i : i + size].tolist(), occurrences[i : i + size].tolist(), view) for i in starts)


def in_channels(images: Tensor, channels: int) -> Tensor:
    """Normalised RGB images as a model of `channels` channels reads them; one is grey, by Rec. 601 as in Pillow."""
    if channels == 3:
        return images
    return 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std on the host. uint8 (batch, 3, size, size) -> float32, the same shape."""
    batch = torch.empty(images.shape, dtype=torch.float32)
    at_once = max(1, CACHED_PIXELS // images.shape[-1] ** 2)
    for start in range(0, len(images), at_once):
        part = slice(start, start + at_once)
        batch[part].copy_(images[part]).div_(255).sub_(mean).div_(std)
    return batch
