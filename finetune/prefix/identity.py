"""The names of cached activations: they change with everything that the bits of the activations depend on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.config import AugmentConf, ModelConf, as_dict
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.data.caches.made_by import source_digest
from finetune.data.split import Split

# Settings under `model.*` that change no frozen layer except through its weights, which are hashed themselves.
HEAD = ("head", "head_scale", "head_dropout", "head_bias", "templates", "class_names", "drop_path")
NOT_OF_THE_PREFIX = (*HEAD, "pretrained", "pretrained_key", "pool")
# Files and folders of this package that make an image, a view or an activation, or say which slot has which image.
# Upstream's networks and all libraries count by their versions. `tests/prefix/test_identity.py` finds what is missing.
COMPUTING = (
    *("core/layers.py", "core/device.py", "core/preprocess.py", "models/build.py", "models/patches.py"),
    *("models/heads/pooling.py", "models/layering", "models/upstream", "prefix"),
    *("data/caches", "data/images", "data/loading", "data/sources", "data/packed.py", "data/split.py"),
    *("data/selection.py", "data/streams.py"),
)


def prefix_digest(model: LayeredModel, conf: ModelConf, computing: Mapping[str, str]) -> str:
    """Digest of the frozen layers of `model` and of how they are computed, 32 hexadecimal digits.

    `conf` built the model; `computing` holds dtypes, device, batch size and versions, in words.
    """
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    settings = {name: value for name, value in as_dict(conf).items() if name not in NOT_OF_THE_PREFIX}
    shape = {
        "layers": [layer.name for layer in model.layers[: model.boundary]],
        "class_token_only": model.class_token_only and model.boundary > model.num_blocks,
    }
    _add(state, {**settings, **shape, **computing, "source": source_digest(COMPUTING)})
    with torch.no_grad():
        for name, tensor in [*model.net.named_parameters(), *model.net.named_buffers()]:
            if model.layer_ids[name] < model.boundary:
                _add(state, {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)})
                state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def split_digest(
    split: Split, showings: Tensor, preprocess: Preprocess, augment: AugmentConf | None, seed: int, *, skip: bool
) -> str:
    """Digest of a split's images, of their transforms and of their slots in a block, 32 hexadecimal digits.

    `showings` is how often an epoch can show each image, int64 (images,): an image has that many slots in a row.
    `augment` is None in evaluation, which draws no random numbers. `skip` leaves out images that cannot be read;
    without it they must end the run even if a block is there.
    """
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    chance = {"augment": None} if augment is None else {"augment": as_dict(augment), "seed": seed}
    _add(state, {"preprocess": as_dict(preprocess), **chance, "skip": skip})
    state.update(showings.numpy().data)
    state.update(split.content_digest())
    return state.hexdigest()


def _add(state: Any, words: Mapping[str, Any]) -> None:
    state.update(json.dumps(words, sort_keys=True).encode("utf-8", "surrogateescape") + b"\n")
