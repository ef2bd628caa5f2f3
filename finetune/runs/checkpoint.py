"""Save and load: weights for use (`safetensors` with what is needed to predict), and all the state that resume needs.

`last.pt` holds plain types and tensors only and is read with `weights_only=True`, so that a checkpoint cannot run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState
from finetune.core.preprocess import Preprocess
from finetune.system.errors import UserError
from finetune.system.files import write_atomic

FORMAT = 4
READABLE = (3, FORMAT)  # 3 held the tensors of frozen layers, too

# What `copied` copies: a tree of plain types and tensors.
Content = dict[str, Any]


class DamagedError(UserError):
    """A checkpoint that cannot be read, or that is not what was written."""


def weights_metadata(
    classes: Sequence[str], preprocess: Preprocess, model: dict[str, Any], *, is_multilabel: bool
) -> dict[str, str]:
    """What travels inside a weights file, each value JSON.

    `classes`, `preprocess`, `model` (the model's settings), `is_multilabel` (whether an image may have several labels);
    in that case whoever saves adds `threshold`, from which sigmoid on a label is claimed, as validation chose it for
    these very weights.
    """
    return {
        "format": "pt",
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocess": json.dumps(preprocess.as_dict()),
        "model": json.dumps(model),
        "is_multilabel": json.dumps(is_multilabel),
    }


def save_weights(path: Path, model: LayeredModel, metadata: dict[str, str]) -> None:
    """Write the network's tensors, under upstream's own names, and `metadata`; atomic.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """
    write_weights(path, copied_weights(model), metadata)


def copied_weights(model: LayeredModel, shared: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The network's tensors as they are now, in host memory; those of `shared` are taken as they are there."""
    known = shared or {}
    return {
        name: known[name] if name in known else tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.net.state_dict().items()
    }


def frozen_weights(model: LayeredModel) -> dict[str, Tensor]:
    """The tensors of frozen layers, in host memory: no step changes them, so on a CPU they are not even copied."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.net.state_dict().items()
        if _is_frozen(model, name)
    }


def _is_frozen(model: LayeredModel, name: str) -> bool:
    return name in model.layer_ids and model.layer_ids[name] < model.num_frozen


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of `copied_weights` and `metadata`, with the checksum of the tensors in it; atomic.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {**metadata, "sha256": checksum(tensors)}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=whole)  # from where they lie: `save` would copy them twice
        except SafetensorError as error:
            raise _failed(error, path) from error
        temporary.chmod(mode)  # theirs lets nobody but the owner read

    write_atomic(path, write)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def put_weights(tensors: Mapping[str, Tensor], model: LayeredModel, path: Path) -> None:
    """Copy tensors of `read_weights` into the network; every name must match.

    Raises:
        ValueError: They are another network's; names `path`, where they come from.
    """
    try:
        model.net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {type(model.net).__name__}: {str(error).splitlines()[0]}") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file, its checksum compared where it has one.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It cannot be read, or its checksum differs.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if "sha256" in metadata and metadata["sha256"] != checksum(tensors):
        raise DamagedError(f"{path} is damaged: its checksum differs from what was written")
    return tensors, metadata


def random_state() -> dict[str, Tensor]:
    """Torch's own generators, which dropout and drop path draw from."""
    state = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        state[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put the generators back where `random_state` found them; a device that is gone is left out."""
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


COUNTERS = ("epoch", "batch", "step", "skipped", "best_score", "best_epoch", "best_is_ema", "seconds")


def snapshot(state: TrainState, notes: Mapping[str, str] | None = None) -> Content:
    """Everything that training changes, copied to host memory: training may go on at once.

    Tensors of frozen layers are not in it: a run that goes on has read them before, from where the first start did.

    Args:
        state: Between two steps.
        notes: Words that travel along, such as machine and versions; `read_state` gives them back.

    Raises:
        NotFiniteError: A step since the last look was not finite; its ruins are not saved.
    """
    state.guard.look()
    content: Content = {
        "format": FORMAT,
        "model": {n: t for n, t in state.model.net.state_dict().items() if not _is_frozen(state.model, n)},
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "sums": state.sums.state_dict(),
        "random": random_state(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "guard": {"total": state.guard.total},
        "rates": state.rates,
        "counters": {name: getattr(state, name) for name in COUNTERS},
        "notes": dict(notes or {}),
    }
    plain: Content = copied(content)
    return plain


def copied(tree: Any) -> Any:
    """Dicts, lists and tuples anew, tensors cloned to host memory, everything else as it is."""
    if isinstance(tree, Tensor):
        return tree.detach().clone() if tree.device.type == "cpu" else tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree


def save_state(path: Path, state: TrainState) -> None:
    """Write everything that an exact resume needs; atomic.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """
    write_state(path, snapshot(state), checksum(frozen_weights(state.model)))


def write_state(path: Path, content: Content, frozen: str, *, aside: Path | None = None) -> None:
    """Write a snapshot; atomic. torch keeps a CRC-32 of every record, which `read_state` compares.

    Args:
        path: The file to make or replace.
        content: Of `snapshot`.
        frozen: `checksum` of `frozen_weights`.
        aside: Where the file that was at `path` is kept.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """

    def write(temporary: Path) -> None:
        try:
            torch.save({**content, "frozen": frozen}, temporary)
        except RuntimeError as error:
            raise _failed(error, path) from error

    write_atomic(path, write, aside=aside)


def _failed(error: Exception, path: Path) -> OSError:
    """What torch and safetensors make of a full disk, as what it is."""
    return OSError(errno.EIO, f"writing failed: {str(error).splitlines()[0]}", str(path))


def read_state(path: Path) -> Content:
    """A snapshot from a file, every byte of it compared with its checksum.

    Raises:
        DamagedError: The file cannot be read, or is not what was written.
        ValueError: It is no checkpoint of this version.
    """
    check_state(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path} was refused: it holds more than numbers, texts and tensors, and loading such a file can run code"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise DamagedError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") not in READABLE:
        raise UserError(f"{path} is no checkpoint of this version of finetune (format {FORMAT})")
    return content


def check_state(path: Path) -> None:
    """Compare every byte of a state's file with its checksum.

    Raises:
        DamagedError: The file cannot be read, or is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if damaged is not None:
        raise DamagedError(f"{path} is damaged: the checksum of {damaged} differs from what was written")


def load_state(path: Path, state: TrainState) -> None:
    """Continue from `path`: after it, `state` is what it was when it was saved, to the last bit.

    Raises:
        ValueError: The file is damaged, of another format, or of another model or optimizer.
    """
    content = read_state(path)
    restore_frozen(content, state.model, path)
    restore(content, state, str(path))


def _restore_rates(content: Content, state: TrainState) -> None:
    """Moments and position from the file; rates and decay as this run's settings have them.

    They are the saved ones, to the last bit, unless a person changed the settings (`train.epochs` may grow): then the
    rate is the new curve's at this place, at once and not only from the scheduler's next step on.
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


def restore_frozen(content: Content, model: LayeredModel, path: Path) -> None:
    """Give `model`, frozen as it trains, the frozen tensors that a state was saved above; before anybody runs them.

    Mostly it has them already. But what is computed as a model is built, such as a position table for another image
    size, may have other last bits on another processor; then they are taken out of the weights beside the state.

    Args:
        content: Of `read_state`.
        model: Built by the run's settings.
        path: The state's file.

    Raises:
        ValueError: They are nowhere to be found any more.
    """
    own = frozen_weights(model)
    if content["format"] == 3:
        wanted = {name: content["model"][name] for name in own if name in content["model"]}
    elif checksum(own) == content["frozen"]:
        return
    else:
        beside = (path.with_name(name) for name in ("last.safetensors", "best.safetensors"))
        tensors = (read_weights(file)[0] for file in beside if file.exists())
        parts = ({name: each[name] for name in own if name in each} for each in tensors)
        wanted = next((part for part in parts if checksum(part) == content["frozen"]), {})
        if not wanted:
            raise UserError(
                f"{path} was saved above other frozen layers than this model has, and no weights beside it hold them:"
                " model.pretrained gives other weights by now; put the old ones back, or start a new run"
            )
    model.net.load_state_dict(wanted, strict=False)


def restore(content: Content, state: TrainState, path: str) -> None:
    """`load_state` from what `read_state` gave, above frozen layers that `restore_frozen` has put right.

    Args:
        content: Of `read_state`.
        state: Changed in place.
        path: Names it in errors.

    Raises:
        ValueError: It is of another model or optimizer.
    """
    names = [group["name"] for group in state.optimizer.param_groups]
    saved = [group["name"] for group in content["optimizer"]["param_groups"]]
    if names != saved:
        raise UserError(f"{path} has other parameter groups: {', '.join(saved)}; this run has {', '.join(names)}")
    # Checkpoints from before there was a choice are AdamW's.
    makers = [group.get("optimizer", "adamw") for group in content["optimizer"]["param_groups"]]
    if makers != [group["optimizer"] for group in state.optimizer.param_groups]:
        raise UserError(f"{path} was saved with optim={makers[-1]}: its moments mean nothing to another optimizer")
    if (content["ema"] is None) != (state.ema is None):
        raise UserError(f"{path} was saved {'without' if content['ema'] is None else 'with'} averages (train.ema)")
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
    # The scheduler warns where it steps ahead of the optimizer; this one has stepped, in the session before.
    state.optimizer._opt_called = state.step > 0  # type: ignore[attr-defined]
    set_random_state(content["random"])
