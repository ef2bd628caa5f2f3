"""The batches of a split as the loop takes them: images, or what the frozen layers make of them, computed or kept."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from finetune.config import PrefixCache
from finetune.core.device import is_out_of_memory
from finetune.data import Batch, ImageError, Loader
from finetune.data.caches.device_cache import sent
from finetune.data.images.mix import Mixer
from finetune.data.loading.order import Showings
from finetune.prefix.frozen import FrozenPrefix
from finetune.prefix.shelf import Shelf
from finetune.prefix.store import Block, Builder, build_in_memory, find_on_disk, open_on_disk
from finetune.system.progress import Bar

logger = logging.getLogger("finetune")

AHEAD = 2  # batches fetched while the loop computes


@dataclass(frozen=True)
class Keep:
    """Where the activations of a split are kept, and under which name.

    Attributes:
        kind: ram, device or disk.
        name: Changes with all that the numbers depend on but the view.
        images: Activations of a view.
        views: How many views there will be.
        shelf: Where blocks in memory stand.
        device: Where the run computes.
        folder: Of blocks on disk.
        is_asked: Whether somebody named the place; else what does not fit there after all is computed every time.
    """

    kind: PrefixCache
    name: str
    images: int
    views: int
    shelf: Shelf
    device: torch.device
    folder: Path
    is_asked: bool

    @property
    def total(self) -> int:
        """Activations of all views."""
        return self.images * self.views

    @property
    def missing(self) -> int:
        """Those of them that are still to be computed."""
        return self.images * sum(not self.is_there(view) for view in range(self.views))

    def place(self, view: int) -> Path:
        """Of a view's block on disk."""
        return self.folder / f"{self.name}-{view}"

    def is_there(self, view: int) -> bool:
        """Whether a view is kept already, as far as its name tells."""
        if self.kind == PrefixCache.disk:
            return os.path.isdir(self.place(view))
        return self.shelf.get(self.on_shelf(view)) is not None

    def on_shelf(self, view: int) -> str:
        """The name of a view's block in memory."""
        where = self.device if self.kind == PrefixCache.device else "host"
        return f"{self.kind}-{self.name}-{where}-{view}"

    def find(self, view: int) -> Block | None:
        """A view's block, where it is there; what is damaged is removed.

        Raises:
            OSError: What is damaged cannot be removed.
        """
        if self.kind == PrefixCache.disk:
            return find_on_disk(self.place(view), self.images)
        block: Block | None = self.shelf.get(self.on_shelf(view))
        return block


class Feed:
    """What a `Loader` gives, mixed where that is asked for, and behind the frozen layers where there are any.

    Attributes:
        num_images: How many images an epoch shows.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        title: str,
        device: torch.device,
        prefix: FrozenPrefix | None = None,
        keep: Keep | None = None,
        mixer: Mixer | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Feed from `loader`.

        Args:
            loader: Of the split.
            title: Of the split, for a progress bar.
            device: Where batches go.
            prefix: The frozen layers; None: batches hold images.
            keep: Where their output is kept, which takes a bound on how often an epoch shows an image; None: it is
                computed every time.
            mixer: For training.
            check: Called between batches of a long pass; what it raises ends the pass.
        """
        most = loader.most_showings()
        assert keep is None or (prefix is not None and most is not None)
        self.num_images = loader.num_images
        self._loader = loader
        self._title = title
        self._device = device
        self._most = torch.zeros(0, dtype=torch.int64) if most is None else most
        self._prefix = prefix
        self._keep = keep
        self._mixer = mixer
        self._check = check
        self._first_slot = self._most.cumsum(0) - self._most
        self._opened: dict[int, Block] = {}
        self._waited_s = self._waited_before = 0.0
        self._began = self._prepared_s = 0.0
        self._built = False

    def __len__(self) -> int:
        """Micro-batches an epoch; the last may be short."""
        return len(self._loader)

    @property
    def is_kept(self) -> bool:
        """Whether a pass takes what the frozen layers have given before it."""
        return self._keep is not None

    def will_fork(self, epoch: int) -> bool:
        """Whether a pass may start processes."""
        view = self._loader.view(epoch)
        is_there = view in self._opened or (self._keep is not None and self._keep.is_there(view))
        return self._loader.will_fork and not is_there

    def prepare(self, epoch: int) -> None:
        """Compute now what the epoch would otherwise wait for, where it is kept; under a bar of its own.

        Raises:
            OSError: It does not fit where it was asked for.
        """
        began, before = time.perf_counter(), self._loader.waited_s
        self._built = False
        try:
            if self._keep is not None:
                self._block(self._loader.view(epoch))
        except (OSError, RuntimeError, MemoryError) as error:
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            assert self._keep is not None
            if self._keep.is_asked:
                raise
            reason = str(error).splitlines()[0]
            logger.warning("what the frozen layers give for %s is not kept after all: %s", self._title, reason)
            self._keep = None
            self._opened.clear()
        self._prepared_s, self._waited_before = time.perf_counter() - began, self._loader.waited_s - before

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """One pass, as `Loader.epoch` has it; the first of a batch are what the loop's first layer takes."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        if self._keep is not None:
            yield from self._kept(epoch, skip)
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
        """Of the latest epoch, read at its end: `data_wait`, the share of its time that was waited for data.

        Its preparation counts. Where layers are frozen also `prefix_hits`, the share of images whose activations were
        there before.
        """
        seconds = time.perf_counter() - self._began + self._prepared_s
        found = {"data_wait": (self._waited_s + self._waited_before) / max(seconds, 1e-9)}
        if self._prefix is not None:
            found["prefix_hits"] = 0.0 if self._keep is None or self._built else 1.0
        return found

    def close(self) -> None:
        """End the loader's workers. A later epoch starts new ones."""
        self._loader.close()

    def _kept(self, epoch: int, skip: int) -> Iterator[Batch]:
        """An epoch out of a block, in the order that the loader would show."""
        block, size, split = self._block(self._loader.view(epoch)), self._loader.batch_size, self._loader.split
        assert self._prefix is not None
        samples, occurrences = self._loader.showings(epoch).after(skip * size)
        slots = self._first_slot[samples] + occurrences
        there = block.present[slots]  # without what could not be read
        counts = [int(part.sum()) for part in torch.split(there, size)] if len(slots) else []
        values_of = self._fetched(block, slots[there], counts)
        for number, (values, ids) in enumerate(zip(values_of, torch.split(samples[there], counts), strict=True)):
            if not len(ids):
                raise ImageError(split.name_of(int(samples[number * size])), "no image of a batch can be read")
            yield self._prefix.restore(values), sent(split.labels[ids], self._device), ids

    def _fetched(self, block: Block, slots: Tensor, counts: list[int]) -> Iterator[Tensor]:
        """The activations of each batch on the device; read ahead where that takes longer than a copy in memory.

        Args:
            block: Holds them.
            slots: Of an epoch, int64 (n,).
            counts: Images of each batch.
        """
        assert self._keep is not None
        if self._keep.kind != PrefixCache.disk and block.values.device.type == self._device.type:
            for part in torch.split(sent(slots, self._device), counts):
                yield block.values[part]
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: list[Future[Tensor]] = []
            for part in torch.split(slots, counts):
                waiting.append(pool.submit(_fetch, block.values, part, pin=self._device.type == "cuda"))
                if len(waiting) > AHEAD:
                    yield self._arrived(waiting.pop(0))
            for future in waiting:
                yield self._arrived(future)

    def _arrived(self, future: Future[Tensor]) -> Tensor:
        began = time.perf_counter()
        values = future.result()
        self._waited_s += time.perf_counter() - began
        return sent(values, self._device)

    def _found(self, view: int) -> Block | None:
        """The activations of a view where they are there already, from an earlier epoch or run."""
        assert self._keep is not None
        if view not in self._opened:
            block = self._keep.find(view)
            if block is None:
                return None
            self._open(view, block)
        return self._opened[view]

    def _block(self, view: int) -> Block:
        """The activations of a view, computed now if they are not there."""
        block = self._found(view)
        if block is None:
            block = self._build(view)
        assert self._prefix is not None
        self._prefix.native = block.native
        return block

    def _build(self, view: int) -> Block:
        """Compute the activations of a view, unless another run does so meanwhile."""
        keep = self._keep
        assert keep is not None
        if keep.kind != PrefixCache.disk:
            where = self._device if keep.kind == PrefixCache.device else torch.device("cpu")
            block = build_in_memory(keep.images, lambda builder: self._fill(builder, view), where)
            keep.shelf.put(keep.on_shelf(view), block, block.values.nbytes)
            self._opened[view], self._built = block, True
            return block
        block, self._built = open_on_disk(
            keep.place(view), keep.images, lambda builder: self._fill(builder, view), self._check
        )
        if self._built:
            self._opened[view] = block
        else:
            self._open(view, block)
        return block

    def _open(self, view: int, block: Block) -> None:
        """Take what an earlier epoch or another run has computed; who asks for it is told of what it lacks, too."""
        self._opened[view] = block
        if not block.present.all():
            self._leave_out(torch.arange(len(self._most)).repeat_interleave(self._most)[~block.present])

    def _leave_out(self, samples: Tensor) -> None:
        for sample in sorted(set(samples.tolist())):
            self._loader.leave_out(sample, "could not be read when the frozen layers ran on it")

    def _fill(self, builder: Builder, view: int) -> None:
        """Run the frozen layers on every showing that an epoch of this view can hold."""
        assert self._prefix is not None
        samples = torch.arange(len(self._most)).repeat_interleave(self._most)
        everything = Showings(samples, torch.arange(len(samples)) - self._first_slot[samples])
        size = self._loader.batch_size
        title = f"frozen layers on {self._title}" + (f", view {view + 1}" if view else "")
        bar = Bar(title, total=-(-len(samples) // size), images=len(samples))
        try:
            batches = self._loader.show(everything, view, empty=True)
            for number, (images, _, ids) in enumerate(bar.wrap(batches)):
                asked = samples[number * size : (number + 1) * size]
                if len(ids):
                    builder.put(self._prefix(images), found_in(asked, ids), self._prefix.native)
                else:  # of so many side by side; an epoch shows them among others
                    builder.put(None, torch.zeros(len(asked), dtype=torch.bool), self._prefix.native)
                    self._leave_out(asked)
                self._check()
        finally:  # these activations take the place of its images; and workers hold locks as long as they live
            self._loader.close()


def _fetch(values: Tensor, slots: Tensor, *, pin: bool) -> Tensor:
    batch = values[slots]
    return batch.pin_memory() if pin else batch


def found_in(wanted: Tensor, got: Tensor) -> Tensor:
    """Which of `wanted` (n,) are in `got` (m,), which is `wanted` with some left out, in the same order. bool (n,)."""
    if len(wanted) == len(got):
        return torch.ones(len(wanted), dtype=torch.bool)
    rest = iter(got.tolist())
    present, following = [], next(rest, None)
    for number in wanted.tolist():
        present.append(number == following)
        if number == following:
            following = next(rest, None)
    return torch.tensor(present)


def first_batch(loader: Loader) -> Batch:
    """The first of a pass over a loader's images; its workers end."""
    batches = loader.epoch(0)
    batch = next(islice(batches, 1))
    loader.close()
    return batch
