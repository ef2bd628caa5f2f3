"""Which images an epoch shows, in which order, and how often."""

from __future__ import annotations

from typing import NamedTuple

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
        again = torch.arange(times).repeat(len(self.samples))
        return Showings(
            self.samples.repeat_interleave(times), self.occurrences.repeat_interleave(times) * times + again
        )


def epoch_order(labels: Tensor, *, seed: int, epoch: int, balanced: bool) -> Showings:
    """The order of a training epoch: always as many showings as there are images.

    Args:
        labels: Of the split, see `Split`.
        seed: The run's.
        epoch: From 0.
        balanced: Show every class equally often, to within one image: the images of a rare class come again and
            again, each time in a view of its own; a frequent class shows other images every epoch. False: every image
            once.
    """
    order = shuffled(len(labels), seed, epoch)
    if not balanced:
        return Showings(order, torch.zeros_like(order))
    assert labels.ndim == 1, "refused where the source is opened"
    samples, occurrences = _balanced(labels, seed, epoch)
    return Showings(samples[order], occurrences[order])


def most_showings(labels: Tensor, *, balanced: bool, repeats: int) -> Tensor:
    """How often one epoch can show each image at most, whatever epoch it is: one more than its highest occurrence.

    Args:
        labels: Of the split, see `Split`.
        balanced: As in `epoch_order`.
        repeats: As in `Showings.repeated`.

    Returns:
        int64 (n,). The bound is reached: some epoch shows each image that often.
    """
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
