"""The files in `checkpoints/` beside the state: which epochs keep their weights, and what a restart finds there.

`epoch_0007.safetensors` holds the weights of epoch 7. A state names the best epoch so far, and the file of that epoch
stays as long as `last.pt` or `previous.pt` names it. `best.safetensors` is a second name (hard link) of the file of the
epoch that `last.pt` names, so it is whole at every moment and costs no space.

A state has the checksum of each weights file that belongs to it. A file with another one is of another run, and is
never taken for this run's.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.core.fit import is_better
from finetune.core.loop import TrainState
from finetune.runs.checkpoint import Content, read_state
from finetune.runs.weights import metadata_of
from finetune.system.errors import UserError
from finetune.system.files import link_or_copy
from finetune.system.reading import DamagedError
from finetune.system.seals import CHECKSUM_KEY, check_checksum, checksum_in

logger = logging.getLogger("finetune")

STATE, STATE_BEFORE, DAMAGED_STATE = "last.pt", "previous.pt", "damaged.pt"
BEST, LAST = "best.safetensors", "last.safetensors"

Checksums = Mapping[str, str]  # name of a weights file -> the checksum in it, see `checksum_in`


def epoch_path(folder: Path, epoch: int) -> Path:
    """The weights file of an epoch, from 1."""
    return folder / f"epoch_{epoch:04d}.safetensors"


def remove_epochs(folder: Path, *, but: Collection[int], last: int) -> None:
    """Remove the weights files of all epochs up to `last` but those given; files that no run wrote there stay."""
    for epoch, path in _by_epoch(folder, last):
        if epoch not in but and _is_own(path, epoch):
            path.unlink()


def refuse_foreign_epochs(folder: Path, last: int) -> None:
    """Raise a UserError where the name of the weights of an epoch up to `last` is taken by a file that no run wrote."""
    for epoch, path in _by_epoch(folder, last):
        if not _is_own(path, epoch):
            mend = "move it elsewhere, or remove it if it is of no use"
            raise UserError(f"{path} holds no weights of epoch {epoch}, and the run would write them there: {mend}")


def _by_epoch(folder: Path, last: int) -> list[tuple[int, Path]]:
    """Epochs up to `last`, and the file with the exact name of each, if there is one."""
    found = []
    for path in sorted(folder.glob("epoch_*.safetensors")):
        digits = path.stem.partition("_")[2]
        epoch = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else 0
        if 0 < epoch <= last and path == epoch_path(folder, epoch):
            found.append((epoch, path))
    return found


def _is_own(path: Path, epoch: int) -> bool:
    """Whether a run wrote the file as its weights of `epoch`: its metadata say so. A renamed copy has another epoch."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        metadata = metadata_of(path)
    except DamagedError:
        return False
    return metadata.get("epoch") == str(epoch) and CHECKSUM_KEY in metadata


def score_of(row: Mapping[str, Any], monitor: str) -> tuple[float, float, bool]:
    """The score of an epoch by its row of the history, its loss, and whether the averaged weights have them.

    `monitor` is the metric that ranks epochs, such as `val/top1`. NaN stands for null.
    """
    plain, averaged = (monitor, "val/loss"), (monitor.replace("val/", "val_ema/", 1), "val_ema/loss")
    (score, loss), (other, other_loss) = (
        [math.nan if row.get(name) is None else float(row[name]) for name in names] for names in (plain, averaged)
    )
    is_ema = is_better(other, score, monitor, loss=other_loss, best_loss=loss)
    return (other, other_loss, True) if is_ema else (score, loss, False)


def best_epochs(rows: Sequence[Mapping[str, Any]], monitor: str, count: int) -> list[int]:
    """The `count` best epochs, best first; of equals those with a lower loss, and then the earlier ones."""
    best: list[tuple[float, float, int]] = []
    for row in rows:
        score, loss, _ = score_of(row, monitor)
        worse = (
            index
            for index, (other, other_loss, _) in enumerate(best)
            if is_better(score, other, monitor, loss=loss, best_loss=other_loss)
        )
        best.insert(next(worse, len(best)), (score, loss, int(row["epoch"])))
    return [epoch for _, _, epoch in best[:count]]


def has_state(folder: Path) -> bool:
    """Whether a checkpoint was ever saved: then `latest_state` finds one, or raises."""
    return (folder / STATE).exists() or (folder / STATE_BEFORE).exists()


def latest_state(folder: Path) -> tuple[Content, Path] | None:
    """The newest checkpoint that can be read, and its path; None where none was ever saved.

    Renames a damaged `last.pt` to `damaged.pt`, warns, and takes the checkpoint before it.

    Raises:
        UserError: There are checkpoints, and none of them can be read.
    """
    last, previous = folder / STATE, folder / STATE_BEFORE
    if not last.exists():
        return (read_state(previous), previous) if previous.exists() else None
    try:
        return read_state(last), last
    except DamagedError as error:
        if not previous.exists():
            raise UserError(f"{error}; there is none before it: remove {folder} to start from the beginning") from error
        content = read_state(previous)
        text = "%s. Falling back to the checkpoint before it, of step %d; the damaged file is now %s"
        logger.warning(text, error, content["counters"]["step"], DAMAGED_STATE)
        last.replace(folder / DAMAGED_STATE)
        return content, previous


def settle(folder: Path, state: TrainState, finished: int, written: Checksums) -> None:
    """Bring the weights files in line with the state that a run continues from, which has the checksums `written`.

    They may be ahead of it: the run was killed between two of them, diverged, or lost its newest state to damage. But
    none is of a later epoch than the `finished` ones, which the history has.

    Raises:
        UserError: The weights of the best epoch are neither there nor in `best.safetensors`; or a file that the run
            would keep holds the weights of another run.
    """
    for epoch, path in _by_epoch(folder, state.epoch):
        if epoch == state.best_epoch or path.name in written:
            refuse_other_weights(path, written.get(path.name))
    if (folder / LAST).exists() and _is_of_epoch(folder / LAST, range(1, state.epoch + 1)):
        refuse_other_weights(folder / LAST, written.get(LAST))
    if state.best_epoch > 0:
        path = epoch_path(folder, state.best_epoch)
        if not path.exists():
            _put_back(path, folder / BEST, written.get(path.name))
        link_or_copy(path, folder / BEST)
    remove_epochs(folder, but=range(state.epoch + 1), last=finished)


def refuse_other_weights(path: Path, written: str | None) -> None:
    """Compare the weights file at `path` with its checksum, and this with the one that the run has `written`.

    Raises:
        DamagedError: The file is damaged.
        UserError: It is whole, and holds other weights.
    """
    check_checksum(path)
    compare_with_written(path, written)


def compare_with_written(path: Path, written: str | None) -> None:
    """Compare the checksum that the weights file at `path` says it has with the one that the run has `written`.

    Raises:
        UserError: It holds other weights.
    """
    if checksum_in(path) != written:
        raise UserError(
            f"{path} does not hold the weights that this run saved there, but those of another run or program (its"
            f" checksum is {checksum_in(path)}, and the state says {written}): put the run's own file back, or move"
            " this one elsewhere"
        )


def _is_of_epoch(path: Path, epochs: Collection[int]) -> bool:
    """Whether a weights file says that it is of one of these epochs; one of before a step that failed says nothing."""
    return metadata_of(path).get("epoch") in [str(epoch) for epoch in epochs]


def _put_back(path: Path, best: Path, written: str | None) -> None:
    """Make the weights file of the best epoch at `path`, which is gone, out of the file `best`, if that holds them."""
    if not best.exists():
        why = "is not there either"
    elif checksum_in(best) != written:
        why = "holds other weights"
    else:
        check_checksum(best)
        link_or_copy(best, path)
        return
    raise UserError(
        f"{path} is gone, the weights of the best epoch so far, and {best.name} {why}: put one of both back, or remove"
        f" {path.parent} to start from the beginning"
    )
