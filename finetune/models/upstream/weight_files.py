"""Read files of weights: every common format, and none of them by running code.

A pickle can run any program. Files that end with `.pt`, `.pth` and `.bin` are therefore read with `weights_only=True`,
and one that needs more than that as data: see `inert_checkpoint.py`. TorchScript archives hold programs too: see
`torchscript.py`.
"""

import argparse
import contextlib
import logging
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.preprocess import Preprocess
from finetune.models.upstream.class_names import KEYS, Named, names_in
from finetune.models.upstream.inert_checkpoint import read_checkpoint
from finetune.models.upstream.inert_tensors import NotPlainError
from finetune.models.upstream.layouts import COUNTER, StateDict, shown, walk
from finetune.models.upstream.torchscript import is_torchscript, read_torchscript
from finetune.models.upstream.transformers_config import Network
from finetune.models.upstream.weight_folders import INDEX, check_shard, shards_of, weights_in
from finetune.system.errors import UserError
from finetune.system.inert_pickle import MAX_GROWTH, MAX_TEXT, PickleError, check_growth, check_pickles
from finetune.system.reading import DamagedError, UnfitError, parse_json
from finetune.system.seals import check_checksum, damaged_if_unreadable
from finetune.system.terminal import counted, printable

logger = logging.getLogger("finetune")
MEND_METADATA = "fetch it again, or save its tensors alone, without metadata, if another program wrote it"

# The exceptions that torch's reader raises on damaged files.
UNREADABLE = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds."""

    tensors: StateDict
    named: Named = field(default_factory=dict)  # names of classes, where a training program has put them into the file


def read_weights(path: Path) -> Weights:
    """All tensors of a weights file by name, and the names of classes that stand beside them.

    The file is `.safetensors`, `.pt`, `.pth`, `.bin`, TorchScript or an index of shards.

    Where a training program nested dictionaries, a name has their keys in front: `teacher.backbone.cls_token`; see
    `candidates.py` for the search in these names. Half-precision tensors become float32. A UserError where the file is
    damaged or holds no weights; a FileNotFoundError where there is none. The names of a safetensors file are in its
    metadata: `read_metadata` reads them.
    """
    path = path_of(str(path))
    if path.name.endswith(INDEX):
        held, tensors = shards_of(path), StateDict()
        for name in held:
            shard = read_state_dict(path.parent / name)
            check_shard(path, held, name, shard)
            tensors |= shard
        return Weights(tensors)
    with path.open("rb") as file:
        start = file.read(64)
    claims_safetensors = path.suffix == ".safetensors"
    # A safetensors file starts with eight bytes, the length of its JSON header, and then that header.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32
    problem = ""
    if start.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not the weights themselves: run `git lfs pull` where it came from"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        problem = "is a web page, not weights: the download gave an error page; fetch it again"
    elif claims_safetensors and not is_safetensors and start.startswith((b"PK", b"\x80\x02")):
        problem = "was written by torch.save, whatever its name says: rename it to end with .pt"
    elif is_safetensors and not claims_safetensors:
        problem = "is a safetensors file, whatever its name says: rename it to end with .safetensors"
    elif start and not claims_safetensors and not start.startswith((b"PK", b"\x80")):
        problem = "is no weights file: expected what torch.save or safetensors wrote; it may be a damaged download"
    if problem:
        raise UserError(f"{path} {problem}")
    if claims_safetensors:
        return Weights(_clean(_read_safetensors(path), path))
    if is_torchscript(path):
        extras = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI stores beside the weights
        content = read_torchscript(path)
        return Weights(_clean({name: tensor for name, tensor in content.items() if name not in extras}, path))
    checkpoint = _read_pickle(path)
    return Weights(_clean(checkpoint, path), names_in(checkpoint, str(path)))


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a weights file by name; see `read_weights`."""
    return read_weights(path).tensors


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    check_checksum(path)
    try:
        with damaged_if_unreadable(path):
            return load_file(path)
    except DamagedError as error:
        raise _damaged(path, error.__cause__ or error) from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        try:
            check_pickles(path)
            with torch.serialization.safe_globals(_harmless()):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (PickleError, pickle.UnpicklingError):  # it holds objects of other classes, or is damaged
            content = read_checkpoint(path)
    except UserError:
        raise
    except NotPlainError as error:
        mend = "save its tensors alone (safetensors.torch.save_file), where it comes from"
        raise UserError(f"{path} is refused: {error}; {mend}") from error
    except PickleError as error:
        problem = f"{path} is damaged or incomplete, or made to do harm"
        raise UserError(f"{problem} ({error}): fetch it again, from where you trust it") from error
    except (*UNREADABLE, struct.error, zipfile.BadZipFile, zlib.error, RecursionError, MemoryError) as error:
        raise _damaged(path, error) from error
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


def _clean(content: Mapping[Any, Any], path: Path) -> StateDict:
    """All tensors in a file's content, by their names with the keys of the dictionaries around them, in float32."""
    tensors: StateDict = {}

    def take(name: str, key: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        if name in tensors:
            raise UserError(f"{path} is refused: two of its tensors are called {shown([name])}")
        tensors[name] = value
        return True

    walk(content, take)
    if not tensors:
        keys = [key if isinstance(key, str) else f"a {type(key).__name__}" for key in content]
        raise UserError(f"{path} holds no weights: expected tensors by name, found {shown(keys)}")
    _check_plain(tensors, path)
    _tell_kinds(tensors, path)
    return {name: _single(name, value, path) for name, value in tensors.items()}


def _tell_kinds(tensors: StateDict, path: Path) -> None:
    """Say of which numbers single precision makes others, and which are coarse; it holds half precision as it is."""
    kinds = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    for kind, number in kinds.items():
        word, what = str(kind).removeprefix("torch."), f"{counted(number, 'tensor')} of {printable(str(path))}"
        if kind.itemsize == 1:
            logger.warning("%s have 8 bits a number (%s) and no scales: they are taken as they are", what, word)
        elif kind == torch.float64:
            logger.info("%s are in double precision (%s), and are rounded to single", what, word)


def _single(name: str, value: Tensor, path: Path) -> Tensor:
    """Real numbers in single precision, since a CPU can resize position embeddings in no other; others as they are."""
    try:
        return value.float() if value.is_floating_point() else value
    except (NotImplementedError, RuntimeError) as error:  # such as two numbers of 4 bits in a byte
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(
            f"{path} is refused: {shown([name])} holds {kind}, which are no weights by themselves"
        ) from error


def _check_plain(tensors: StateDict, path: Path) -> None:
    """Raise a UserError for tensors that are no plain numbers, or that take far more memory than the file has bytes."""
    for name, value in tensors.items():
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_nested
        if not is_plain or value.is_quantized or value.device.type != "cpu":
            kind = (
                "quantized" if value.is_quantized else f"of the kind {value.layout}, {value.dtype}, {value.device.type}"
            )
            problem = f"{path} is refused: {shown([name])} is no plain tensor ({kind})"
            raise UserError(f"{problem}; save its tensors dense and unquantized (safetensors.torch.save_file)")
    # One storage may stand behind many names, and one number behind a whole tensor.
    wanted, held = sum(value.numel() * 4 for value in tensors.values()), path.stat().st_size
    if wanted > MAX_GROWTH * held + MAX_TEXT:
        raise UserError(
            f"{path} is refused: its {held:,} bytes claim to be weights of {wanted:,}, which no such file does"
        )


def check_npz(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a `.npz` file by name; only their headers are read.

    Raises:
        UserError: The file is damaged or holds no plain arrays.
    """
    from numpy.lib import format as npy

    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            check_growth(archive, path)
            for info in archive.infolist():
                with archive.open(info) as file:
                    shape, _, dtype = headers[npy.read_magic(file)](file)
                    size = math.prod(shape) * dtype.itemsize
                    if dtype.hasobject or file.tell() + size != info.file_size:
                        raise ValueError(f"{info.filename} is no whole array of numbers")
                    shapes[info.filename.removesuffix(".npy")] = shape
    except UserError:
        raise
    except (*UNREADABLE, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    if not shapes:
        raise UserError(f"{path} holds no arrays")
    return shapes


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: tuple[str, ...] = ()) -> None:
    """Copy the tensors in `state` into `net`; a UserError lists names that are missing, left over or misshapen.

    `source` is the path or tag of the weights, for the error. Names that begin with a prefix of `optional` (the
    classifier's) may be missing, left over or of another shape.
    """
    mine = net.state_dict()

    def strict(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if not name.startswith(optional) and not name.endswith(COUNTER))

    missing, unexpected = strict(mine.keys() - state.keys()), strict(state.keys() - mine.keys())
    both = mine.keys() & state.keys()
    fitting = {name for name in both if state[name].shape == mine[name].shape}
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(mine[name].shape)}" for name in strict(both - fitting)]
    faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    listed = [f"{len(names)} {word}: {shown(names)}" for word, names in faults if names]
    if listed:
        problem = f"holds the weights of another model than {type(net).__name__} built here"
        raise UserError(f"{source} {problem} ({'; '.join(listed)}); check model.name")
    net.load_state_dict({name: state[name] for name in fitting}, strict=False)


@contextlib.contextmanager
def fitting(source: object, name: str) -> Iterator[None]:
    """Turn whatever a library raises while it puts the weights `source` into the model `name` into a UserError.

    Errors of the disk and a lack of memory stay as they are.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        # On tensors that it did not expect a library raises nearly anything, from a bare KeyError to struct.error.
        raise UserError(f"{source} does not fit model.name={name}: {misfit_of(error)}") from error


def check_finite(net: nn.Module, source: object) -> None:
    """Raise a UserError where a parameter that the weights `source` gave is NaN or infinite: no training mends that."""
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            least, most = parameter.detach().aminmax()  # one pass without a copy, which a large model would feel
            if not (least.isfinite() and most.isfinite()):
                bad = parameter.numel() - int(parameter.isfinite().sum())
                problem = f"{bad:,} of the {parameter.numel():,} numbers of {shown([name])} are NaN or infinite"
                raise UserError(f"{source}: {problem}; the file is damaged, or its training diverged: use another")


def misfit_of(error: BaseException) -> str:
    """The error of torch's `load_state_dict` in one line: the names that are missing, unexpected or misshapen."""
    found = []
    for word in ("missing", "unexpected"):
        if line := re.search(rf"{word} key\(s\).*", str(error), re.IGNORECASE):
            names = re.findall(r'"([^"]+)"', line[0])
            found.append(f"{len(names)} {word}: {shown(names)}")
    if shapes := re.findall(r"size mismatch for (.+?)\.?$", str(error), re.MULTILINE):
        found.append(f"{len(shapes)} of another shape: {shown(shapes, at_most=1)}")
    return "; ".join(found) or " ".join(str(error).split()) or type(error).__name__


def _damaged(path: Path, error: BaseException) -> UserError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged or incomplete ({first_line}): fetch it again")


def is_path(text: str) -> bool:
    """Whether the text of `model.pretrained` is the path of a file or folder, and not a tag."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy", ".tar", ".ckpt", INDEX)
    is_there = text not in ("bundled", "none") and Path(text).exists()
    return os.sep in text or text.startswith("~") or text.endswith(suffixes) or is_there


def path_of(text: str) -> Path:
    """The file that `model.pretrained` names, or that lies in the folder that it names; see `weights_in`.

    A FileNotFoundError where there is none.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return weights_in(path)
    if not path.is_file():
        formats = "a folder, .safetensors, .pt, .pth, .bin or .npz"
        raise FileNotFoundError(f"model.pretrained={text}: no such file; expected {formats}")
    return path


@dataclass(frozen=True)
class SavedWeights:
    """The metadata in a weights file that finetune wrote; empty for other files."""

    preprocess: Preprocess | None = None  # how the model expects its images
    named: Named = field(default_factory=dict)  # class names in the order of the logits
    changes: Network = Network()  # where the network differs from the library's


def read_metadata(path: Path | None) -> SavedWeights:
    """The metadata of a weights file; empty for None and for files that another program wrote."""
    if path is None or path.suffix != ".safetensors":
        return SavedWeights()
    from safetensors import safe_open

    check_checksum(path)
    with damaged_if_unreadable(path), safe_open(path, framework="pt") as file:
        texts = file.metadata() or {}
    kinds = {"classes": list[str] | None, "preprocess": Preprocess | None, "changes": Network | None}
    found: dict[str, Any] = {}
    for key, kind in kinds.items():
        try:
            found[key] = parse_json(texts.get(key, "null").encode(), kind)  # type: ignore[arg-type]
        except UnfitError as error:
            raise DamagedError.because(path, f"its metadata {key!r}: {error}", MEND_METADATA) from error
    classes = found["classes"] and {f"{path}: classes": found["classes"]}
    return SavedWeights(found["preprocess"], classes or _names_in_metadata(texts, path), found["changes"] or Network())


def _names_in_metadata(texts: Mapping[str, str], path: Path) -> Named:
    """The names of classes that another program has put into the metadata."""
    values: dict[str, Any] = {}
    for key in filter(KEYS.search, texts):
        with contextlib.suppress(UnfitError):  # metadata are texts of any kind
            values[key] = parse_json(texts[key].encode(), list[str] | dict[str, int | str])  # type: ignore[arg-type]
    return names_in(values, str(path))
