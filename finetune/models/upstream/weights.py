"""Weights from where people keep them: files of every kind, read without running code; hubs, with or without a network.

A pickle can run any program, so `.pt`, `.pth` and `.bin` files are read with `weights_only=True`, and a file that needs
more is refused.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import socket
import struct
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from finetune.system.errors import UserError

StateDict = dict[str, Tensor]

# Where training programs put the weights among other things, best first: an average of the weights over training
# (EMA) is what timm loads too.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module", "teacher")
# Prefixes that wrappers (DDP, torch.compile) and Lightning leave on names.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# Numbers that OpenAI's archives hold beside the weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Long enough for a slow link, short enough that a machine without a network answers at once.
CONNECT_TIMEOUT_S = 3.0
# What torch's reader raises on bytes that are not what they seem.
UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
# How many names an error lists of each kind.
NAMES_SHOWN = 5


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a weights file by name, whatever wrapped them: `.safetensors`, `.pt`, `.pth`, `.bin`, TorchScript.

    Half-precision tensors come back as float32.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, holds no weights, or is a pickle that wants to run code.
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
    # Its first eight bytes are the length of a JSON header, which follows.
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
    """Whether a file is a TorchScript archive, as OpenAI published CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> Mapping[str, Any]:
    """OpenAI published CLIP as TorchScript archives; their code is never called, only their tensors are taken."""
    try:
        load: Any = torch.jit.load
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but the archives are out there
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
    """What training programs save beside the weights, and what runs nothing: a command line, NumPy numbers."""
    import numpy as np

    make_scalar = np.float64(0).__reduce__()[0]  # a function whose home moved in NumPy 2
    homes = [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "b1")]
    return [argparse.Namespace, np.dtype, *kinds, *homes]


def _clean(content: Mapping[str, Any], path: Path) -> StateDict:
    """Unwrap what training programs put around the weights, and drop the prefixes of wrappers."""
    for key in NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _clean(inner, path)
    # Resizing of position embeddings, ahead, needs single precision on a CPU.
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        keys = ", ".join(str(key) for key in list(content)[:NAMES_SHOWN]) or "nothing"
        raise UserError(f"{path} holds no weights: expected tensors by name, found {keys}")
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
                stripped = True
    return tensors


def check_npz(path: Path) -> None:
    """Refuse a `.npz` file that NumPy cannot open; pickled arrays in it are never read.

    Raises:
        ValueError: It is damaged, or no archive of arrays.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or incomplete ({_first_line(error)}): fetch it again") from error
    if not names:
        raise UserError(f"{path} holds no arrays")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Iterable[str] = ()) -> None:
    """Copy `state` into `model`; every name and shape must match, but for names under `optional`.

    Args:
        model: Takes the tensors.
        state: Tensors by name.
        source: What to call the weights in an error: a path, a tag.
        optional: Prefixes of names that may be missing or left over: the classifier's.

    Raises:
        ValueError: Names that are missing, left over, or of another shape; lists them.
    """
    mine = model.state_dict()
    free = tuple(optional)

    def strict(names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if not (free and name.startswith(free)))

    missing, unexpected = strict(mine.keys() - state.keys()), strict(state.keys() - mine.keys())
    both = mine.keys() & state.keys()
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(mine[name].shape)}"
        for name in strict(both)
        if state[name].shape != mine[name].shape
    ]
    faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    listed = [f"{len(names)} {word}: {_shown(names)}" for word, names in faults if names]
    if listed:
        raise UserError(
            f"{source} holds the weights of another model than {type(model).__name__} built here ({'; '.join(listed)});"
            " check model.name"
        )
    model.load_state_dict({name: state[name] for name in both if state[name].shape == mine[name].shape}, strict=False)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def misfit_of(error: BaseException) -> str:
    """What torch's `load_state_dict` lists over hundreds of lines, in one: how many names of each kind."""
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


@contextmanager
def quiet_upstream() -> Iterator[None]:
    """Hold back upstream's chatter on the root logger, whose first use would also install a handler there."""
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)


@contextmanager
def downloads(what: str, *, url: str | None = None) -> Iterator[None]:
    """Around anything that may fetch files: without a network only the caches are asked, and a failure is explained.

    Hub clients retry for a minute before they look into their own cache; one quick attempt to reach the hub decides
    whether that is worth it.

    Args:
        what: What is being looked for, for the error: `weights 'openai' of ViT-B-16`.
        url: Where torch hub would fetch the file; None for the Hugging Face hub.

    Raises:
        FileNotFoundError: It is neither in the cache nor to be fetched.
    """
    from huggingface_hub import constants

    before, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    offline = before and url is None
    host = url or constants.ENDPOINT
    reachable = not offline and _reachable(host)
    if url is not None and not reachable and not _in_torch_hub(url):
        # torch hub would announce a download that cannot happen.
        raise FileNotFoundError(_not_found(what, OSError(), host=host, reachable=False, offline=False))
    constants.HF_HUB_OFFLINE = before if url is not None else not reachable
    socket.setdefaulttimeout(10 * CONNECT_TIMEOUT_S)  # plain URLs (torch hub, timm) have no timeout of their own
    try:
        with quiet_upstream():
            yield
    # Hub and URL errors are OSErrors.
    except OSError as error:
        raise FileNotFoundError(_not_found(what, error, host=host, reachable=reachable, offline=offline)) from error
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(timeout)


def _reachable(url: str) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, can be made."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _in_torch_hub(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).is_file()


def _not_found(what: str, error: OSError, *, host: str, reachable: bool, offline: bool) -> str:
    from huggingface_hub import constants

    if reachable:
        why = f"the download failed ({_first_line(error)})"
    else:
        why = "HF_HUB_OFFLINE is set" if offline else f"{urlsplit(host).hostname} cannot be reached from here"
    return (
        f"{what}: not in the cache, and {why}. Looked in {constants.HF_HUB_CACHE} (HF_HOME) and {torch.hub.get_dir()}"
        " (TORCH_HOME). Three ways: run once where there is a network; copy that cache folder from such a machine"
        " and set HF_HOME to it; or give a file, model.pretrained=PATH"
    )


def is_path(text: str) -> bool:
    """Whether `model.pretrained` reads as a file rather than a tag."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy", ".tar", ".ckpt")
    return os.sep in text or text.startswith("~") or text.endswith(suffixes) or Path(text).is_file()
