"""Checkpoints without a pause: what is to be saved is copied at once, and a thread writes it beside the training.

At most one save is under way, and they land in the order in which they were asked for. A checkpoint goes only once its
successor is whole and on the disk: `last.pt` becomes `previous.pt` in the moment in which the new `last.pt` takes its
place, and `best.safetensors` is replaced only once the state that says so is safe.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.core.fit import is_better
from finetune.core.loop import TrainState
from finetune.runs.checkpoint import (
    Content,
    DamagedError,
    check_state,
    checksum,
    copied_weights,
    frozen_weights,
    read_state,
    read_weights,
    snapshot,
    write_state,
    write_weights,
)
from finetune.system.errors import UserError
from finetune.system.files import link_or_copy, sweep_temporaries

logger = logging.getLogger("finetune")

PENDING = "best.pending"  # the weights of a new best epoch, until the state that says so is safe
BEFORE = "best.before"  # those that the last state speaks of, where a run that diverged behind it had better ones
# Left free beside what a save needs: for logs, and for the files that others write meanwhile.
SPARE_BYTES = 1 << 20
# A save that takes no longer is always made.
CHEAP_S = 0.1
# What a disk is reckoned to take, until the first save has shown it.
DISK_BYTES_PER_S = 300e6


class NoSpaceError(OSError):
    """A save that the disk has no room for; the checkpoint before it is whole."""


@dataclass(frozen=True)
class _Weights:
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def _with_threshold(metadata: dict[str, str], threshold: float | None) -> dict[str, str]:
    return metadata if threshold is None else {**metadata, "threshold": json.dumps(threshold)}


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
    ) -> None:
        """Save into `folder`.

        Args:
            folder: `checkpoints/` of the run directory; exists.
            metadata: What travels with weights.
            notes: What travels with a state.
            keep: Weights of so many best epochs are kept; above 1 every epoch is saved.
            max_share: Of the time that saves at the ends of epochs may take; an epoch that comes too soon is not saved,
                and a best one is kept in memory until the next save. 1.0: every epoch is saved.
        """
        self.folder = folder
        self.stalled_s = self.writing_s = 0.0
        self._metadata = dict(metadata)
        self._notes = dict(notes)
        self._keep = keep
        self._max_share = max_share
        self._cost_s = 0.0  # of the latest save, from its start to its end on the disk
        self._best: _Weights | None = None  # the best epoch's, where they are not on the disk yet
        self._under_way: _Weights | None = None  # the best epoch's, while they are being written
        self._frozen: dict[str, Tensor] | None = None
        self._frozen_checksum = ""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._position: tuple[int, int] | None = None  # of the latest state that was asked for: epoch and step
        self._safe = "none was saved yet"

    @property
    def minutes_since(self) -> float:
        """Minutes since the latest save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: TrainState) -> None:
        """Save `state`, in the middle of an epoch; nothing to do where it was the latest to be saved.

        Raises:
            OSError: An earlier save has failed.
            NotFiniteError: See `checkpoint.snapshot`.
        """
        if self._position == (state.epoch, state.step):
            return
        began = time.perf_counter()
        content = snapshot(state, self._notes)
        self._submit(self._safely(content, self._frozen_of(state)), _size(content) + self._size_of_best())
        self._position = state.epoch, state.step
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
        """Save `state` at the end of an epoch, with its weights for use; False where it is too soon for another save.

        Or too near the end, whose save will hold more than this one.

        Args:
            state: After the epoch.
            rows: Of the history, the epoch's own at the end.
            monitor: The metric that picks the best epochs.
            thresholds: What validation chose for the weights, and for their averages; None: one label an image.
            left_s: Seconds until the run is through, as far as anybody knows.
            always: However soon.

        Raises:
            OSError: An earlier save has failed.
        """
        began = time.perf_counter()
        if self._thread is None:  # nothing was saved yet: what it will take is reckoned
            weights, moments = state.model.net.state_dict(), state.optimizer.state_dict()["state"]
            twice = 2 * _size(weights) - _size(self._frozen_of(state))  # the state holds what learns alone
            self._cost_s = (twice + _size(moments)) / DISK_BYTES_PER_S
        is_due = always or self._keep > 1 or self._is_affordable(left_s)
        is_best = state.best_epoch == state.epoch
        if not (is_due or is_best):
            return False
        score, is_ema = epoch_score(rows[-1], monitor)
        about = {**self._metadata, "epoch": str(state.epoch), monitor: str(score)}
        last = best = _Weights(self._weights(state), _with_threshold(about, thresholds[0]))
        if is_ema and state.ema is not None:
            with state.ema.swapped_in():
                best = _Weights(self._weights(state), _with_threshold(about, thresholds[1]))
        if is_best:
            self._best = best
        if is_due:
            self._submit(*self._at_the_end(state, last, best, best_epochs(rows, monitor, self._keep)))
            self._position = state.epoch, state.step
        self.stalled_s += time.perf_counter() - began
        return is_due

    def _at_the_end(
        self, state: TrainState, last: _Weights, best: _Weights, kept: Sequence[int]
    ) -> tuple[list[Callable[[], None]], int]:
        """What is written at the end of an epoch, step by step, and how many bytes that takes."""
        content = snapshot(state, self._notes)
        # Weights that are those of the best epoch get a second name, not a second copy.
        epoch, is_best = state.epoch, state.best_epoch == state.epoch
        size = _size(content) + self._size_of_best() + (0 if is_best and best is last else _size(last.tensors))
        beside = [lambda: self._write("last.safetensors", last, like_best=is_best and best is last)]
        if self._keep > 1 and state.epoch in kept:
            beside.append(lambda: self._write(f"epoch_{epoch:04d}.safetensors", best, like_best=is_best))
        steps = self._safely(content, self._frozen_of(state), beside)
        return [*steps, lambda: _prune(self.folder, kept)], size

    def _safely(
        self, content: Content, frozen: Mapping[str, Tensor], beside: Sequence[Callable[[], None]] = ()
    ) -> list[Callable[[], None]]:
        """Write a state, ahead of it the best weights that it speaks of where they are not on the disk yet.

        `beside` comes ahead of it, too: killed behind the last state, a run has nothing left to write.
        """
        best = self._best
        if best is None:
            return [*beside, self._write_last(content, frozen)]
        pending = self.folder / PENDING
        return [
            lambda: write_weights(pending, best.tensors, best.metadata),
            *beside,
            self._write_last(content, frozen),
            self._promote,
        ]

    def _frozen_of(self, state: TrainState) -> dict[str, Tensor]:
        """The tensors of frozen layers, which never change: copied once, and shared by all that is written."""
        if self._frozen is None:
            self._frozen = frozen_weights(state.model)
        return self._frozen

    def _size_of_best(self) -> int:
        return 0 if self._best is None else _size(self._best.tensors)

    def _write(self, name: str, weights: _Weights, *, like_best: bool) -> None:
        """Weights under a name; a second name of those of a new best epoch, which lie there already, where they are."""
        if like_best:
            link_or_copy(self.folder / PENDING, self.folder / name)
        else:
            write_weights(self.folder / name, weights.tensors, weights.metadata)

    def _weights(self, state: TrainState) -> dict[str, Tensor]:
        """The weights as they are now, in host memory."""
        return copied_weights(state.model, self._frozen_of(state))

    def _is_affordable(self, left_s: float) -> bool:
        """Whether a save now keeps to `max_share`, going by what the latest one took; never beside another one.

        As long as it pays to wait after a save it pays to wait for the last one.
        """
        if self._max_share >= 1:
            return True
        if self._thread is not None and self._thread.is_alive():
            return False
        apart_s = min(time.monotonic() - self._saved_at, left_s)
        return self._cost_s < CHEAP_S or self._cost_s <= self._max_share * apart_s

    def best_weights(self) -> dict[str, Tensor]:
        """The tensors of the best epoch that was saved: from memory while they are being written, then from their file.

        Raises:
            OSError: A save has failed.
            DamagedError: The file is not what was written.
        """
        self.check()
        under_way = self._under_way
        return read_weights(self.folder / "best.safetensors")[0] if under_way is None else under_way.tensors

    def save_weights(self, state: TrainState) -> None:
        """Write `last.safetensors` here and now, and the best epoch's weights where they are only in memory.

        Raises:
            OSError: It could not be written, or an earlier save has failed.
        """
        self.wait()
        if self._best is not None:
            # The last state does not speak of them, and a run that goes on from there may come elsewhere.
            path, before = self.folder / "best.safetensors", self.folder / BEFORE
            if path.exists():
                link_or_copy(path, before)
            write_weights(path, self._best.tensors, self._best.metadata)
            self._best = None
        write_weights(self.folder / "last.safetensors", copied_weights(state.model), self._metadata)

    def check(self) -> None:
        """Say so if a save has failed meanwhile; no wait.

        Raises:
            OSError: It has.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, timeout_s: float | None = None) -> None:
        """Until everything asked for is on the disk.

        Raises:
            OSError: A save has failed.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.check()

    def _write_last(self, content: Content, frozen: Mapping[str, Tensor]) -> Callable[[], None]:
        def write() -> None:
            self._frozen_checksum = self._frozen_checksum or checksum(frozen)
            write_state(self.folder / "last.pt", content, self._frozen_checksum, aside=self.folder / "previous.pt")
            self._safe = f"that of step {content['counters']['step']} is whole"

        return write

    def _promote(self) -> None:
        (self.folder / PENDING).replace(self.folder / "best.safetensors")

    def _submit(self, steps: Sequence[Callable[[], None]], num_bytes: int) -> None:
        self.wait()  # the thread before forgets what was under way, so only now something else is
        self._under_way, self._best = self._best, None
        self._saved_at = time.monotonic()
        # A daemon: at a second Ctrl-C nobody waits for it, and what it leaves half done carries another name.
        self._thread = threading.Thread(target=self._work, args=(steps, num_bytes), name="saver", daemon=True)
        self._thread.start()

    def _work(self, steps: Sequence[Callable[[], None]], num_bytes: int) -> None:
        began = time.monotonic()
        try:
            free = shutil.disk_usage(self.folder).free
            if free < num_bytes + SPARE_BYTES:
                raise NoSpaceError(errno.ENOSPC, f"{_mb(num_bytes)} are needed and {_mb(free)} are free")
            for step in steps:
                step()
        except Exception as error:  # handed to the training thread, which raises it after its step
            self._error = error
            self._error = self._explained(error)
        finally:
            self._under_way = None
            self.writing_s += time.thread_time()
            self._cost_s = time.monotonic() - began

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
    """Bytes of all tensors in it."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(_size, tree.values()))
    return sum(map(_size, tree)) if isinstance(tree, (list, tuple)) else 0


# --- which epochs are kept -------------------------------------------------------------------------------------------


def epoch_score(row: Mapping[str, Any], monitor: str) -> tuple[float, bool]:
    """What an epoch is ranked by, and whether its averaged weights, not its weights, had that score; NaN for null."""
    plain, averaged = (_number(row.get(name)) for name in (monitor, monitor.replace("val/", "val_ema/", 1)))
    return (averaged, True) if is_better(averaged, plain, monitor) else (plain, False)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def best_epochs(rows: Sequence[Mapping[str, Any]], monitor: str, count: int) -> list[int]:
    """The `count` best epochs, best first; of equals the earlier ones."""
    best: list[tuple[float, int]] = []
    for row in rows:
        score = epoch_score(row, monitor)[0]
        place = next((i for i, (other, _) in enumerate(best) if is_better(score, other, monitor)), len(best))
        best.insert(place, (score, int(row["epoch"])))
    return [epoch for _, epoch in best[:count]]


def _prune(folder: Path, kept: Sequence[int]) -> None:
    for path, epoch in _epoch_files(folder):
        if epoch not in kept:
            path.unlink()


def _epoch_files(folder: Path) -> list[tuple[Path, int]]:
    found = [(path, path.stem.partition("_")[2]) for path in folder.glob("epoch_*.safetensors")]
    return [(path, int(digits)) for path, digits in found if digits.isdigit()]


# --- after a restart -------------------------------------------------------------------------------------------------


def latest_state(folder: Path) -> tuple[Content, Path] | None:
    """The newest checkpoint that loads, and its path; None where none was ever saved.

    A `last.pt` that is damaged is put aside as `damaged.pt`, and the one before it taken, with a warning.

    Raises:
        ValueError: There are checkpoints, and none of them loads.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    if last.exists():
        try:
            return read_state(last), last
        except DamagedError as error:
            if not previous.exists():
                raise UserError(
                    f"{error}; there is none before it: remove {folder} to start from the beginning"
                ) from error
            content = read_state(previous)
            logger.warning(
                "%s. Falling back to the checkpoint before it, of step %d; the damaged file is now damaged.pt",
                error,
                content["counters"]["step"],
            )
            last.replace(folder / "damaged.pt")
            return content, previous
    return (read_state(previous), previous) if previous.exists() else None


def settle(folder: Path, state: TrainState) -> None:
    """Bring the files beside the state in line with it: a run may have been killed between two of them."""
    sweep_temporaries(folder)
    pending = folder / PENDING
    if pending.exists():
        if _epoch_of(pending) == state.best_epoch > 0:
            pending.replace(folder / "best.safetensors")
        else:
            pending.unlink()
    before = folder / BEFORE
    if before.exists():
        if _epoch_of(before) == state.best_epoch:
            before.replace(folder / "best.safetensors")
        else:
            before.unlink()
    for path, epoch in _epoch_files(folder):
        if epoch > state.epoch:
            path.unlink()


def _epoch_of(path: Path) -> int:
    try:
        return int(read_weights(path)[1]["epoch"])
    except DamagedError:
        return -1


def tidy(folder: Path) -> None:
    """After the last epoch: `previous.pt` goes, once `last.pt` has been read back whole."""
    if (folder / "previous.pt").exists():
        check_state(folder / "last.pt")
        (folder / "previous.pt").unlink()
