"""The batches of a split as the training loop takes them: images, or the activations of the frozen layers."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from finetune.config import PrefixCache
from finetune.core.device import is_out_of_memory
from finetune.core.loop import Batch
from finetune.data import ImageError, Loader
from finetune.data.caches.device_cache import sent
from finetune.data.images.mix import Mixer
from finetune.data.loading.order import Showings
from finetune.prefix.cache import ActivationCache
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.store import ActivationBlock, BlockBuilder
from finetune.system.progress import Bar
from finetune.system.reading import first_line
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")

PREFETCH = 2  # batches that are read from a cache while the loop computes


class Feed:
    """The batches of a `Loader`: mixed by MixUp or CutMix, and run through the frozen layers where there are any.

    With a cache, the frozen layers run on all images of a view at once, before the first epoch that shows the view.
    An epoch shows `num_images` images.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        title: str,
        device: torch.device,
        prefix: FrozenPrefix | None = None,
        cache: ActivationCache | None = None,
        mixer: Mixer | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Feed from `loader` to `device`; `title` names the split in progress bars.

        Without `prefix` batches hold images; without `cache` activations are computed in every epoch. `check` is called
        between batches while a cache is filled; an exception from it ends the filling.
        """
        showings = loader.most_showings()
        assert cache is None or (prefix is not None and showings is not None), "see why_not_cacheable"
        self.num_images = loader.num_images
        self._loader, self._title, self._device = loader, title, device
        self._prefix, self._cache, self._mixer, self._check = prefix, cache, mixer, check
        # An image has a slot in a block for each time that an epoch can show it.
        self._showings = torch.zeros(0, dtype=torch.int64) if showings is None else showings
        self._first_slot = self._showings.cumsum(0) - self._showings
        self._view = -1  # whose block is open: a block on disk takes a file handle, so the last one alone is kept
        self._opened: ActivationBlock | None = None
        self._began = self._waited_s = 0.0  # of the current epoch
        self._fill_s = self._fill_waited_s = 0.0  # of `fill` before it
        self._has_told_of_damage = False
        self._was_computed = False  # whether `fill` ran the frozen layers

    def __len__(self) -> int:
        """Micro-batches in an epoch; the last may be short."""
        return len(self._loader)

    @property
    def is_cached(self) -> bool:
        """Whether epochs read activations from a cache."""
        return self._cache is not None

    def before_workers(self, call: Callable[[], None]) -> None:
        """From now on call `call` just before worker processes start, whatever makes them start; it must not raise.

        A process forked while another thread holds a lock would wait for that lock forever: so `call` waits for the
        thread that saves. An error from it would be taken for one of the cache.
        """
        self._loader.before_workers = call

    def fill(self, epoch: int) -> None:
        """Fill the cache for an epoch, if there is one; raises OSError if the disk that the user asked for is full."""
        began, before = time.perf_counter(), self._loader.waited_s
        self._was_computed = False
        try:
            if self._cache is not None:
                self._block(self._cache, self._loader.view(epoch))
        except (OSError, RuntimeError, MemoryError) as error:
            is_full = isinstance(error, OSError) or is_out_of_memory(error)
            if not is_full or self._cache is None or self._cache.is_required:
                raise
            logger.warning("the activations of %s are not cached after all: %s", self._title, first_line(error))
            self._cache = None
            self._opened = None
        self._fill_s, self._fill_waited_s = time.perf_counter() - began, self._loader.waited_s - before

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """One pass, as of `Loader.epoch`; batches hold images, or activations in the dtype of the next layer."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        if self._cache is not None:
            yield from self._cached(self._cache, epoch, skip)
            return
        before = self._loader.waited_s
        batches = self._loader.epoch(epoch, skip)
        if self._mixer is not None:
            batches = self._mixer.wrap(batches, epoch, skip)
        for inputs, targets, ids in batches:
            self._waited_s = self._loader.waited_s - before
            if self._prefix is not None:
                inputs = self._prefix.restore(self._prefix(inputs))
            yield inputs, targets, ids

    def stats(self) -> dict[str, float]:
        """Speed of the latest epoch, read at its end.

        `data_wait` is the share of its time, `fill` included, that was spent waiting for data. `prefix_hits`, with
        frozen layers only, is the share of images whose activations were cached before.
        """
        seconds = time.perf_counter() - self._began + self._fill_s
        found = {"data_wait": (self._waited_s + self._fill_waited_s) / max(seconds, 1e-9)}
        if self._prefix is not None:
            found["prefix_hits"] = 0.0 if self._cache is None or self._was_computed else 1.0
        return found

    def close(self) -> None:
        """End the loader's workers. A later epoch starts new ones."""
        self._loader.close()

    def _block(self, cache: ActivationCache, view: int) -> ActivationBlock:
        """The activations of a view, computed now if the cache does not have them."""
        block = self._opened
        if block is None or self._view != view:
            block, self._was_computed = cache.open(view, lambda builder: self._compute(builder, view), self._check)
            self._view, self._opened = view, block
            if not self._was_computed and not block.present.all():  # `_compute` has reported the images of its own
                self._report_unreadable(self._slot_samples()[~block.present])
        assert self._prefix is not None
        self._prefix.native = block.native
        return block

    def _cached(self, cache: ActivationCache, epoch: int, skip: int) -> Iterator[Batch]:
        """An epoch read from a block, in the order in which the loader would show the images."""
        block, size, split = self._block(cache, self._loader.view(epoch)), self._loader.batch_size, self._loader.split
        assert self._prefix is not None
        samples, occurrences = self._loader.showings(epoch).after(skip * size)
        slots = self._first_slot[samples] + occurrences
        present = block.present[slots]  # images that could be read
        counts = [int(part.sum()) for part in torch.split(present, size)] if len(slots) else []
        rows = block.rows_of(slots[present])
        is_at_hand = cache.kind != PrefixCache.disk and block.values.device.type == self._device.type
        if is_at_hand:
            values_of = self._indexed(block.values, rows, counts)
        else:
            values_of = self._prefetched(block, rows, counts, self._loader.view(epoch))
        for number, (values, ids) in enumerate(zip(values_of, torch.split(samples[present], counts), strict=True)):
            if not len(ids):
                raise ImageError(split.name_of(int(samples[number * size])), "no image of a batch can be read")
            yield self._prefix.restore(values), sent(split.labels[ids], self._device), ids

    def _indexed(self, values: Tensor, rows: Tensor, counts: list[int]) -> Iterator[Tensor]:
        """The `rows` (n,) of `values`, in batches of `counts` images, where both lie on the device that computes."""
        for part in torch.split(sent(rows, self._device), counts):
            yield values[part]

    def _prefetched(self, block: ActivationBlock, rows: Tensor, counts: list[int], view: int) -> Iterator[Tensor]:
        """The same from another memory or the disk: a thread reads `PREFETCH` batches ahead of the loop."""
        pin = self._device.type == "cuda"
        with ThreadPoolExecutor(1) as pool:
            waiting: list[tuple[Future[tuple[Tensor, list[int]]], Tensor]] = []
            for part in torch.split(rows, counts):
                waiting.append((pool.submit(_read, block, part, pin=pin), part))
                if len(waiting) > PREFETCH:
                    yield self._arrived(block, *waiting.pop(0), view)
            for future, part in waiting:
                yield self._arrived(block, future, part, view)

    def _arrived(
        self, block: ActivationBlock, future: Future[tuple[Tensor, list[int]]], rows: Tensor, view: int
    ) -> Tensor:
        began = time.perf_counter()
        values, damaged = future.result()
        self._waited_s += time.perf_counter() - began
        if damaged:
            places = torch.tensor(damaged)
            values[places] = self._made_again(block, rows[places], view).to(values.dtype)
        return sent(values, self._device)

    def _made_again(self, block: ActivationBlock, rows: Tensor, view: int) -> Tensor:
        """The activations of damaged rows of a block on disk, computed again, (n, ...); the file is mended.

        No worker starts: the thread that saves may hold a lock, which a process forked now would wait for.
        """
        assert self._prefix is not None and block.records is not None
        if not self._has_told_of_damage:
            text = "%s: cached activations are damaged: they are computed again, and the file is mended"
            logger.warning(text, printable(str(block.records.path)))
            self._has_told_of_damage = True
        made = []
        for part in torch.split(rows, self._loader.batch_size):
            slots = block.present.nonzero().flatten()[part]
            asked = self._slot_samples()[slots]
            images, _, ids = self._loader.make_now(Showings(asked, slots - self._first_slot[asked]), view)
            names = [self._loader.split.name_of(sample) for sample in asked.tolist()]
            for name, is_read in zip(names, torch.isin(asked, ids).tolist(), strict=True):
                if not is_read:
                    raise ImageError(name, "its cached activations are damaged, and it cannot be read any more")
            made.append(self._prefix(images))
            for name, row, values in zip(names, part.tolist(), made[-1], strict=True):
                if not block.mend(row, values):
                    logger.warning("%s gives other activations than those that were cached", printable(name))
        return torch.cat(made).cpu()

    def _slot_samples(self) -> Tensor:
        """The image of each slot, int64 (slots,)."""
        return torch.arange(len(self._showings)).repeat_interleave(self._showings)

    def _report_unreadable(self, samples: Tensor) -> None:
        for sample in sorted(set(samples.tolist())):
            self._loader.leave_out(sample, "could not be read when the frozen layers ran on it")

    def _compute(self, builder: BlockBuilder, view: int) -> None:
        """Run the frozen layers on every image of a view, as often as an epoch can show it."""
        assert self._prefix is not None
        samples = self._slot_samples()
        everything = Showings(samples, torch.arange(len(samples)) - self._first_slot[samples])
        size = self._loader.batch_size
        title = f"frozen layers on {self._title}" + (f", view {view + 1}" if view else "")
        bar = Bar(title, total=-(-len(samples) // size), images=len(samples))
        try:
            batches = self._loader.show(everything, view, empty=True)
            for number, (images, _, ids) in enumerate(bar.wrap(batches)):
                asked = samples[number * size : (number + 1) * size]
                if len(ids):
                    builder.put(self._prefix(images), torch.isin(asked, ids), self._prefix.native)
                else:  # a whole batch of unreadable images: an epoch in another order may mix them with readable ones
                    builder.put(None, torch.zeros(len(asked), dtype=torch.bool), self._prefix.native)
                    self._report_unreadable(asked)
                self._check()
        finally:  # epochs read activations from here on; and each worker process holds memory as long as it lives
            self._loader.close()


def _read(block: ActivationBlock, rows: Tensor, *, pin: bool) -> tuple[Tensor, list[int]]:
    """The activations of `rows`, and which of these are damaged; see `ActivationBlock.read`."""
    values, damaged = block.read(rows)
    return values.pin_memory() if pin else values, damaged
