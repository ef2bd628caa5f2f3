"""Saves a run beside the training: a thread writes a snapshot of the state.

On a GPU the snapshot is a copy, and training goes on at once. On a CPU it shares the memory of the weights, so the
next update waits until it is written; the forward and backward passes before that update do not wait. At most one save
is under way, so saves reach the disk in the order of the calls.
"""

import errno
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from finetune.core.loop import TrainState
from finetune.runs.checkpoint import Content, check_state, snapshot, write_state
from finetune.runs.epoch_files import (
    BEST,
    LAST,
    STATE,
    STATE_BEFORE,
    Checksums,
    best_epochs,
    compare_with_written,
    epoch_path,
    refuse_other_weights,
    remove_epochs,
    score_of,
)  # fmt: skip
from finetune.runs.history import as_lines
from finetune.runs.weights import (
    Tensors,
    checksum,
    copied_weights,
    frozen_weights,
    num_bytes,
    read_weights,
    threshold_of,
    write_weights,
)  # fmt: skip
from finetune.system.files import link_or_copy, sync_file
from finetune.system.limits import in_bytes

logger = logging.getLogger("finetune")

SPARE_BYTES = 1 << 20  # stay free beside a save: for logs, and for the files of other programs
CHEAP_S = 0.1  # a save that takes less time than this is always made
LARGE_BYTES = 1 << 26  # a copy of the best weights in memory may be so large; larger ones are written at once
DISK_BYTES_PER_S = 300e6  # the assumed speed of the disk, until the first save has shown it


class NoSpaceError(OSError):
    """A save failed, mostly for want of disk space; the checkpoint before it is whole."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """The weights of an epoch, in host memory; they may share tensors with the state of the same save."""

    epoch: int
    tensors: Tensors
    metadata: Mapping[str, str]

    def write(self, path: Path, *, is_durable: bool = True) -> str:
        """Write them to a weights file; the checksum in it."""
        return write_weights(path, self.tensors, self.metadata, is_durable=is_durable)


@dataclass
class _Save:
    """One save: a state, and the weights files that come with it."""

    content: Content | None  # the state; None for the weights of a best epoch alone
    epochs: list[_Weights] = field(default_factory=list)  # get files of their own
    last: _Weights | None = None  # for last.safetensors; None in the middle of an epoch
    kept: Sequence[int] | None = None  # epochs whose files stay; None: no file is removed

    @property
    def num_bytes(self) -> int:
        """Disk space that the save takes; `last.safetensors` may be a link to an epoch's file."""
        written = [weights.tensors for weights in {*self.epochs, self.last} if weights is not None]
        return num_bytes(self.content) + num_bytes(written)


class Saver:
    """The checkpoints of one run. A save that fails raises its OSError in the next call of a method."""

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, str],
        notes: Mapping[str, str],
        *,
        keep: int = 1,
        max_share: float = 1.0,
        best_epoch: int = 0,
        written: Checksums | None = None,
    ) -> None:
        """Save into `folder`, which exists: `metadata` into every weights file, `notes` into every state.

        The weights files of the `keep` best epochs stay; above 1 every epoch is saved. Saves at the ends of epochs may
        take a share of the time, `max_share` in (0, 1]. An epoch that ends too soon after a save is not saved; the best
        epoch's weights then wait for the next save, in memory or, on a CPU where they are large, in their own file.
        `best_epoch` is that of the state from which the run continues, and `written` has the checksums of the weights
        files that belong to that state.
        """
        self.folder = folder
        self.rows: Sequence[Mapping[str, Any]] = ()  # of the history so far, which every state carries
        self.safe_step = 0  # of the latest state that is whole on the disk; 0: there is none
        self.stalled_s = 0.0  # how long training has waited for copies and for an earlier save
        self._metadata, self._notes = dict(metadata), dict(notes)
        self._keep, self._max_share = keep, max_share
        self._cost_s = 0.0  # how long the latest save took
        self._best: _Weights | None = None  # of the best epoch, until a save takes them
        self._ahead: int | None = None  # the epoch whose weights lie on the disk ahead of the state that will name it
        self._best_on_disk = best_epoch  # the epoch whose weights best.safetensors holds
        self._written = dict(written or {})  # checksums of the weights files on the disk that belong to this run
        self._frozen: dict[str, Tensor] | None = None
        self._frozen_checksum = ""
        self._thread: threading.Thread | None = None
        self._hook: RemovableHandle | None = None
        self._error: Exception | None = None
        self._saved_at = time.monotonic()
        self._position: tuple[int, int] | None = None  # epoch and step of the latest state that was asked for

    @property
    def minutes_since(self) -> float:
        """Minutes since the latest save, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, state: TrainState) -> None:
        """Save `state` in the middle of an epoch, unless it is the latest one that was saved; see `snapshot`."""
        if self._position != (state.epoch, state.step):
            began = time.perf_counter()
            self._submit(state, _Save(self._snapshot(state)))
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

        Shortly before the end of the run, in about `left_s` seconds, it is not saved either: the last save will hold
        more. `always` saves it in any case. `rows` is the history, the epoch's own row last; `monitor` ranks epochs,
        where there are validation images; `thresholds` are those that validation chose for the weights and for their
        averages (None: it chose none).
        """
        began = time.perf_counter()
        self.rows = rows
        is_best = state.best_epoch == state.epoch
        is_due = always or self._keep > 1 or self._is_affordable(state, left_s)
        if not (is_due or is_best):
            return False
        content = self._snapshot(state) if is_due else None
        shared = (content["model"], content["ema"]) if content is not None else self._not_copied(state)
        score, _, is_ema = score_of(rows[-1], monitor)
        about = {**self._metadata, "epoch": str(state.epoch)}
        if monitor in rows[-1]:
            about[monitor] = str(score)
        last = best = self._weights(state, about, thresholds[0], shared[0])
        if (state.best_is_ema if is_best else is_ema) and state.ema is not None:
            with state.ema.swapped_in():
                best = self._weights(state, about, thresholds[1], shared[1])
        if is_best:
            self._best = best
        if content is not None:
            kept = best_epochs(rows, monitor, self._keep) if self._keep > 1 else []
            epochs = [best] if state.epoch in kept and not is_best else []
            self._submit(state, _Save(content, epochs, last, kept))
        elif shared[0] is not None:
            self._start(state, _Save(None))
        self.stalled_s += time.perf_counter() - began
        return is_due

    def _snapshot(self, state: TrainState) -> Content:
        self.wait()  # two copies at once would take twice the memory
        return snapshot(state, self._notes, as_lines(self.rows[: state.epoch]))

    def _not_copied(self, state: TrainState) -> tuple[Tensors | None, Tensors | None]:
        """(weights, averages) to write at once, since a copy in memory would be large; else (None, None)."""
        learning = {
            name: tensor.detach() for name, tensor in state.model.net.named_parameters() if tensor.requires_grad
        }
        if state.device.type != "cpu" or num_bytes(learning) < LARGE_BYTES:
            return None, None
        self.wait()
        return learning, None if state.ema is None else state.ema.state_dict()

    def _weights(
        self, state: TrainState, about: Mapping[str, str], threshold: float | None, shared: Tensors | None
    ) -> _Weights:
        """The weights of the epoch just finished; those of `shared` are not copied again."""
        tensors = copied_weights(state.model, {**self._frozen_of(state), **(shared or {})})
        chosen = {} if threshold is None else {"threshold": json.dumps(threshold)}
        return _Weights(state.epoch, tensors, {**about, **chosen})

    def _frozen_of(self, state: TrainState) -> dict[str, Tensor]:
        """The tensors of frozen layers. They never change, so they are copied once and shared by all saves."""
        if self._frozen is None:
            self._frozen = frozen_weights(state.model)
        return self._frozen

    def _is_affordable(self, state: TrainState, left_s: float) -> bool:
        """Whether a save as long as the latest one keeps to `max_share`, counted from that one and to the run's end."""
        if self._max_share >= 1:
            return True
        if self._thread is None:  # nothing was saved yet
            weights, moments = num_bytes(state.model.net.state_dict()), num_bytes(state.optimizer.state_dict()["state"])
            self._cost_s = (2 * weights - num_bytes(self._frozen_of(state)) + moments) / DISK_BYTES_PER_S
        elif self._thread.is_alive():
            return False
        apart_s = min(time.monotonic() - self._saved_at, left_s)
        return self._cost_s < CHEAP_S or self._cost_s <= self._max_share * apart_s

    def best_weights(self, best_epoch: int) -> tuple[Tensors, float | None]:
        """The tensors of the best epoch and the threshold that validation chose for them, from their file.

        The threshold is None with one label an image. Waits for a save under way, which may read the network.

        Raises:
            UserError: The file is damaged, or of another run.
        """
        self.wait()
        assert self._best_on_disk == best_epoch
        tensors, metadata = read_weights(self.folder / BEST)  # compares the file with its checksum
        compare_with_written(self.folder / BEST, self._written_best)
        return tensors, threshold_of(metadata, self.folder / BEST)

    def save_weights(self, state: TrainState) -> None:
        """Write `last.safetensors`, and the best epoch's weights if they are only in memory, before returning.

        `last.pt` stays as it is. A run that continues from it gets the best weights of that time, see `settle`.
        """
        self.wait()
        if self._best is not None:
            self._write_epoch(self._best)
            self._make_best(self._best.epoch)
            self._best = None
        elif self._ahead is not None:
            sync_file(epoch_path(self.folder, self._ahead))
            self._make_best(self._ahead)
        tensors = copied_weights(state.model, self._frozen_of(state))
        self._written[LAST] = write_weights(self.folder / LAST, tensors, self._metadata)

    def finish(self, rows: Sequence[Mapping[str, Any]], monitor: str) -> None:
        """After the last epoch: remove the files that only a resume needs, if `check_state` finds `last.pt` whole.

        Raises:
            UserError: `last.pt` is damaged, or weights that stay are not those that this run has written.
        """
        self.wait()
        if self._best_on_disk:
            refuse_other_weights(self.folder / BEST, self._written_best)
        if (self.folder / LAST).exists():
            refuse_other_weights(self.folder / LAST, self._written.get(LAST))
        if (self.folder / STATE_BEFORE).exists():
            check_state(self.folder / STATE)
            (self.folder / STATE_BEFORE).unlink()
        kept = best_epochs(rows, monitor, self._keep) if self._keep > 1 else []
        known = [epoch for epoch in kept if epoch_path(self.folder, epoch).name in self._written]
        remove_epochs(self.folder, but=known, last=len(rows))

    def check(self) -> None:
        """Raise the error of a save that has failed meanwhile, an OSError; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until every save is on the disk; then `check`."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def wait_after_error(self) -> None:
        """Wait likewise, after an error of other code: that of a save is logged, so that it does not hide the first."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)

    @contextmanager
    def waited(self) -> Iterator[None]:
        """Within it other work is done during a save; at its end, also by an error, the save is on the disk."""
        try:
            yield
        except BaseException:
            self.wait_after_error()
            raise
        self.wait()

    def pause(self) -> None:
        """Let a save under way end, before its tensors change or a process is forked; `check` raises its error."""
        if self._thread is not None and self._thread.is_alive():
            began = time.perf_counter()
            self._thread.join()
            self.stalled_s += time.perf_counter() - began

    def _submit(self, state: TrainState, save: _Save) -> None:
        self._position = state.epoch, state.step
        self._saved_at = time.monotonic()
        self._start(state, save)

    def _start(self, state: TrainState, save: _Save) -> None:
        """Let a thread write `save`, and the weights of the best epoch if the disk has none; no save is under way."""
        self._frozen_of(state)  # for its checksum
        if self._best is not None:
            save.epochs.append(self._best)
            self._best = None
        if self._hook is None and state.device.type == "cpu":
            self._hook = state.optimizer.register_step_pre_hook(lambda *_: self.pause())
            if state.ema is not None:  # averages are written to even by a step that is skipped, with the same bits
                state.ema.before_change = self.pause
        # A daemon: after a second Ctrl-C nobody waits for it. Its unfinished file has a temporary name.
        self._thread = threading.Thread(target=self._work, args=(save,), name="saver", daemon=True)
        self._thread.start()

    def _work(self, save: _Save) -> None:
        began = time.monotonic()
        try:
            needed, free = save.num_bytes, shutil.disk_usage(self.folder).free
            if free < needed + SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"{in_bytes(needed)} are needed and {in_bytes(free)} are free")
            self._write(save)
        except OSError as error:
            before = f"The one before it is not lost: that of step {self.safe_step} is whole"
            self._error = NoSpaceError(
                f"cannot save a checkpoint in {self.folder}: {error.strerror or error}."
                f" {before if self.safe_step else 'None was saved before it'}."
                f" Make room, then continue with resume={self.folder.parent}"
            )
        except Exception as error:  # the training thread raises it after its step
            self._error = error
        finally:
            if save.content is not None:
                self._cost_s = time.monotonic() - began

    def _write(self, save: _Save) -> None:
        """Write the files of a save, in an order that a kill may interrupt anywhere.

        The state comes after the weights that it names. Until it is written the state before it counts, whose weights
        are still there. What a kill leaves undone after it, `settle` does.
        """
        for weights in save.epochs:
            self._write_epoch(weights, is_durable=save.content is not None)
        if save.content is None:
            if self._ahead is not None:
                epoch_path(self.folder, self._ahead).unlink()
            self._ahead = save.epochs[0].epoch
            return
        if save.last in save.epochs:
            same = epoch_path(self.folder, save.last.epoch)
            link_or_copy(same, self.folder / LAST)
            self._written[LAST] = self._written[same.name]
        elif save.last is not None:
            self._written[LAST] = save.last.write(self.folder / LAST)
        if self._ahead is not None:
            sync_file(epoch_path(self.folder, self._ahead))  # before the state that may name it
            self._ahead = None
        self._frozen_checksum = self._frozen_checksum or checksum(self._frozen or {})
        best_epoch = save.content["counters"]["best_epoch"]
        if save.kept is not None:
            stay = {LAST, *(epoch_path(self.folder, epoch).name for epoch in (*save.kept, best_epoch))}
            self._written = {name: own for name, own in self._written.items() if name in stay}
        aside, own = self.folder / STATE_BEFORE, self._written
        write_state(self.folder / STATE, save.content, self._frozen_checksum, weights=own, aside=aside)
        self.safe_step, before = save.content["counters"]["step"], self._best_on_disk
        if best_epoch != before:
            self._make_best(best_epoch)
        if save.kept is not None:
            remove_epochs(self.folder, but={*save.kept, before, best_epoch}, last=save.content["counters"]["epoch"])

    def _write_epoch(self, weights: _Weights, *, is_durable: bool = True) -> None:
        path = epoch_path(self.folder, weights.epoch)
        self._written[path.name] = weights.write(path, is_durable=is_durable)

    @property
    def _written_best(self) -> str | None:
        """The checksum of the weights that the run has written for the epoch of `best.safetensors`."""
        return self._written.get(epoch_path(self.folder, self._best_on_disk).name)

    def _make_best(self, epoch: int) -> None:
        link_or_copy(epoch_path(self.folder, epoch), self.folder / BEST)
        self._best_on_disk = epoch
