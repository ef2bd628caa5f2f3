"""Which images an epoch shows, in which order, and how often."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.data.streams import mix, shuffled

Integers = np.ndarray[tuple[int, ...], np.dtype[Any]]


class Showings(NamedTuple):
    """The images of an epoch in order; an image may be shown several times."""

    samples: Tensor  # indices into the split, int64 (n,)
    occurrences: Tensor  # how often this epoch has shown each before, int64 (n,); the augmentation depends on it

    def after(self, count: int) -> Showings:
        """The showings without the first `count`."""
        return Showings(self.samples[count:], self.occurrences[count:])

    def first(self, count: int) -> Showings:
        """The first `count` showings."""
        return Showings(self.samples[:count], self.occurrences[:count])

    def repeated(self, times: int) -> Showings:
        """Each image `times` times, side by side: a batch has several views of it (Hoffer et al., arXiv:1901.09335)."""
        if times == 1:
            return self
        samples, occurrences = (values.repeat_interleave(times) for values in self)
        return Showings(samples, occurrences * times + torch.arange(times).repeat(len(self.samples)))


def in_whole_steps(images: int, step: int) -> int:
    """How many of an epoch's images fill whole optimizer steps of `step` images; all where there is no whole step."""
    return images // step * step or images


def epoch_order(labels: Tensor, *, seed: int, epoch: int, balanced: bool, images: int = 0) -> Showings:
    """The order of a training epoch, which shows every image once.

    With `balanced` it has as many showings, but every class equally often, to within one image: images of a rare class
    come several times, and a frequent class shows other images every epoch. `images` above 0 is the number of showings:
    each is drawn evenly out of all images, with replacement.
    """
    if images:
        assert not balanced, "refused by the configuration"
        # The remainder favours small numbers by less than count / 2 ** 64.
        raw = np.random.PCG64(mix("resample", seed, epoch)).random_raw(images)
        return _counted((raw % np.uint64(len(labels))).astype(np.int64), len(labels))
    order = shuffled(len(labels), seed, epoch)
    if not balanced:
        return Showings(order, torch.zeros_like(order))
    assert labels.ndim == 1, "refused where the source is opened"
    samples, occurrences = _counted(_balanced(labels.numpy(), seed, epoch), len(labels))
    return Showings(samples[order], occurrences[order])


def most_showings(labels: Tensor, *, balanced: bool, repeats: int) -> Tensor:
    """How often an epoch of `epoch_order` with `images=0` shows each image at most, int64 (n,).

    It is the smallest bound: some epoch shows the image that often. `repeats` is that of `Showings.repeated`.
    """
    if not balanced or not len(labels):
        return torch.full((len(labels),), repeats, dtype=torch.int64)
    assert labels.ndim == 1, "refused where the source is opened"
    counts = labels.bincount()
    largest_share = -(-len(labels) // int((counts > 0).sum()))
    return -(-largest_share // counts[labels]) * repeats


def _balanced(labels: Integers, seed: int, epoch: int) -> Integers:
    """Samples class by class: as many as there are images, from each class equally many."""
    # Which images of a class come once more than the others: the first of a shuffle that changes every epoch.
    raw = np.random.PCG64(mix("balance", seed, epoch)).random_raw(len(labels))
    by_class = np.lexsort((raw, labels))
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    starts = np.cumsum(counts) - counts
    shares = np.full(len(present), len(labels) // len(present))
    # Showings that cannot be divided evenly go to other classes every epoch.
    shares[(np.arange(len(labels) % len(present)) + epoch) % len(present)] += 1
    rows = [by_class[starts[c] + np.arange(share) % counts[c]] for c, share in zip(present, shares, strict=True)]
    return np.concatenate(rows)


def _counted(samples: Integers, count: int) -> Showings:
    """The samples, each below `count`, with the number of times that each came before."""
    by_sample = np.argsort(samples, kind="stable")  # the showings of each image side by side, in their order
    counts = np.bincount(samples, minlength=count)
    starts = np.cumsum(counts) - counts
    occurrences = np.empty(len(samples), dtype=np.int64)
    occurrences[by_sample] = np.arange(len(samples)) - starts[samples[by_sample]]
    return Showings(torch.from_numpy(samples), torch.from_numpy(occurrences))
