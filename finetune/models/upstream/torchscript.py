"""TorchScript archives, the format in which OpenAI published CLIP, read without running them.

`torch.jit.load` runs code of the archive: a `__setstate__` in it can write any file or never end. Here the archive is a
zip that holds data: a pickle of modules, in which every tensor says its storage, offset, size and strides, and one
record of bytes for each storage. The format: torch/csrc/jit/docs/serialization.md in the sources of torch.
"""

import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from finetune.models.upstream.inert_tensors import NotPlainError, TensorMaker, is_plain, read_record
from finetune.system.errors import UserError
from finetune.system.inert_pickle import (
    MAX_TEXT,
    Call,
    Instance,
    Name,
    PickleError,
    check_growth,
    read_pickle,
)

# What zipfile raises for archives that are cut, flipped, encrypted or compressed in an unknown way.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, LookupError)
# Real networks stay far below: a module may stand in several places, so a small file could name more than memory holds.
MAX_MODULES = 100_000
MAX_DEPTH = 100
MAX_NAME = 1_000


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except ZIP_ERRORS:
        return False


def is_openais(path: Path) -> bool:
    """Whether a file is one of OpenAI's archives of CLIP, which keep the size of their images beside the weights.

    All of them use the quick GELU. A TorchScript archive of somebody else says nothing of its activation.
    """
    if not is_torchscript(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return b"input_resolution" in _Archive(archive).pickled()
    except (NotPlainError, *ZIP_ERRORS):
        return False  # its reader says what is wrong with it


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name, as its `state_dict()` gives them, on the CPU.

    No code of the archive runs. A UserError where it is damaged or holds other things than plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_growth(archive, path)
            return _Archive(archive).state_dict()
    except (NotPlainError, PickleError) as error:
        problem = f"{path} is a TorchScript archive whose weights cannot be read without running it ({error})"
        mend = "on a machine where you trust it, load it with torch.jit.load and save its state_dict()"
        raise UserError(f"{problem}; {mend} by safetensors.torch.save_file") from error
    except UserError:
        raise
    except ZIP_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or incomplete ({reason}): fetch it again") from error


class _Archive:
    """The modules of an open archive, and the storages that were read so far."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        """Find the archive's top folder."""
        self.archive = archive
        self.infos = {info.filename: info for info in archive.infolist()}
        constants = min((name for name in self.infos if name.endswith("/constants.pkl")), key=len)
        self.top = constants.removesuffix("constants.pkl")
        self.tensors = TensorMaker(self._record)
        self.fields: dict[str, set[str] | None] = {}
        self.modules = 0

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name."""
        content = self.pickled()
        if self.top + "byteorder" in self.infos and self._text("byteorder") != b"little":
            raise NotPlainError("its bytes stand in the order of another kind of processor")
        root = read_pickle(content)
        if not isinstance(root, Instance):
            raise NotPlainError(f"it holds a {type(root).__name__}, not a module")
        tensors: dict[str, Tensor] = {}
        self._collect(root, "", 0, tensors)
        if not tensors:
            raise NotPlainError("it holds no parameters and no buffers")
        return tensors

    def pickled(self) -> bytes:
        """The pickle of its modules; a NotPlainError where there is none."""
        if self.top + "data.pkl" not in self.infos:
            raise NotPlainError("it has no data.pkl, as archives of torch 1.3 and older")
        return self._text("data.pkl")

    def _text(self, name: str) -> bytes:
        info = self.infos[self.top + name]
        if info.file_size > MAX_TEXT:
            raise NotPlainError(f"{name} has {info.file_size:,} bytes, and at most {MAX_TEXT:,} are read")
        # zipfile unpacks the other methods without a limit.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotPlainError(f"{name} is compressed in a way that torch does not use")
        with self.archive.open(info) as file:
            return file.read(info.file_size)

    def _collect(self, module: Instance, prefix: str, depth: int, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a module and of the modules in it into `tensors`; `prefix` is its name with a dot."""
        self.modules += 1
        if self.modules > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise NotPlainError("its modules are nested without end")
        if not isinstance(module.state, dict):
            raise NotPlainError(f"{module.cls} restores itself by code of its own")
        fields = self._fields_of(module.cls)
        for name, value in module.state.items():
            if isinstance(value, Instance):
                self._collect(value, f"{prefix}{name}.", depth + 1, tensors)
            elif isinstance(value, Call) and (is_plain(value) if fields is None else name in fields):
                tensors[prefix + name] = self.tensors.make(value, prefix + name)

    def _fields_of(self, cls: Name) -> set[str] | None:
        """The names of a class's parameters and buffers; None where the archive does not say them.

        They stand in two lines of its source. The source is searched as text, never run.
        """
        key = str(cls)
        if key not in self.fields:
            path = f"code/{cls.module.replace('.', '/')}.py"
            source = self._text(path).decode() if self.top + path in self.infos else ""
            lines = r"  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]\n"
            found = re.search(rf"^class {re.escape(cls.name)}\(Module\):\n{lines}", source, re.MULTILINE)
            self.fields[key] = set(re.findall(r'"([^"]*)"', found[1] + found[2])) if found else None
        return self.fields[key]

    def _record(self, number: str, dtype: torch.dtype, name: str) -> bytearray:
        """The bytes of a storage."""
        return read_record(self.archive, self.infos[f"{self.top}data/{number}"], name)
