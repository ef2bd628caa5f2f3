"""Tensors out of an inert pickle: each says its storage, offset, size and strides, and a storage is a row of bytes."""

import math
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.system.inert_pickle import Call, Name, Reference

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
MAX_DIMS = 8
PLAIN = "torch._utils._rebuild_tensor_v2"
# Calls around that of a tensor, which says its numbers in the first argument.
AROUND = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TYPED, TENSORS = "torch._tensor._rebuild_from_type_v2", ("torch.Tensor", "torch.nn.parameter.Parameter")
MAKERS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")


class NotPlainError(ValueError):
    """The file is whole, but its weights are no plain tensors."""


def is_plain(value: object) -> bool:
    """Whether a value of a pickle is a tensor of the usual kind."""
    return isinstance(value, Call) and str(value.function) == PLAIN


def is_tensor(value: object) -> bool:
    """Whether a value of a pickle is a tensor of any kind; `TensorMaker.make` refuses those of unusual kinds."""
    return isinstance(value, Call) and str(value.function).startswith(MAKERS)


def read_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> bytearray:
    """The bytes of the storage behind the tensor `name`; a NotPlainError where they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size:
        raise NotPlainError(f"{name} is compressed")
    return bytearray(archive.read(info))


class TensorMaker:
    """Makes the tensors of one file; each storage is read once."""

    def __init__(self, read: Callable[[str, torch.dtype, str], bytearray]) -> None:
        """`read` gives the bytes of the storage with a key, of a dtype, for the tensor of a name."""
        self.read = read
        self.storages: dict[str, tuple[torch.dtype, Tensor]] = {}

    def make(self, call: Call, name: str) -> Tensor:
        """The tensor that a pickle describes; its place is checked against the bytes of its storage first.

        `name` is for errors. A NotPlainError where it is of an unusual kind or reaches past its storage.
        """
        if str(call.function) == TYPED and len(call.args) == 4:  # a tensor with attributes
            function, kind, args, _ = call.args
            if isinstance(function, Name) and isinstance(args, tuple) and str(kind) in TENSORS:
                call = Call(function, args)
        if str(call.function) in AROUND and call.args and isinstance(call.args[0], Call):
            call = call.args[0]
        if not is_plain(call):
            raise NotPlainError(f"{name} is made by {call.function}")
        if len(call.args) < 4:
            raise NotPlainError(f"{name} has no size")
        source, offset, size, stride = call.args[:4]
        dtype, storage = self._storage(source, name)
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMS):
            raise NotPlainError(f"{name} has no size")
        if not all(type(number) is int and 0 <= number < 2**48 for number in (offset, *size, *stride)):
            raise NotPlainError(f"the size of {name} is no row of numbers")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        if last >= len(storage) or math.prod(size) > len(storage):
            raise NotPlainError(f"{name} reaches past the end of its storage")
        return storage.as_strided(size, stride, offset)

    def _storage(self, source: object, name: str) -> tuple[torch.dtype, Tensor]:
        """A storage as a flat tensor, read once."""
        dtype, number = storage_of(source, name)
        if number not in self.storages:
            content = self.read(number, dtype, name)
            whole = len(content) - len(content) % dtype.itemsize
            count, empty = whole // dtype.itemsize, torch.empty(0, dtype=dtype)
            self.storages[number] = dtype, torch.frombuffer(content, dtype=dtype, count=count) if count else empty
        if self.storages[number][0] != dtype:
            raise NotPlainError(f"{name} reads numbers of one type as another")
        return self.storages[number]


def storage_of(source: object, name: str) -> tuple[torch.dtype, str]:
    """The dtype and the key of the storage that `source` refers to; `name` is its tensor, for errors."""
    key = source.key if isinstance(source, Reference) else None
    if not (isinstance(key, tuple) and len(key) in (5, 6) and isinstance(key[1], Name) and isinstance(key[2], str)):
        raise NotPlainError(f"{name} has no storage")
    kind, number = key[1], key[2]
    dtype = DTYPES.get(kind.name) if kind.module == "torch" else None
    if dtype is None:
        raise NotPlainError(f"{name} is kept in {kind}, which is no type of weights")
    if key[5:] not in ((), (None,)):
        raise NotPlainError(f"{name} is a view of a storage, as torch 0.3 and older wrote it")
    return dtype, number
