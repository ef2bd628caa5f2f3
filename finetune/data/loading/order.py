"""Which images an epoch shows, in which order, and how often."""

from __future__ import annotations

from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from finetune.data.streams import mix, shuffled


class Showings(NamedTuple):
    """The images of an epoch, one after the other.

    Attributes:
        samples: Indices into the split, int64 (n,).
        occurrences: How often each was shown before in the epoch, int64 (n,): part of what its view is drawn from.
    """

    samples: Tensor
    occurrences: Tensor

    def after(self, count: int) -> Showings:
        """Without the first `count`."""
        return Showings(self.samples[count:], self.occurrences[count:])

    def repeated(self, times: int) -> Showings:
        """Each image `times` times, side by side: a batch has several views of it (Hoffer et al., arXiv:1901.09335)."""
        if times == 1:
            return self
        again = torch.arange(times).repeat(len(self.samples))
        return Showings(
            self.samples.repeat_interleave(times), self.occurrences.repeat_interleave(times) * times + again
        )


def epoch_order(labels: Tensor, *, seed: int, epoch: int, balanced: bool, images: int = 0) -> Showings:
    """The order of a training epoch: as many showings as there are images, or as are asked for.

    Args:
        labels: Of the split, see `Split`.
        seed: The run's.
        epoch: From 0.
        balanced: Show every class equally often, to within one image: the images of a rare class come again and
            again, each time in a view of its own; a frequent class shows other images every epoch. False: every image
            once.
        images: Show so many, drawn with replacement out of all: every one is as likely as any other, each time. 0: as
            `balanced` says.
    """
    if images:
        assert not balanced, "refused by the configuration"
        return _resampled(len(labels), images, seed, epoch)
    order = shuffled(len(labels), seed, epoch)
    if not balanced:
        return Showings(order, torch.zeros_like(order))
    assert labels.ndim == 1, "refused where the source is opened"
    samples, occurrences = _balanced(labels, seed, epoch)
    return Showings(samples[order], occurrences[order])


@overload
def most_showings(labels: Tensor, *, balanced: bool, repeats: int) -> Tensor: ...


@overload
def most_showings(labels: Tensor, *, balanced: bool, repeats: int, images: int) -> Tensor | None: ...


def most_showings(labels: Tensor, *, balanced: bool, repeats: int, images: int = 0) -> Tensor | None:
    """How often one epoch can show each image at most, whatever epoch it is: one more than its highest occurrence.

    Args:
        labels: Of the split, see `Split`.
        balanced: As in `epoch_order`.
        repeats: As in `Showings.repeated`.
        images: As in `epoch_order`.

    Returns:
        int64 (n,). The bound is reached: some epoch shows each image that often. None where images are drawn with
        replacement: then any image may come any number of times.
    """
    if images:
        return None
    if not balanced or not len(labels):
        return torch.full((len(labels),), repeats, dtype=torch.int64)
    assert labels.ndim == 1, "refused where the source is opened"
    counts = labels.bincount()
    largest_share = -(-len(labels) // int((counts > 0).sum()))
    return -(-largest_share // counts[labels]) * repeats


def _balanced(labels: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """As many showings as images, class by class."""
    # Which images of a class come once more than the others: the first of a shuffle that changes every epoch.
    raw = np.random.PCG64(mix("balance", seed, epoch)).random_raw(len(labels))
    by_class = np.lexsort((raw, labels.numpy()))
    counts = np.bincount(labels.numpy())
    present = np.flatnonzero(counts)
    starts = np.cumsum(counts) - counts
    shares = np.full(len(present), len(labels) // len(present))
    # What cannot be divided goes to other classes every epoch.
    shares[(np.arange(len(labels) % len(present)) + epoch) % len(present)] += 1
    places = [np.arange(share) for share in shares]
    rows = [by_class[starts[c] + place % counts[c]] for c, place in zip(present, places, strict=True)]
    repeats = [place // counts[c] for c, place in zip(present, places, strict=True)]
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(repeats).astype(np.int64))


def _resampled(count: int, images: int, seed: int, epoch: int) -> Showings:
    """`images` draws out of `count`, and how often each image was drawn before in the epoch."""
    # The remainder favours small numbers by less than count / 2 ** 64.
    raw = np.random.PCG64(mix("resample", seed, epoch)).random_raw(images)
    samples = (raw % np.uint64(count)).astype(np.int64)
    by_sample = np.argsort(samples, kind="stable")  # the draws of each image side by side, in their order
    counts = np.bincount(samples, minlength=count)
    starts = np.cumsum(counts) - counts
    occurrences = np.empty(images, dtype=np.int64)
    occurrences[by_sample] = np.arange(images) - starts[samples[by_sample]]
    return Showings(torch.from_numpy(samples), torch.from_numpy(occurrences))
