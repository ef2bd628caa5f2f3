"""TorchScript archives, the format in which OpenAI published CLIP, read without running them.

`torch.jit.load` runs code of the archive: a `__setstate__` in it can write any file or never end. Here the archive is a
zip that holds data: a pickle of modules, in which every tensor says its storage, offset, size and strides, and one
record of bytes for each storage. The format: torch/csrc/jit/docs/serialization.md in the sources of torch.
"""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from finetune.system.errors import UserError
from finetune.system.inert_pickle import (
    MAX_TEXT,
    Call,
    Instance,
    Name,
    PickleError,
    Reference,
    check_growth,
    read_pickle,
)

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What zipfile raises for archives that are cut, flipped, encrypted or compressed in an unknown way.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, LookupError)
# Real networks stay far below: a module may stand in several places, so a small file could name more than memory holds.
MAX_MODULES = 100_000
MAX_DEPTH = 100
MAX_NAME = 1_000
MAX_DIMS = 8


class _NotPlainError(ValueError):
    """The archive is whole, but its weights are no plain tensors."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except ZIP_ERRORS:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name, as its `state_dict()` gives them, on the CPU.

    No code of the archive runs. A UserError where it is damaged or holds other things than plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_growth(archive, path)
            return _Archive(archive).state_dict()
    except (_NotPlainError, PickleError) as error:
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
        self.storages: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.fields: dict[str, set[str] | None] = {}
        self.modules = 0

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name."""
        if self.top + "data.pkl" not in self.infos:
            raise _NotPlainError("it has no data.pkl, as archives of torch 1.3 and older")
        if self.top + "byteorder" in self.infos and self._text("byteorder") != b"little":
            raise _NotPlainError("its bytes stand in the order of another kind of processor")
        root = read_pickle(self._text("data.pkl"))
        if not isinstance(root, Instance):
            raise _NotPlainError(f"it holds a {type(root).__name__}, not a module")
        tensors: dict[str, Tensor] = {}
        self._collect(root, "", 0, tensors)
        if not tensors:
            raise _NotPlainError("it holds no parameters and no buffers")
        return tensors

    def _text(self, name: str) -> bytes:
        info = self.infos[self.top + name]
        if info.file_size > MAX_TEXT:
            raise _NotPlainError(f"{name} has {info.file_size:,} bytes, and at most {MAX_TEXT:,} are read")
        # zipfile unpacks the other methods without a limit.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _NotPlainError(f"{name} is compressed in a way that torch does not use")
        with self.archive.open(info) as file:
            return file.read(info.file_size)

    def _collect(self, module: Instance, prefix: str, depth: int, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a module and of the modules in it into `tensors`; `prefix` is its name with a dot."""
        self.modules += 1
        if self.modules > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise _NotPlainError("its modules are nested without end")
        if not isinstance(module.state, dict):
            raise _NotPlainError(f"{module.cls} restores itself by code of its own")
        fields = self._fields_of(module.cls)
        for name, value in module.state.items():
            if isinstance(value, Instance):
                self._collect(value, f"{prefix}{name}.", depth + 1, tensors)
            elif isinstance(value, Call) and (_is_tensor(value) if fields is None else name in fields):
                tensors[prefix + name] = self._tensor(value, prefix + name)

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

    def _tensor(self, call: Call, name: str) -> Tensor:
        """The tensor that a pickle describes; its place is checked against the bytes of its storage first."""
        if not _is_tensor(call):
            raise _NotPlainError(f"{name} is made by {call.function}")
        if len(call.args) < 4:
            raise _NotPlainError(f"{name} has no size")
        source, offset, size, stride = call.args[:4]
        dtype, storage = self._storage(source, name)
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMS):
            raise _NotPlainError(f"{name} has no size")
        if not all(type(number) is int and 0 <= number < 2**48 for number in (offset, *size, *stride)):
            raise _NotPlainError(f"the size of {name} is no row of numbers")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        if last >= len(storage) or math.prod(size) > len(storage):
            raise _NotPlainError(f"{name} reaches past the end of its storage")
        return storage.as_strided(size, stride, offset)

    def _storage(self, source: object, name: str) -> tuple[torch.dtype, Tensor]:
        """A storage as a flat tensor, read once."""
        key = source.key if isinstance(source, Reference) else None
        if not (isinstance(key, tuple) and len(key) == 5 and isinstance(key[1], Name) and isinstance(key[2], str)):
            raise _NotPlainError(f"{name} has no storage")
        kind, number = key[1], key[2]
        dtype = DTYPES.get(kind.name) if kind.module == "torch" else None
        if dtype is None:
            raise _NotPlainError(f"{name} is kept in {kind}, which is no type of weights")
        if number not in self.storages:
            info = self.infos[f"{self.top}data/{number}"]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size:
                raise _NotPlainError(f"{name} is compressed")
            content = bytearray(self.archive.read(info))
            whole = len(content) - len(content) % dtype.itemsize
            flat = torch.frombuffer(content, dtype=dtype, count=whole // dtype.itemsize) if whole else torch.empty(0)
            self.storages[number] = dtype, flat
        if self.storages[number][0] != dtype:
            raise _NotPlainError(f"{name} reads numbers of one type as another")
        return self.storages[number]


def _is_tensor(call: Call) -> bool:
    return (call.function.module, call.function.name) == ("torch._utils", "_rebuild_tensor_v2")
