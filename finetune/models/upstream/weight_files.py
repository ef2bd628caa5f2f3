"""Read files of weights: every common format, and none of them by running code.

A pickle can run any program. Files that end with `.pt`, `.pth` and `.bin` are therefore read with `weights_only=True`,
and a file that needs more than that is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.preprocess import Preprocess
from finetune.system.errors import UserError

StateDict = dict[str, Tensor]

# The keys under which training programs store the weights, best first. timm, too, prefers the average of the weights
# over training (EMA).
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module", "teacher")
# Prefixes that wrappers (DDP, torch.compile) and Lightning add to names.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# Numbers that OpenAI's archives store beside the weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# The exceptions that torch's reader raises on damaged files.
UNREADABLE = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    struct.error,
)
# An error lists at most this many names of each kind.
NAMES_SHOWN = 5


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a weights file by name: `.safetensors`, `.pt`, `.pth`, `.bin` or TorchScript.

    Finds the weights inside a training program's checkpoint and removes the prefixes of wrappers. Half-precision
    tensors become float32.

    Raises:
        FileNotFoundError: No such file.
        UserError: The file is damaged, holds no weights, or is a pickle that would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"model.pretrained={path}: no such file; expected .safetensors, .pt, .pth, .bin or .npz"
        )
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` where it came from"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page, not weights: the download gave an error page; fetch it again")
    if path.suffix == ".safetensors" and start.startswith((b"PK", b"\x80\x02")):
        raise UserError(f"{path} was written by torch.save, whatever its name says: rename it to end with .pt")
    # A safetensors file starts with eight bytes, the length of its JSON header, and then that header.
    if path.suffix != ".safetensors" and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        raise UserError(f"{path} is a safetensors file, whatever its name says: rename it to end with .safetensors")
    if path.suffix == ".safetensors":
        return _clean(_read_safetensors(path), path)
    if start and not start.startswith((b"PK", b"\x80")):
        raise UserError(
            f"{path} is no weights file: expected what torch.save or safetensors wrote; it may be a damaged download"
        )
    return _clean(_read_torchscript(path) if is_torchscript(path) else _read_pickle(path), path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): fetch it again") from error


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the format in which OpenAI published CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> Mapping[str, Any]:
    """The tensors of a TorchScript archive; the code in it is never called."""
    try:
        load: Any = torch.jit.load
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, but OpenAI's archives remain
            tensors = load(str(path), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged or incomplete ({_first_line(error)}): fetch it again") from error
    return {name: tensor for name, tensor in tensors.items() if name not in OPENAI_EXTRAS}


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise UserError(f"{path} is damaged, or no weights file that torch can read: fetch it again") from error
        raise UserError(
            f"{path} is refused: it is a pickle that would run {wanted[1]} on loading, and such a file can run any"
            " program; save its tensors alone (safetensors.torch.save_file), on a machine where you trust it"
        ) from error
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged or incomplete ({_first_line(error)}): fetch it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors by name")
    return content


def _harmless() -> list[Any]:
    """Classes that training programs save beside the weights and that run no code: a command line, NumPy numbers."""
    import numpy as np

    make_scalar = np.float64(0).__reduce__()[0]  # NumPy 2 moved this function to another module
    homes = [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "b1")]
    return [argparse.Namespace, np.dtype, *kinds, *homes]


def _clean(content: Mapping[str, Any], path: Path) -> StateDict:
    """The weights inside a file's content, without the prefixes of wrappers, in single precision."""
    for key in NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _clean(inner, path)
    # Position embeddings are resized later, which a CPU can do in single precision only.
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        keys = ", ".join(str(key) for key in list(content)[:NAMES_SHOWN]) or "nothing"
        raise UserError(f"{path} holds no weights: expected tensors by name, found {keys}")
    while found := [prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(found[0]): value for name, value in tensors.items()}
    return tensors


def check_npz(path: Path) -> None:
    """Check that NumPy can open a `.npz` file, without reading pickled arrays.

    Raises:
        UserError: The file is damaged, or not an archive of arrays.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or incomplete ({_first_line(error)}): fetch it again") from error
    if not names:
        raise UserError(f"{path} holds no arrays")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Iterable[str] = ()) -> None:
    """Copy the tensors in `state` into `model`, whose names and shapes must be the same.

    Args:
        model: Changed in place.
        state: Tensors by name.
        source: The path or tag of the weights, for the error.
        optional: Prefixes of names (the classifier's) that may be missing, left over or of another shape.

    Raises:
        UserError: Names that are missing, left over, or of another shape; the error lists them.
    """
    mine = model.state_dict()
    free = tuple(optional)

    def strict(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if not (free and name.startswith(free)))

    missing, unexpected = strict(mine.keys() - state.keys()), strict(state.keys() - mine.keys())
    both = mine.keys() & state.keys()
    fitting = {name for name in both if state[name].shape == mine[name].shape}
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(mine[name].shape)}" for name in strict(both - fitting)]
    faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    listed = [f"{len(names)} {word}: {_shown(names)}" for word, names in faults if names]
    if listed:
        raise UserError(
            f"{source} holds the weights of another model than {type(model).__name__} built here ({'; '.join(listed)});"
            " check model.name"
        )
    model.load_state_dict({name: state[name] for name in fitting}, strict=False)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def misfit_of(error: BaseException) -> str:
    """The error of torch's `load_state_dict` in one line: the names that are missing, unexpected or misshapen."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    shapes = [line.rstrip(".") for line in lines if line.startswith("size mismatch for ")]
    found = []
    for line in lines:
        names = re.findall(r'"([^"]+)"', line)
        if names and line.startswith(("Missing key", "Unexpected key")):
            found.append(f"{len(names)} {line.partition(' ')[0].lower()}: {_shown(names)}")
    if shapes:
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        found.append(f"{len(shapes)} of another shape: {shapes[0].removeprefix('size mismatch for ')}{more}")
    return "; ".join(found) or " ".join(lines) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_path(text: str) -> bool:
    """Whether the text of `model.pretrained` is the path of a file, and not a tag."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy", ".tar", ".ckpt")
    return os.sep in text or text.startswith("~") or text.endswith(suffixes) or Path(text).is_file()


def path_of(text: str) -> Path:
    """The file that `model.pretrained` names.

    Raises:
        FileNotFoundError: No such file.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.pretrained={text}: no such file")
    return path


@dataclass(frozen=True)
class SavedWeights:
    """The metadata in a weights file that finetune wrote; empty for other files.

    Attributes:
        preprocess: How the model expects its images.
        classes: Class names in the order of the logits.
    """

    preprocess: Preprocess | None = None
    classes: list[str] | None = None


def read_metadata(path: Path | None) -> SavedWeights:
    """The metadata of a weights file; empty for None and for files that another program wrote."""
    if path is None or path.suffix != ".safetensors":
        return SavedWeights()
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        texts = file.metadata() or {}
    classes, values = (json.loads(texts[key]) if key in texts else None for key in ("classes", "preprocess"))
    preprocess = None
    if values is not None:
        preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    return SavedWeights(preprocess, classes)
