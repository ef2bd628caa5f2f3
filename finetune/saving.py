"""Checkpoints without a pause: what is to be saved is copied at once, and a thread writes it beside the training.

At most one save is under way, and they land in the order in which they were asked for. A checkpoint goes only once its
successor is whole and on the disk: `last.pt` becomes `previous.pt` in the moment in which the new `last.pt` takes its
place, and `best.safetensors` is replaced only once the state that says so is safe.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.checkpoint import (
    Content,
    DamagedError,
    copied_weights,
    read_state,
    read_weights,
    snapshot,
    write_state,
    write_weights,
)
from finetune.files import sweep_temporaries
from finetune.loop import TrainState, is_better

logger = logging.getLogger("finetune")

PENDING = "best.pending"  # the weights of a new best epoch, until the state that says so is safe
# Left free beside what a save needs: for logs, and for the files that others write meanwhile.
SPARE_BYTES = 1 << 20


class NoSpaceError(OSError):
    """A save that the disk has no room for; the checkpoint before it is whole."""


class Saver:
    """The checkpoints of one run.

    Attributes:
        stalled_s: How long training has waited for copies and for an earlier save, in seconds.
        writing_s: Processor time of the writing threads, in seconds.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], notes: Mapping[str, str], *, keep: int = 1) -> None:
        """Save into `folder`.

        Args:
            folder: `checkpoints/` of the run directory; exists.
            metadata: What travels with weights.
            notes: What travels with a state.
            keep: Weights of so many best epochs are kept.
        """
        self.folder = folder
        self.stalled_s = self.writing_s = 0.0
        self._metadata = dict(metadata)
        self._notes = dict(notes)
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._safe = "none was saved yet"

    @property
    def minutes_since(self) -> float:
        """Minutes since the latest save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: TrainState) -> None:
        """Save `state`, in the middle of an epoch.

        Raises:
            OSError: An earlier save has failed.
            NotFiniteError: See `checkpoint.snapshot`.
        """
        began = time.perf_counter()
        content = snapshot(state, self._notes)
        self._submit([self._write_last(content)], _size(content))
        self.stalled_s += time.perf_counter() - began

    def save_epoch(self, state: TrainState, rows: Sequence[Mapping[str, Any]], monitor: str) -> None:
        """Save `state` at the end of an epoch, with its weights for use.

        Args:
            state: After the epoch.
            rows: Of the history, the epoch's own at the end.
            monitor: The metric that picks the best epochs.

        Raises:
            OSError: An earlier save has failed.
        """
        began = time.perf_counter()
        content, weights = snapshot(state, self._notes), copied_weights(state.model)
        score, is_ema = epoch_score(rows[-1], monitor)
        metadata = {**self._metadata, "epoch": str(state.epoch), monitor: str(score)}
        best = weights
        if is_ema and state.ema is not None:
            with state.ema.swapped_in():
                best = copied_weights(state.model)
        steps: list[Callable[[], None]] = [lambda: write_weights(self.folder / "last.safetensors", weights, metadata)]
        is_best, kept = state.best_epoch == state.epoch, best_epochs(rows, monitor, self._keep)
        if self._keep > 1 and state.epoch in kept:
            path = self.folder / f"epoch_{state.epoch:04d}.safetensors"
            steps.append(lambda: write_weights(path, best, metadata))
        if is_best:
            steps.append(lambda: write_weights(self.folder / PENDING, best, metadata))
        steps.append(self._write_last(content))
        if is_best:
            steps.append(self._promote)
        steps.append(lambda: _prune(self.folder, kept))
        self._submit(steps, _size(content) + _size(weights) * (len(steps) - 2))
        self.stalled_s += time.perf_counter() - began

    def save_weights(self, state: TrainState) -> None:
        """Write `last.safetensors` here and now.

        Raises:
            OSError: It could not be written, or an earlier save has failed.
        """
        self.wait()
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

    def _write_last(self, content: Content) -> Callable[[], None]:
        def write() -> None:
            write_state(self.folder / "last.pt", content, aside=self.folder / "previous.pt")
            self._safe = f"that of step {content['counters']['step']} is whole"

        return write

    def _promote(self) -> None:
        (self.folder / PENDING).replace(self.folder / "best.safetensors")

    def _submit(self, steps: Sequence[Callable[[], None]], num_bytes: int) -> None:
        self.wait()
        self._saved_at = time.monotonic()
        # A daemon: at a second Ctrl-C nobody waits for it, and what it leaves half done carries another name.
        self._thread = threading.Thread(target=self._work, args=(steps, num_bytes), name="saver", daemon=True)
        self._thread.start()

    def _work(self, steps: Sequence[Callable[[], None]], num_bytes: int) -> None:
        try:
            free = shutil.disk_usage(self.folder).free
            if free < num_bytes + SPARE_BYTES:
                raise NoSpaceError(errno.ENOSPC, f"{_mb(num_bytes)} are needed and {_mb(free)} are free")
            for step in steps:
                step()
        except Exception as error:  # handed to the training thread, which raises it after its step
            self._error = self._explained(error)
        finally:
            self.writing_s += time.thread_time()

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        reason = error.strerror or str(error)
        free = shutil.disk_usage(self.folder).free
        room = "" if isinstance(error, NoSpaceError) else f" ({_mb(free)} are free)"
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
                raise ValueError(
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
    read_state(folder / "last.pt")
    (folder / "previous.pt").unlink(missing_ok=True)
