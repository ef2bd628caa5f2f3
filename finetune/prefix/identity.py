"""The name under which activations are kept: it changes with everything that their bits depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import finetune
from finetune.config import AugmentConf, ModelConf, as_dict
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.data.caches.digest import content_digest
from finetune.data.sources.opening import Split

# Of `model.*`: what the frozen layers do not depend on, beyond their weights, which are counted one by one.
NOT_OF_THE_PREFIX = (
    *("head", "head_scale", "head_dropout", "head_bias", "templates", "class_names", "drop_path"),
    *("pretrained", "pool"),
)


def prefix_digest(model: LayeredModel, conf: ModelConf, computing: Mapping[str, str]) -> str:
    """The frozen layers, and how they are computed. 32 letters and digits.

    Args:
        model: Frozen.
        conf: What it was built by.
        computing: Dtypes, device, batch size, versions: in words.
    """
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    settings = {name: value for name, value in as_dict(conf).items() if name not in NOT_OF_THE_PREFIX}
    shape = {
        "layers": [layer.name for layer in model.layers[: model.boundary]],
        "class_token_only": model.class_token_only and model.boundary > model.num_blocks,
    }
    _add(state, {**settings, **shape, **computing, "source": _source_digest()})
    with torch.no_grad():
        for name, tensor in [*model.net.named_parameters(), *model.net.named_buffers()]:
            if model.layer_ids[name] < model.boundary:
                _add(state, {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)})
                state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def split_digest(
    split: Split, most: Tensor, preprocess: Preprocess, augment: AugmentConf | None, seed: int, *, skip: bool
) -> str:
    """The images of a split, what is done to them, and where each of them lies. 32 letters and digits.

    Args:
        split: The images.
        most: How often an epoch can show each, int64 (n,): so many slots it has, one image's behind another's.
        preprocess: What the model expects.
        augment: In training; None in evaluation, which draws nothing.
        seed: The run's.
        skip: Whether an image that cannot be read is left out; else it ends the run, so no other's block will do.
    """
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    chance = {"augment": None} if augment is None else {"augment": as_dict(augment), "seed": seed}
    _add(state, {"preprocess": as_dict(preprocess), **chance, "skip": skip})
    state.update(most.numpy().data)
    state.update(content_digest(split))
    return state.hexdigest()


def _add(state: Any, words: Mapping[str, Any]) -> None:
    state.update(json.dumps(words, sort_keys=True).encode("utf-8", "surrogateescape") + b"\n")


@cache
def _source_digest() -> str:
    """Our own code, byte for byte: a change of it makes other activations. Versions are among `computing`'s words."""
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    root = Path(finetune.__file__).parent
    for path in sorted(root.rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
