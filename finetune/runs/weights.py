"""Weights files (`safetensors`): the network's tensors, the metadata that prediction needs, and a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.system.errors import UserError
from finetune.system.files import json_text, write_atomic
from finetune.system.ours import WHOLE, temporary_folder
from finetune.system.reading import DamagedError
from finetune.system.seals import (
    CHECKSUM_KEY,
    PLACEHOLDER,
    check_checksum,
    checksum_in,
    damaged_if_unreadable,
    put_checksum,
    sort_metadata,
)  # fmt: skip

Tensors = Mapping[str, Tensor]


def weights_metadata(
    classes: Sequence[str], preprocess: Preprocess, model: dict[str, Any], *, is_multilabel: bool
) -> dict[str, str]:
    """The metadata of a weights file, each value JSON; the saver adds `threshold` where images have several labels."""
    return {
        "format": "pt",
        "classes": json_text(list(classes)),
        "preprocess": json.dumps(preprocess.as_dict()),
        "model": json.dumps(model),
        "is_multilabel": json.dumps(is_multilabel),
    }


def is_frozen(model: LayeredModel, name: str) -> bool:
    """Whether the tensor `name` of the network's state dict belongs to a frozen layer."""
    return name in model.layer_ids and model.layer_ids[name] < model.num_frozen


def frozen_weights(model: LayeredModel) -> dict[str, Tensor]:
    """The tensors of frozen layers, in host memory. No step changes them, so those on a CPU are not copied."""
    tensors = model.net.state_dict().items()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors if is_frozen(model, name)}


def copied_to_host(tree: Any, shared: Collection[int] = ()) -> Any:
    """A copy of dicts, lists and tuples with tensors in host memory; copies no tensor at an address in `shared`."""
    if isinstance(tree, Tensor):
        if tree.device.type != "cpu":
            return tree.detach().cpu()
        return tree.detach() if tree.data_ptr() in shared else tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied_to_host(value, shared) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied_to_host(value, shared) for value in tree)
    return tree


def copied_weights(model: LayeredModel, known: Tensors) -> dict[str, Tensor]:
    """The network's tensors in host memory: those of `known` as they are there, the others copied."""
    tensors = model.net.state_dict().items()
    return {name: known[name] if name in known else copied_to_host(tensor) for name, tensor in tensors}


def write_weights(path: Path, tensors: Tensors, metadata: Mapping[str, str], *, is_durable: bool = True) -> str:
    """Write tensors under upstream's own names, metadata, and a checksum of all of it, which is returned.

    See `write_atomic` for `is_durable`.
    """
    from safetensors.torch import save_file

    whole = {**metadata, CHECKSUM_KEY: PLACEHOLDER}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        with temporary_folder(path) as folder:
            made = folder / WHOLE
            save_file(plain, made, metadata=whole)  # `save` would copy the tensors twice
            made.chmod(temporary.stat().st_mode)  # `save_file` lets nobody but the owner read
            sort_metadata(made)
            put_checksum(made)
            os.replace(made, temporary)

    write_whole(path, write, is_durable=is_durable)
    written = checksum_in(path)
    assert written is not None
    return written


def write_whole(path: Path, write: Callable[[Path], object], **kwargs: Any) -> None:
    """`write_atomic`, with an OSError in the place of the errors that torch and safetensors raise on a full disk."""
    from safetensors import SafetensorError

    try:
        write_atomic(path, write, **kwargs)
    except (RuntimeError, SafetensorError) as error:
        # Their texts name a place in a library; the log has them, as the cause.
        why = "the disk takes no more of it, or files may be no larger (`ulimit -f` tells)"
        raise OSError(errno.EIO, f"{path.name} could not be written whole: {why}", str(path)) from error


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(num_bytes, tree.values()))
    return sum(map(num_bytes, tree)) if isinstance(tree, (list, tuple)) else 0


def checksum(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a weights file, without its tensors; a DamagedError where it is no such file."""
    from safetensors import safe_open

    with damaged_if_unreadable(path), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file that was compared with its checksum; other programs' files have none.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: The file cannot be read, or its checksum differs.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    has_checksum = check_checksum(path)
    with damaged_if_unreadable(path), safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if not has_checksum and "classes" in metadata and "sha256" not in metadata:  # which earlier versions wrote
        raise DamagedError.because(path, "its checksum is gone")
    metadata.pop(CHECKSUM_KEY, None)
    return tensors, metadata


# How a safetensors file calls the types that networks have.
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
_TYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}


def misfit_of(paths: Sequence[Path], model: LayeredModel) -> str:
    """What of the tensors in weights files does not fit the network, in a few words; empty where all do.

    The first file holds tensors of the network and no others; those behind it may hold more. Reads names, shapes and
    types only, so that a file of a few bytes is found out before a large network takes memory.
    """
    from safetensors import safe_open

    wanted = {name: (list(tensor.shape), _TYPES[tensor.dtype]) for name, tensor in model.net.state_dict().items()}
    found: dict[str, tuple[list[int], str]] = {}
    for path in reversed(paths):
        with damaged_if_unreadable(path), safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            own = {name: (list(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        found |= own
    differ = [name for name in wanted if found.get(name) != wanted[name]] or sorted(own.keys() - wanted.keys())
    if not differ:
        return ""
    (shape, kind), name = found.get(differ[0], ([], "none")), differ[0]
    expected = wanted.get(name, ([], "none"))
    return f"{name} has shape {shape} and type {kind}, expected {expected[0]} and {expected[1]}"


def fill(model: LayeredModel, paths: Sequence[Path]) -> None:
    """Copy the tensors of weights files, which `misfit_of` found to fit, into the network, one after the other.

    The caller has compared the files with their checksums. Of two files with one name the first counts.

    Raises:
        DamagedError: A file cannot be read.
    """
    from safetensors import safe_open

    missing = model.net.state_dict()
    for path in paths:
        with damaged_if_unreadable(path), safe_open(path, "pt") as file, torch.no_grad():
            for name in missing.keys() & set(file.keys()):
                missing.pop(name).copy_(file.get_tensor(name))


def threshold_of(metadata: Mapping[str, str], path: Path) -> float | None:
    """The threshold in the metadata of the weights file `path`, in [0, 1]; None where images have one label.

    Raises:
        DamagedError: It is no such number.
    """
    if "threshold" not in metadata:
        return None
    try:
        threshold = float(metadata["threshold"])
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise DamagedError.because(path, f"its threshold is {metadata['threshold']!r}, and no number from 0 to 1")
    return threshold


def put_weights(tensors: Tensors, model: LayeredModel, path: Path) -> None:
    """Copy tensors of `read_weights` into the network; every name must match.

    Raises:
        UserError: The tensors are of another network; names `path`, their file.
    """
    try:
        model.net.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {type(model.net).__name__}: {str(error).splitlines()[0]}") from error


def restore_frozen(model: LayeredModel, wanted: str, path: Path) -> None:
    """Give `model` the frozen tensors of the run that saved `path`; call it before anything runs the frozen layers.

    A model built anew mostly has the same ones, with the checksum `wanted`. But a tensor that is computed while a model
    is built, such as a position table for another image size, may have other last bits on another processor. Then the
    tensors come from the weights files beside the checkpoint.

    Raises:
        UserError: No file beside the checkpoint at `path` holds them.
    """
    own, lost = frozen_weights(model), ""
    if checksum(own) == wanted:
        return
    for file in (path.with_name("last.safetensors"), path.with_name("best.safetensors")):
        try:
            tensors = read_weights(file)[0]
        except (FileNotFoundError, DamagedError) as error:
            lost += f" ({error})"
            continue
        found = {name: tensors[name] for name in own if name in tensors}
        if checksum(found) == wanted:
            model.net.load_state_dict(found, strict=False)
            return
    raise UserError(
        f"{path} was saved above other frozen layers than this model has, and no weights beside it hold them{lost}:"
        " model.pretrained gives other weights by now; put the old ones back, or start a new run"
    )
