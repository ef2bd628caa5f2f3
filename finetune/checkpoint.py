"""Save and load: weights for use (`safetensors` with what is needed to predict), and all the state that resume needs.

`last.pt` holds plain types and tensors only and is read with `weights_only=True`, so that a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.files import write_atomic
from finetune.layers import LayeredModel
from finetune.loop import TrainState
from finetune.preprocess import Preprocess

FORMAT = 2


def weights_metadata(classes: Sequence[str], preprocess: Preprocess, model: dict[str, Any]) -> dict[str, str]:
    """What travels inside a weights file, each value JSON: `classes`, `preprocess`, `model` (the model's settings)."""
    return {
        "format": "pt",
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "preprocess": json.dumps(preprocess.as_dict()),
        "model": json.dumps(model),
    }


def save_weights(path: Path, model: LayeredModel, metadata: dict[str, str]) -> None:
    """Write the network's tensors, under upstream's own names, and `metadata`; atomic.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.net.state_dict().items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_weights(path: Path, model: LayeredModel) -> None:
    """Read `path` into the network; every name must match.

    Raises:
        ValueError: The file is damaged, or holds another network's tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        model.net.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit {type(model.net).__name__}: {str(error).splitlines()[0]}") from error


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


def save_state(path: Path, state: TrainState) -> None:
    """Write everything that an exact resume needs; atomic.

    Raises:
        OSError: The disk is full; an older file at `path` is untouched.
    """
    content = {
        "format": FORMAT,
        "model": state.model.net.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "sums": state.sums.state_dict(),
        "random": random_state(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "rates": state.rates,
        "counters": {name: getattr(state, name) for name in COUNTERS},
    }
    write_atomic(path, lambda temporary: torch.save(content, temporary))


COUNTERS = ("epoch", "batch", "step", "skipped", "best_score", "best_epoch", "best_is_ema", "seconds")


def load_state(path: Path, state: TrainState) -> None:
    """Continue from `path`: after it, `state` is what it was when it was saved, to the last bit.

    Raises:
        ValueError: The file is damaged, of another format, or of another model or optimizer.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content["format"] != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of finetune (format {FORMAT})")
    names = [group["name"] for group in state.optimizer.param_groups]
    saved = [group["name"] for group in content["optimizer"]["param_groups"]]
    if names != saved:
        raise ValueError(f"{path} has other parameter groups: {', '.join(saved)}; this run has {', '.join(names)}")
    state.model.net.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    state.scaler.load_state_dict(content["scaler"])
    state.sums.load_state_dict(content["sums"])
    if (content["ema"] is None) != (state.ema is None):
        raise ValueError(f"{path} was saved {'without' if content['ema'] is None else 'with'} averages (train.ema)")
    if state.ema is not None:
        state.ema.load_state_dict(content["ema"])
    state.rates = content["rates"]
    for name in COUNTERS:
        setattr(state, name, content["counters"][name])
    # The scheduler warns where it steps ahead of the optimizer; this one has stepped, in the session before.
    state.optimizer._opt_called = state.step > 0  # type: ignore[attr-defined]
    set_random_state(content["random"])
