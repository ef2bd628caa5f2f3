"""Batches: which images, in which order, made by whom. Workers change the speed and nothing else.

A batch is asked for by its key: the samples, how often each was shown before in the epoch, and the view. The key holds
all that the random numbers are drawn from, so workers have no state and any of them may make any batch.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.config import AugmentConf, Balance, CacheKind, DataConf, OnError
from finetune.core.preprocess import Preprocess
from finetune.data.caches.device_cache import DeviceSquares
from finetune.data.caches.pixel_cache import FirstStep, PixelCache, first_step, open_cache
from finetune.data.images.decode import ImageError
from finetune.data.images.transforms import Shower, build_transform
from finetune.data.loading.order import Showings, epoch_order, most_showings
from finetune.data.loading.workers import Stopwatch, choose_workers
from finetune.data.sources.opening import Split
from finetune.data.streams import augment_generator, view_of
from finetune.system.memory import hand_back_freed_memory
from finetune.system.signals import STOPPING

Batch = tuple[Tensor, Tensor, Tensor]

_NO_IMAGES, _NO_IDS = torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
CACHED_PIXELS = 2**16  # of three channels of float32: about what a core's cache holds


class Key(NamedTuple):
    """One micro-batch, asked for.

    Attributes:
        samples: Indices into the split.
        occurrences: For each, how often it was shown before in this epoch.
        view: From `view_of`.
    """

    samples: list[int]
    occurrences: list[int]
    view: int


class Made(NamedTuple):
    """A micro-batch as it leaves a worker.

    Attributes:
        images: uint8 (batch, 3, size, size).
        labels: int64 (batch,), or float32 (batch, classes).
        ids: int64 (batch,).
        left_out: What could not be read, and so is not in it.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    left_out: list[ImageError]


class Reading:
    """The images of a key, one at a time: a decoded image takes the memory, still in cache, of the one before.

    Attributes:
        shown: (sample, occurrence) of what was read so far; the last is the image at hand.
        left_out: What could not be read so far.
    """

    def __init__(self, load: Callable[[int], Tensor], key: Key, *, skip: bool) -> None:
        """Read the images of `key` by `load`; `skip`: leave out what cannot be read."""
        self.shown: list[tuple[int, int]] = []
        self.left_out: list[ImageError] = []
        self._load, self._key, self._skip = load, key, skip

    def __len__(self) -> int:
        """How many at most."""
        return len(self._key.samples)

    def __iter__(self) -> Iterator[Tensor]:
        """Each in turn; raises ImageError where one is bad and not to be skipped, or nothing is left."""
        for showing in zip(self._key.samples, self._key.occurrences, strict=True):
            try:
                image = self._load(showing[0])
            except ImageError as error:
                if not self._skip:
                    raise
                self.left_out.append(error)
                continue
            self.shown.append(showing)
            yield image
        if not self.shown:
            raise self.left_out[0]


class Maker(Dataset["Made | ImageError"]):
    """Makes the batch of a key, in the training process or in a worker; small to pickle."""

    def __init__(self, split: Split, transform: Shower, seed: int, *, skip: bool = False) -> None:
        """Draw views of the images of `split` by `transform`, under the run's `seed`; `skip`: leave out what is bad."""
        self._skip = skip
        self._cache: PixelCache | None = None
        self._step: FirstStep | None = None
        self._split = split
        self._transform = transform
        self._seed = seed

    def __getitem__(self, key: Key) -> Made | ImageError:
        """The micro-batch of `key`.

        A file that cannot be read comes back as a value: raised in a worker, it would arrive with a page of traceback.
        Where it is skipped, the batch is that much smaller. No other image takes its place: so every other image stays
        in its batch and in its view, for any number of workers and whenever the file went bad. A batch of which
        nothing is left ends the run: then it is not a file that is broken.
        """
        reading = Reading(self._load, key, skip=self._skip)
        # `shown` grows while the transform reads: an image's generator is asked for after the image itself.
        generators = (augment_generator(self._seed, key.view, *showing) for showing in reading.shown)
        try:
            images = self._transform(reading, generators)
        except ImageError as error:
            return error
        ids = torch.tensor([sample for sample, _ in reading.shown], dtype=torch.int64)
        return Made(images, self._split.labels[ids], ids, reading.left_out)

    def use(self, cache: PixelCache, step: FirstStep) -> None:
        """Take images out of `cache`, in which they are as after `step`."""
        self._cache, self._step = cache, step

    def _load(self, sample: int) -> Tensor:
        if self._cache is None or self._step is None:
            return self._split.load(sample)
        kept = self._cache.load(sample)
        return self._step(self._split.load(sample)) if kept is None else kept


class Plan(Sampler[Key]):
    """The keys of the epoch to come."""

    def __init__(self, batch_size: int) -> None:
        """Nothing to do yet; `set` says what."""
        self._batch_size = batch_size
        nothing = torch.empty(0, dtype=torch.int64)
        self._showings = Showings(nothing, nothing)
        self._view = 0

    def set(self, showings: Showings, view: int) -> None:
        """Ask for `showings` in the view `view`."""
        self._showings, self._view = showings, view

    def __iter__(self) -> Iterator[Key]:
        """Each batch in turn; the last may be short."""
        (samples, occurrences), view, size = self._showings, self._view, self._batch_size
        starts = range(0, len(samples), size)
        return (Key(samples[i : i + size].tolist(), occurrences[i : i + size].tolist(), view) for i in starts)


class Loader:
    """The batches of a split, epoch by epoch, on the device.

    Attributes:
        split: The images.
        batch_size: Images a micro-batch.
        num_images: How many images an epoch shows.
        waited_s: Seconds that whoever iterates has waited for images so far.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        conf: DataConf,
        augment: AugmentConf | None,
        seed: int,
        device: torch.device,
        on_skip: Callable[[ImageError], None] | None = None,
    ) -> None:
        """Prepare; workers start with the first epoch.

        Args:
            split: The images.
            preprocess: What the model expects.
            conf: Batch size and number of workers.
            augment: For training: shuffled, augmented. None is evaluation: in order, as they are.
            seed: The run's.
            device: Where batches go.
            on_skip: Told of each image that was left out of a batch, with `data.on_error=skip`; None: nobody is.
        """
        self._repeats = 1 if augment is None else augment.repeats
        self._drawn = 0 if augment is None else conf.epoch_images
        self.num_images = (self._drawn or len(split)) * self._repeats
        self.waited_s = 0.0
        self.split = split
        self._on_skip = on_skip or (lambda error: None)
        self._skips = conf.on_error == OnError.skip
        self._step = first_step(preprocess, augment)
        self._is_cached = conf.cache in (CacheKind.ram, CacheKind.disk)
        self._squares: DeviceSquares | None = None
        start = self._step.rest if self._is_cached else preprocess
        self._maker = Maker(split, build_transform(start, augment), seed, skip=self._skips)
        self._conf = conf
        self.batch_size = conf.batch_size
        self._augment = augment
        self._seed = seed
        self._device = device
        self._mean = torch.tensor(preprocess.mean, dtype=torch.float32, device=device)[:, None, None]
        self._std = torch.tensor(preprocess.std, dtype=torch.float32, device=device)[:, None, None]
        self._plan = Plan(conf.batch_size)
        self._loader: DataLoader[Made | ImageError] | None = None
        self._batches: Iterator[Made | ImageError] = iter(())
        self._turn = 0
        self._measured_s: float | None = None

    def __len__(self) -> int:
        """Micro-batches an epoch; the last may be short."""
        return -(-self.num_images // self._conf.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """One pass.

        Args:
            epoch: From 0; decides order and views where there is augmentation.
            skip: Micro-batches to leave out at the start; they are not even read. What follows is the same.

        Yields:
            Images float32 (batch, 3, size, size), normalised, and labels int64 (batch,) on the device; ids int64
            (batch,), the indices into the split, on the host.

        Raises:
            ImageError: A file cannot be read.
        """
        assert epoch >= 0 and skip >= 0
        return self.show(self.showings(epoch).after(skip * self._conf.batch_size), self.view(epoch))

    def show(self, showings: Showings, view: int, *, empty: bool = False) -> Iterator[Batch]:
        """Like `epoch`, of any showings in any view.

        Args:
            showings: Images, one after the other.
            view: Of all of them.
            empty: Where images are left out, a batch of which nothing is left comes as one of no images; nobody is
                told of those.
        """
        self._turn += 1
        turn = self._turn
        self._start(showings, view)
        # `self._batches` has no second owner, not even this frame, so that `close` always ends the workers.
        while (batch := self._next()) is not None:
            if isinstance(batch, ImageError) and not (empty and self._skips):
                raise batch
            if isinstance(batch, ImageError):
                batch = Made(_NO_IMAGES, self.split.labels[:0], _NO_IDS, [])
            for error in batch.left_out:
                self._on_skip(error)
            yield self._deliver(batch)
            assert turn == self._turn, "another epoch of this loader was begun before this one ended"

    def _next(self) -> Made | ImageError | None:
        began = time.perf_counter()
        batch = next(self._batches, None)
        self.waited_s += time.perf_counter() - began
        return batch

    @property
    def will_fork(self) -> bool:
        """Whether the next pass may start worker processes."""
        if self._loader is not None or self._conf.cache == CacheKind.device:
            return False
        # As many as the slowest images would be worth: how slow they are is measured when it begins.
        return (choose_workers(1.0, self._device) if self._conf.workers == "auto" else int(self._conf.workers)) > 0

    def leave_out(self, sample: int, reason: str) -> None:
        """Tell whoever is told of images that are left out of one that somebody else could not read."""
        self._on_skip(ImageError(self.split.name_of(sample), reason))

    def close(self) -> None:
        """End the workers, if there are any. A later epoch starts new ones."""
        self._turn += 1
        self._batches = iter(())
        self._loader = None

    def view(self, epoch: int) -> int:
        """Which view an epoch shows."""
        return view_of(epoch, self._augment)

    def _start(self, showings: Showings, view: int) -> None:
        self._plan.set(showings, view)
        self._batches = iter(())  # the iterator of an epoch that was left early goes before the next one comes
        if self._conf.cache == CacheKind.device:
            self._batches = self._from_device()
            return
        if self._loader is None:
            self._loader = self._build()
        with _signals_held():
            self._batches = iter(self._loader)

    def _from_device(self) -> Iterator[Made | ImageError]:
        """Batches of what lies on the device; decoded now if it does not yet."""
        if self._squares is None:
            self._squares = DeviceSquares(self.split, self._step, self._conf, self._device)
        for key in self._plan:
            images, ids, left_out = self._squares.take(torch.tensor(key.samples, dtype=torch.int64))
            yield Made(images, self.split.labels[ids], ids, left_out) if len(ids) else left_out[0]

    def showings(self, epoch: int) -> Showings:
        """Which images an epoch shows, in which order."""
        if self._augment is None:
            everything = torch.arange(self.num_images)
            return Showings(everything, torch.zeros_like(everything))
        balanced = self._conf.balance == Balance.sampling
        order = epoch_order(self.split.labels, seed=self._seed, epoch=epoch, balanced=balanced, images=self._drawn)
        return order.repeated(self._repeats)

    def most_showings(self) -> Tensor | None:
        """How often an epoch can show each image at most, int64 (n,); None: any number of times."""
        return most_showings(
            self.split.labels,
            balanced=self._augment is not None and self._conf.balance == Balance.sampling,
            repeats=self._repeats,
            images=self._drawn,
        )

    def seconds_per_image(self) -> float:
        """How long an image takes to load, with as many workers as there are, by measurement; 0 from the device."""
        if self._conf.cache == CacheKind.device:
            return 0.0
        # Not stored: no worker of it has started, and `will_fork` goes by whether there is one.
        workers = (self._loader or self._build()).num_workers
        return self._cost_s() / max(1, workers)

    def _cost_s(self) -> float:
        """Seconds of one core an image, of the first ones, measured once; what is made is thrown away."""
        if self._measured_s is not None:
            return self._measured_s
        watch = Stopwatch()
        for sample in range(min(self._conf.batch_size, len(self.split))):
            self._maker[Key([sample], [0], 0)]
            if watch.lap(1):
                break
        self._measured_s = watch.cost_s
        return self._measured_s

    def _build(self) -> DataLoader[Made | ImageError]:
        if self._is_cached:
            self._maker.use(open_cache(self.split, self._step, self._conf), self._step)
            self._is_cached = False  # opened once, also when workers are started again
        is_auto = self._conf.workers == "auto"
        workers = choose_workers(self._cost_s(), self._device) if is_auto else int(self._conf.workers)
        return DataLoader(
            self._maker,
            batch_size=None,  # a key is a batch already
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_start_worker,
            # DataLoader draws a number for its workers' seeds: never out of the training process's generator.
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            # Said aloud because process pools that run sweeps (loky) put a context of their own in its place.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )

    def _deliver(self, batch: Made) -> Batch:
        images, labels, ids, _ = batch
        if self._device.type == "cpu":
            return normalise(images, self._mean, self._std), labels, ids
        early = self._device.type == "cuda"  # out of pinned memory, while the device is still busy
        pixels = images.to(self._device, non_blocking=early).to(torch.float32)
        normalised = pixels.div_(255).sub_(self._mean).div_(self._std)
        return normalised, labels.to(self._device, non_blocking=early), ids


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std on the host. uint8 (batch, 3, size, size) -> float32, the same shape.

    A part at a time, so that all four steps find it in the processor's cache.
    """
    batch = torch.empty(images.shape, dtype=torch.float32)
    at_once = max(1, CACHED_PIXELS // images.shape[-1] ** 2)
    for start in range(0, len(images), at_once):
        part = slice(start, start + at_once)
        batch[part].copy_(images[part]).div_(255).sub_(mean).div_(std)
    return batch


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Leave signals to the training process: it saves and then ends its workers; torch keeps them at one thread.

    Memory goes back to the system: each worker would keep as much as the largest image took.

    A terminal or a scheduler signals the whole group, and a run whose workers die first has nothing left to save with.
    """
    hand_back_freed_memory()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the signals that workers ignore while these start; ours arrive right after.

    A worker is born with the mask of its parent, so none is hit between its birth and `_start_worker`.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
