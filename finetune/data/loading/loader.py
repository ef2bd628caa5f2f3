"""The batches of a split on the device, epoch by epoch. Workers and caches change the speed and nothing else."""

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from finetune.config import AugmentConf, Balance, CacheKind, DataConf, OnError
from finetune.core.loop import Batch
from finetune.core.preprocess import Preprocess
from finetune.data.caches.device_cache import DeviceCache
from finetune.data.caches.pixel_cache import first_step, open_cache
from finetune.data.images.decode import ImageError
from finetune.data.images.transforms import build_transform
from finetune.data.loading.batches import BatchKey, BatchMaker, EpochPlan, Failure, PixelBatch, in_channels, normalise
from finetune.data.loading.order import Showings, epoch_order, in_whole_steps, most_showings
from finetune.data.loading.workers import (
    MORE_SHARED,
    build_data_loader,
    pick_workers,
    seconds_per_call,
    signals_blocked,
    why_not_shared,
    worker_ends,
)
from finetune.data.split import Split
from finetune.data.streams import view_of
from finetune.system.errors import UserError
from finetune.system.limits import LimitError
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")


class Loader:
    """The batches of a split, epoch by epoch, on the device."""

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        *,
        conf: DataConf,
        augment: AugmentConf | None,
        seed: int,
        device: torch.device,
        on_skip: Callable[[ImageError], None] = lambda error: None,
    ) -> None:
        """Prepare; workers start with the first epoch. Without `augment` images come in order and unchanged.

        `on_skip` is called with the error of each image that a batch leaves out, with `data.on_error=skip`.
        """
        self.split, self.batch_size = split, conf.batch_size
        self._repeats = 1 if augment is None else augment.repeats
        self._drawn = 0 if augment is None else conf.epoch_images
        self.num_images = (self._drawn or len(split)) * self._repeats  # that an epoch shows, repeats counted
        self.left_out = 0  # images of an epoch that `drop_last` took away
        self.waited_s = 0.0  # how long the iterating code has waited for batches so far
        self._conf, self._augment, self._seed, self._device, self._on_skip = conf, augment, seed, device, on_skip
        self._skips = conf.on_error == OnError.skip
        self._preprocess = preprocess
        self._step = first_step(preprocess, augment)
        self._has_told_of_damage = False
        self._has_cache_to_open = conf.cache in (CacheKind.ram, CacheKind.disk)
        self._device_cache: DeviceCache | None = None
        start = self._step.rest if self._has_cache_to_open else preprocess
        self._maker = BatchMaker(split, build_transform(start, augment), seed, skip=self._skips)
        if preprocess.channels not in (1, 3):
            problem = f"model.in_channels={preprocess.channels}: images come with three channels (RGB)"
            raise UserError(f"{problem}; use 3, or 1, which makes them grey")
        numbers = (preprocess.mean, preprocess.std)
        self._mean, self._std = torch.tensor(numbers, dtype=torch.float32, device=device)[:, :, None, None]
        self._plan = EpochPlan(conf.batch_size)
        self._loader: DataLoader[PixelBatch | Failure] | None = None
        self._batches: Iterator[PixelBatch | Failure] = iter(())
        self._turn = 0
        self._image_cost_s: float | None = None
        self._num_workers: int | None = None  # once it is known
        self.before_workers: Callable[[], None] = lambda: None  # called just before worker processes start

    def drop_last(self, step: int) -> None:
        """From now on leave out an epoch's last images that fill no step of `step`; see `in_whole_steps`."""
        whole = in_whole_steps(self.num_images, step)
        self.left_out, self.num_images = self.num_images - whole, whole

    def __len__(self) -> int:
        """Micro-batches in an epoch; the last may be short."""
        return -(-self.num_images // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch without the first `skip` micro-batches, which are not even read.

        A batch is normalised images, float32 (batch, channels, size, size), and labels, int64 (batch,) or float32
        (batch, classes), on the device; and ids int64 (batch,), the indices into the split, on the host. Raises
        ImageError.
        """
        assert epoch >= 0 and skip >= 0
        return self.show(self.showings(epoch).after(skip * self.batch_size), self.view(epoch))

    def show(self, showings: Showings, view: int, *, empty: bool = False) -> Iterator[Batch]:
        """Yield batches as `epoch` does, of any images, all in one view.

        A batch of which no image can be read is an error. With `empty` and `data.on_error=skip` it is a batch of no
        images instead, and `on_skip` is not called.
        """
        self._turn += 1
        turn = self._turn
        self._plan.set(showings, view)
        self._batches = iter(())  # the iterator of an epoch that was left early ends before the next one is made
        if self._conf.cache == CacheKind.device:
            self._batches = self._from_device()
        else:
            if self._loader is None:
                self._loader = self._build()
                if self._loader.num_workers:  # they start below, and live until `close`
                    self.before_workers()
            with signals_blocked(), worker_ends():
                self._batches = iter(self._loader)
        # Nothing but `self._batches` refers to the iterator, not even this frame, so that `close` ends the workers.
        while True:
            began = time.perf_counter()
            with worker_ends():
                batch = next(self._batches, None)
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            if isinstance(batch, Failure):
                if not (empty and self._skips and isinstance(batch, ImageError)):
                    raise batch
                images = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
                batch = PixelBatch(images, self.split.labels[:0], torch.empty(0, dtype=torch.int64), [])
            for error in batch.left_out:
                self._on_skip(error)
            if batch.mended:
                self._tell_of_damage(batch.mended[0])
            yield self._to_device(batch)
            assert turn == self._turn, "another epoch of this loader was begun before this one ended"

    def view(self, epoch: int) -> int:
        """Which view an epoch shows."""
        return view_of(epoch, self._augment)

    def showings(self, epoch: int) -> Showings:
        """Which images an epoch shows, in which order."""
        if self._augment is None:
            everything = torch.arange(self.num_images)
            return Showings(everything, torch.zeros_like(everything))
        balanced = self._conf.balance == Balance.sampling
        order = epoch_order(self.split.labels, seed=self._seed, epoch=epoch, balanced=balanced, images=self._drawn)
        return order.repeated(self._repeats).first(self.num_images)

    def most_showings(self) -> Tensor | None:
        """How often an epoch shows each image at most, int64 (n,); None, without limit, with `data.epoch_images`."""
        if self._drawn:
            return None
        balanced = self._augment is not None and self._conf.balance == Balance.sampling
        return most_showings(self.split.labels, balanced=balanced, repeats=self._repeats)

    def seconds_per_image(self) -> float:
        """Seconds until an image is loaded, with as many workers as there are, by measurement; 0 from the device."""
        if self._conf.cache == CacheKind.device:
            return 0.0
        # A loader that is built here is not stored: its workers have not started.
        workers = (self._loader or self._build()).num_workers
        return self._image_cost() / max(1, workers)

    def leave_out(self, sample: int, reason: str) -> None:
        """Report an image that other code could not use, as if a batch had left it out."""
        self._on_skip(ImageError(self.split.name_of(sample), reason))

    def close(self) -> None:
        """End the workers, if there are any. A later epoch starts new ones."""
        self._turn += 1
        self._batches = iter(())
        self._loader = None

    def make_now(self, showings: Showings, view: int) -> Batch:
        """The batch of a few images out of their files, in this process: no worker starts. Raises ImageError."""
        maker = BatchMaker(self.split, build_transform(self._preprocess, self._augment), self._seed, skip=self._skips)
        batch = maker[BatchKey(showings.samples.tolist(), showings.occurrences.tolist(), view)]
        if isinstance(batch, Failure):
            raise batch
        return self._to_device(batch)

    def _tell_of_damage(self, sample: int) -> None:
        """Say once that images in the cache on disk are damaged, `sample` first."""
        if not self._has_told_of_damage:
            name, text = printable(self.split.name_of(sample)), "the decoded images on disk are damaged, %s first:"
            logger.warning(f"{text} such images are read from their files again, and the cache is mended", name)
        self._has_told_of_damage = True

    def _build(self) -> DataLoader[PixelBatch | Failure]:
        if self._has_cache_to_open:
            self._maker.cached = open_cache(self.split, self._step, self._conf), self._step
            self._has_cache_to_open = False  # opened once, also when workers are started again
        if self._num_workers is None:
            self._num_workers = self._pick_workers()
        return build_data_loader(self._maker, self._plan, self._num_workers, self._device)

    def _pick_workers(self) -> int:
        """The number of loader processes; raises LimitError where those that the user asked for have no room."""
        is_auto = self._conf.workers == "auto"
        workers = pick_workers(self._image_cost(), self._device) if is_auto else int(self._conf.workers)
        why = why_not_shared(workers, min(self.batch_size, self.num_images) * 3 * self._preprocess.size**2)
        if why is None:
            return workers
        if not is_auto:
            raise LimitError(f"data.workers={workers}: {why}; {MORE_SHARED}")
        logger.warning("%s: images are loaded without such processes, more slowly; %s", why, MORE_SHARED)
        return 0

    def _image_cost(self) -> float:
        """Seconds of one core to make one image, measured once on the first ones."""
        if self._image_cost_s is None:
            count = min(self.batch_size, len(self.split))
            self._image_cost_s = seconds_per_call(lambda sample: self._maker[BatchKey([sample], [0], 0)], count)
        return self._image_cost_s

    def _from_device(self) -> Iterator[PixelBatch | Failure]:
        """Batches out of the cache on the device, which is filled now if it is not yet."""
        if self._device_cache is None:
            self._device_cache = DeviceCache(self.split, self._step, self._conf, self._device)
        for key in self._plan:
            images, ids, left_out = self._device_cache.take(torch.tensor(key.samples, dtype=torch.int64))
            yield PixelBatch(images, self.split.labels[ids], ids, left_out) if len(ids) else left_out[0]

    def _to_device(self, batch: PixelBatch) -> Batch:
        images, labels, ids, *_ = batch
        if self._device.type == "cpu":
            return in_channels(normalise(images, self._mean, self._std), self._preprocess.channels), labels, ids
        early = self._device.type == "cuda"  # out of pinned memory, while the device is still busy
        pixels = images.to(self._device, non_blocking=early).to(torch.float32)
        normalised = pixels.div_(255).sub_(self._mean).div_(self._std)
        normalised = in_channels(normalised, self._preprocess.channels)
        return normalised, labels.to(self._device, non_blocking=early), ids
