"""`last.pt`: the state of a run that an exact resume needs, in a file of plain types and tensors.

The file is read with `weights_only=True`, so that a checkpoint cannot run code.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from finetune.core.loop import TrainState
from finetune.runs.records import Count
from finetune.runs.weights import copied_to_host, frozen_weights, is_frozen, write_whole
from finetune.system.errors import UserError
from finetune.system.inert_pickle import check_pickles
from finetune.system.reading import DamagedError, UnfitError, fitted
from finetune.system.seals import check_seal, damaged_if_unreadable, seal
from finetune.system.terminal import printable

FORMAT = 6
ZIP_END, ZIP_END_BYTES = b"PK\5\6", 22  # how the last bytes of a zip file begin, and how many they are
COUNTERS = ("epoch", "batch", "step", "skipped", "best_score", "best_loss", "best_epoch", "best_is_ema", "seconds")

Content = dict[str, Any]  # a tree of plain types and tensors


class _Counters(TypedDict):
    epoch: Count
    batch: Count
    step: Count
    skipped: Count
    best_score: float
    best_loss: float
    best_epoch: Count
    best_is_ema: bool
    seconds: float


class _Group(TypedDict):
    name: str
    optimizer: str


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[_Group]


class _Scheduler(TypedDict):
    last_epoch: Count


class _State(TypedDict):
    """A snapshot, the checksum of the frozen weights, and those of the weights files beside it, by their names.

    Torch checks what it holds of tensors.
    """

    model: dict[str, Any]
    optimizer: _Optimizer
    scheduler: _Scheduler
    scaler: dict[str, Any]
    sums: dict[str, Any]
    random: dict[str, Any]
    ema: dict[str, Any] | None
    guard: dict[str, int]
    rates: Any
    counters: _Counters
    notes: dict[str, str]
    history: str
    frozen: str
    weights: dict[str, str]


def snapshot(state: TrainState, notes: Mapping[str, str] | None = None, history: str = "") -> Content:
    """A copy, in host memory, of everything that training changes.

    On a CPU a copy of weights, moments and averages would double their memory, so the snapshot shares them: write it
    before the next update, or swap of averages, changes them. On other devices training may go on at once. The
    snapshot has no tensors of frozen layers: a resumed run gets them where the first start got them. It carries
    `notes`, words such as machine and versions, and the content of `history.jsonl`.

    Raises:
        NotFiniteError: A step since the last look was not finite, so its state is not saved.
    """
    state.guard.look()
    content: Content = {
        "format": FORMAT,
        "model": {n: t for n, t in state.model.net.state_dict().items() if not is_frozen(state.model, n)},
        **{name: getattr(state, name).state_dict() for name in ("optimizer", "scheduler", "scaler", "sums")},
        "random": _random_state(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "guard": {"total": state.guard.total},
        "rates": state.rates,
        "counters": {name: getattr(state, name) for name in COUNTERS},
        "notes": dict(notes or {}),
        "history": history,
    }
    learning = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = [value for of_one in state.optimizer.state.values() for value in of_one.values()]
    averages = [] if state.ema is None else state.ema.state_dict().values()
    shared = {value.data_ptr() for value in (*learning, *moments, *averages) if isinstance(value, Tensor)}
    copied: Content = copied_to_host(content, shared)
    return copied


def _random_state() -> dict[str, Tensor]:
    """The states of torch's own generators, which dropout and drop path draw from."""
    return {"cpu": torch.get_rng_state(), **{f"cuda:{i}": torch.cuda.get_rng_state(i) for i in _gpus()}}


def _set_random_state(state: dict[str, Tensor]) -> None:
    """Restore the generators' states; leaves out devices that this machine lacks."""
    torch.set_rng_state(state["cpu"])
    for index in _gpus():
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


def _gpus() -> range:
    return range(torch.cuda.device_count())


def write_state(
    path: Path, content: Content, frozen: str, *, weights: Mapping[str, str], aside: Path | None = None
) -> None:
    """Write a snapshot, with the checksum `frozen` of the frozen weights. The older file at `path` moves to `aside`.

    `weights` has the checksum of each weights file beside it that belongs to the state, by its name. The file ends with
    a checksum of all its bytes, which `check_state` compares. See `write_whole` for errors.
    """

    def write(temporary: Path) -> None:
        torch.save({**content, "frozen": frozen, "weights": dict(weights)}, temporary)
        seal(temporary)

    write_whole(path, write, aside=aside)


def check_state(path: Path) -> None:
    """Compare every byte of the file with its checksum; a DamagedError if they differ or it cannot be read."""
    if check_seal(path):
        return
    # Of another program or version: a zip file has checksums of its tensors, at least, and ends with these bytes.
    with damaged_if_unreadable(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        file.seek(-ZIP_END_BYTES, os.SEEK_END)
        is_whole = file.read(len(ZIP_END)) == ZIP_END
    if not is_whole:
        raise DamagedError.because(path, "its checksum is cut or changed")
    if damaged is not None:
        raise DamagedError.because(path, f"the checksum of {printable(damaged)} differs from what was written")


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: plain types and tensors only, since other content could run code.

    Raises:
        DamagedError: The file cannot be read, or holds other content.
    """
    with damaged_if_unreadable(path):
        check_pickles(path)  # of a run folder from elsewhere: keys that collide keep torch's reader busy for hours
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            why = "it holds more than numbers, texts and tensors, and loading such a file can run code"
            raise DamagedError(f"{path} was refused: {why}") from error


def read_state(path: Path) -> Content:
    """The snapshot in a file, once `check_state` has found it whole.

    Raises:
        UserError: It is damaged (DamagedError), or no checkpoint of this version.
    """
    check_state(path)
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version of finetune (format {FORMAT})")
    try:
        return dict(fitted(content, _State))
    except UnfitError as error:
        raise DamagedError.because(path, str(error)) from None


def restore(content: Content, state: TrainState, path: str) -> None:
    """Continue from a snapshot, above frozen layers that `restore_frozen` has restored; `path` is for errors.

    Raises:
        UserError: The snapshot is of another model or optimizer.
    """
    _refuse_other_optimizer(content, state, path)
    try:
        state.model.net.load_state_dict({**frozen_weights(state.model), **content["model"]})
    except RuntimeError as error:
        raise UserError(f"{path} is of another model: {' '.join(str(error).split())}") from error
    _restore_rates(content, state)
    state.scaler.load_state_dict(content["scaler"])
    state.sums.load_state_dict(content["sums"])
    state.guard.total = content["guard"]["total"]
    if state.ema is not None:
        state.ema.load_state_dict(content["ema"])
    state.rates = content["rates"]
    for name in COUNTERS:
        setattr(state, name, content["counters"][name])
    # The scheduler warns if it steps before the optimizer does; here the optimizer has stepped in an earlier session.
    state.optimizer._opt_called = state.step > 0  # type: ignore[attr-defined]
    _set_random_state(content["random"])


def _refuse_other_optimizer(content: Content, state: TrainState, path: str) -> None:
    saved, own = content["optimizer"]["param_groups"], state.optimizer.param_groups
    names = [", ".join(group["name"] for group in groups) for groups in (saved, own)]
    if names[0] != names[1]:
        raise UserError(f"{path} has other parameter groups: {names[0]}; this run has {names[1]}")
    if [group["optimizer"] for group in saved] != [group["optimizer"] for group in own]:
        raise UserError(f"{path} was saved with optim={saved[-1]['optimizer']}; no other optimizer can go on from it")
    if (content["ema"] is None) != (state.ema is None):
        raise UserError(f"{path} was saved {'without' if content['ema'] is None else 'with'} averages (train.ema)")


def _restore_rates(content: Content, state: TrainState) -> None:
    """Restore moments and position from the snapshot; rates and weight decay come from this run's settings.

    They equal the saved ones to the last bit unless a setting has changed, such as a larger `train.epochs`. Then the
    rate is the new curve's at once, and not only from the scheduler's next step on.
    """
    optimizer, scheduler = state.optimizer, state.scheduler
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    peaks = list(scheduler.base_lrs)
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    scheduler.base_lrs = peaks
    for group, settings, peak, factor in zip(optimizer.param_groups, own, peaks, scheduler.lr_lambdas, strict=True):
        group.update(settings)
        group["lr"] = peak * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
