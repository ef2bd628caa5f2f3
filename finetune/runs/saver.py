"""Saves a run without a pause: training goes on once the state is copied, and a thread writes the copy.

At most one save is under way, so memory holds at most one copy. Saves reach the disk in the order of the calls.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.loop import TrainState
from finetune.runs.checkpoint import Content, check_state, snapshot, write_state
from finetune.runs.epoch_files import (
    BEST,
    LAST,
    STATE,
    STATE_BEFORE,
    best_epochs,
    epoch_path,
    epoch_score,
    remove_epochs,
)
from finetune.runs.weights import Tensors, checksum, copied_weights, frozen_weights, read_weights, write_weights
from finetune.system.files import link_or_copy

# Stays free beside the bytes of a save: for logs, and for the files of other programs.
SPARE_BYTES = 1 << 20
# A save that takes less time than this is always made.
CHEAP_S = 0.1
# The assumed speed of the disk, until the first save has shown it.
DISK_BYTES_PER_S = 300e6


class NoSpaceError(OSError):
    """A save failed, mostly for want of disk space; the checkpoint before it is whole."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """The weights of an epoch, in host memory; they may share tensors with the state of the same save."""

    epoch: int
    tensors: Tensors
    metadata: Mapping[str, str]


@dataclass
class _Save:
    """One save: a state, and the weights files that come with it.

    Attributes:
        content: The state.
        frozen: The tensors of frozen layers.
        epochs: For files of their own.
        last: For `last.safetensors`; None in the middle of an epoch.
        kept: The epochs whose files stay; None: no file is removed.
    """

    content: Content
    frozen: Tensors
    epochs: list[_Weights] = field(default_factory=list)
    last: _Weights | None = None
    kept: Sequence[int] | None = None

    @property
    def num_bytes(self) -> int:
        """Disk space that the save takes; `last.safetensors` may be a link to an epoch's file."""
        written = [*self.epochs, *([self.last] if self.last is not None and self.last not in self.epochs else [])]
        return _size(self.content) + sum(_size(weights.tensors) for weights in written)


class Saver:
    """The checkpoints of one run.

    Attributes:
        stalled_s: How long training has waited for copies and for an earlier save, in seconds.
        writing_s: Processor time of the writing threads, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, str],
        notes: Mapping[str, str],
        *,
        keep: int = 1,
        max_share: float = 1.0,
        best_epoch: int = 0,
    ) -> None:
        """Save into `folder`.

        Args:
            folder: `checkpoints/` of the run directory; exists.
            metadata: Goes into every weights file.
            notes: Goes into every state.
            keep: Number of best epochs whose weights files stay. Above 1 every epoch is saved.
            max_share: Share of the run's time that saves at the ends of epochs may take, in (0, 1]. An epoch that ends
                too soon after a save is not saved; if it is the best so far, its weights stay in memory until the next
                save. 1.0: every epoch is saved.
            best_epoch: That of the state which the run continues from.
        """
        self.folder = folder
        self.stalled_s = self.writing_s = 0.0
        self._metadata = dict(metadata)
        self._notes = dict(notes)
        self._keep = keep
        self._max_share = max_share
        self._cost_s = 0.0  # how long the latest save took
        self._best: _Weights | None = None  # of the best epoch, until a save takes them
        self._best_under_way: _Weights | None = None  # the same while a thread writes them
        self._best_on_disk = best_epoch  # of the newest state on the disk
        self._frozen: dict[str, Tensor] | None = None
        self._frozen_checksum = ""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._position: tuple[int, int] | None = None  # epoch and step of the latest state that was asked for
        self._safe = "none was saved yet"

    @property
    def minutes_since(self) -> float:
        """Minutes since the latest save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: TrainState) -> None:
        """Save `state` in the middle of an epoch, unless it is the latest one that was saved.

        Raises:
            OSError: An earlier save has failed.
            NotFiniteError: See `checkpoint.snapshot`.
        """
        if self._position == (state.epoch, state.step):
            return
        began = time.perf_counter()
        self.wait()  # before the copy: two copies at once take twice the memory
        self._submit(_Save(snapshot(state, self._notes), self._frozen_of(state)), state)
        self.stalled_s += time.perf_counter() - began

    def save_epoch(
        self,
        state: TrainState,
        rows: Sequence[Mapping[str, Any]],
        monitor: str,
        *,
        thresholds: tuple[float | None, float | None] = (None, None),
        left_s: float = math.inf,
        always: bool = False,
    ) -> bool:
        """Save `state` and its weights at the end of an epoch, if `max_share` allows it; whether it was saved.

        Shortly before the end of the run it is not saved either: the last save will hold more.

        Args:
            state: After the epoch.
            rows: Of the history, the epoch's own at the end.
            monitor: The metric that ranks epochs.
            thresholds: Of the weights and of their averages, as validation chose them; None: one label an image.
            left_s: Estimated seconds until the end of the run.
            always: Save whatever `max_share` says.

        Raises:
            OSError: An earlier save has failed.
        """
        began = time.perf_counter()
        is_due = always or self._keep > 1 or self._is_affordable(state, left_s)
        is_best = state.best_epoch == state.epoch
        if not (is_due or is_best):
            return False
        content: Content | None = None
        if is_due:
            self.wait()  # before the copy: two copies at once take twice the memory
            content = snapshot(state, self._notes)
        last, best = self._weights(state, content, rows[-1], monitor, thresholds)
        if is_best:
            self._best = best
        if content is not None:
            kept = best_epochs(rows, monitor, self._keep) if self._keep > 1 else []
            epochs = [best] if state.epoch in kept and not is_best else []
            self._submit(_Save(content, self._frozen_of(state), epochs, last, kept), state)
        self.stalled_s += time.perf_counter() - began
        return is_due

    def _weights(
        self,
        state: TrainState,
        content: Content | None,
        row: Mapping[str, Any],
        monitor: str,
        thresholds: tuple[float | None, float | None],
    ) -> tuple[_Weights, _Weights]:
        """(the weights, those with the epoch's score): the same object unless the averages scored better.

        They share the tensors of `content`; without it they are copied.
        """
        score, is_ema = epoch_score(row, monitor)
        metadata = {**self._metadata, "epoch": str(state.epoch), monitor: str(score)}

        def weights(part: str, threshold: float | None) -> _Weights:
            shared = {} if content is None else content[part]
            tensors = copied_weights(state.model, {**self._frozen_of(state), **shared})
            chosen = {} if threshold is None else {"threshold": json.dumps(threshold)}
            return _Weights(state.epoch, tensors, {**metadata, **chosen})

        last = weights("model", thresholds[0])
        if not is_ema or state.ema is None:
            return last, last
        with state.ema.swapped_in():
            return last, weights("ema", thresholds[1])

    def _frozen_of(self, state: TrainState) -> dict[str, Tensor]:
        """The tensors of frozen layers. They never change, so they are copied once and shared by all saves."""
        if self._frozen is None:
            self._frozen = frozen_weights(state.model)
        return self._frozen

    def _is_affordable(self, state: TrainState, left_s: float) -> bool:
        """Whether a save now keeps to `max_share`, if it takes as long as the latest one; False beside another save.

        The time since the latest save and the time until the last one both count.
        """
        if self._max_share >= 1:
            return True
        if self._thread is None:  # nothing was saved yet
            weights, moments = state.model.net.state_dict(), state.optimizer.state_dict()["state"]
            in_state = _size(weights) - _size(self._frozen_of(state)) + _size(moments)
            self._cost_s = (_size(weights) + in_state) / DISK_BYTES_PER_S
        elif self._thread.is_alive():
            return False
        apart_s = min(time.monotonic() - self._saved_at, left_s)
        return self._cost_s < CHEAP_S or self._cost_s <= self._max_share * apart_s

    def best_weights(self) -> Tensors:
        """The tensors of the best epoch that was saved: from memory while they are being written, else from the file.

        Raises:
            OSError: A save has failed.
            DamagedError: The file differs from what was written.
        """
        self.check()
        under_way = self._best_under_way
        return read_weights(self.folder / BEST)[0] if under_way is None else under_way.tensors

    def save_weights(self, state: TrainState) -> None:
        """Write `last.safetensors`, and the best epoch's weights if they are only in memory, before returning.

        `last.pt` stays as it is. A run that continues from it gets the best weights of that time, see `settle`.

        Raises:
            OSError: A file could not be written, or an earlier save has failed.
        """
        self.wait()
        if self._best is not None:
            self._write_epoch(self._best)
            link_or_copy(epoch_path(self.folder, self._best.epoch), self.folder / BEST)
            self._best = None
        write_weights(self.folder / LAST, copied_weights(state.model, self._frozen_of(state)), self._metadata)

    def finish(self, rows: Sequence[Mapping[str, Any]], monitor: str) -> None:
        """After the last epoch: remove the files that only a resume needs, once `last.pt` is known to be whole.

        Raises:
            OSError: The last save has failed.
            DamagedError: `last.pt` differs from what was written.
        """
        self.wait()
        if (self.folder / STATE_BEFORE).exists():
            check_state(self.folder / STATE)
            (self.folder / STATE_BEFORE).unlink()
        remove_epochs(self.folder, but=best_epochs(rows, monitor, self._keep) if self._keep > 1 else [])

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile; does not wait.

        Raises:
            OSError: A save has failed.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every save is on the disk.

        Raises:
            OSError: A save has failed.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.check()

    def _submit(self, save: _Save, state: TrainState) -> None:
        """Let a thread write `save`, with the weights of the best epoch where the disk has none; none is under way."""
        if self._best is not None:
            save.epochs.append(self._best)
        self._best_under_way, self._best = self._best, None
        self._position = state.epoch, state.step
        self._saved_at = time.monotonic()
        # A daemon: after a second Ctrl-C nobody waits for it. Its unfinished file has a temporary name.
        self._thread = threading.Thread(target=self._work, args=(save,), name="saver", daemon=True)
        self._thread.start()

    def _work(self, save: _Save) -> None:
        began = time.monotonic()
        try:
            free = shutil.disk_usage(self.folder).free
            if free < save.num_bytes + SPARE_BYTES:
                raise NoSpaceError(errno.ENOSPC, f"{_mb(save.num_bytes)} are needed and {_mb(free)} are free")
            self._write(save)
        except Exception as error:  # the training thread raises it after its step
            self._error = self._explained(error)
        finally:
            self._best_under_way = None
            self.writing_s += time.thread_time()
            self._cost_s = time.monotonic() - began

    def _write(self, save: _Save) -> None:
        """Write the files of a save, in an order that a kill may interrupt anywhere.

        The state comes after the weights that it names. Until it is written the state before it counts, whose weights
        are still there. After it `settle` can make up for the rest.
        """
        for weights in save.epochs:
            self._write_epoch(weights)
        if save.last is not None and save.last in save.epochs:
            link_or_copy(epoch_path(self.folder, save.last.epoch), self.folder / LAST)
        elif save.last is not None:
            write_weights(self.folder / LAST, save.last.tensors, save.last.metadata)
        self._frozen_checksum = self._frozen_checksum or checksum(save.frozen)
        state, counters = self.folder / STATE, save.content["counters"]
        write_state(state, save.content, self._frozen_checksum, aside=self.folder / STATE_BEFORE)
        self._safe = f"that of step {counters['step']} is whole"
        before, self._best_on_disk = self._best_on_disk, counters["best_epoch"]
        if self._best_on_disk != before:
            link_or_copy(epoch_path(self.folder, self._best_on_disk), self.folder / BEST)
        if save.kept is not None:
            remove_epochs(self.folder, but={*save.kept, before, self._best_on_disk})

    def _write_epoch(self, weights: _Weights) -> None:
        write_weights(epoch_path(self.folder, weights.epoch), weights.tensors, weights.metadata)

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        reason = error.strerror or str(error)
        room = ""
        if not isinstance(error, NoSpaceError):
            with contextlib.suppress(OSError):  # the folder itself may be gone
                room = f" ({_mb(shutil.disk_usage(self.folder).free)} are free)"
        return NoSpaceError(
            f"cannot save a checkpoint in {self.folder}: {reason}{room}. The one before it is not lost: {self._safe}."
            f" Make room, then continue with resume={self.folder.parent}"
        )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _size(tree: Any) -> int:
    """Bytes of all tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(_size, tree.values()))
    return sum(map(_size, tree)) if isinstance(tree, (list, tuple)) else 0
