"""Checkpoints with objects of a training program beside the tensors, read without making any of these objects.

`torch.load` makes objects of known classes alone, and refuses the whole file for a path or a setting of another one.
Here an object stays an inert value, and what it holds by name (the entries of a dict, its attributes, the parameters of
a module) is opened like a dictionary.
"""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from finetune.models.upstream.inert_tensors import NotPlainError, TensorMaker, is_tensor, read_record, storage_of
from finetune.system.inert_pickle import (
    LEGACY_PICKLES,
    MAX_STEPS,
    ZIP_START,
    Call,
    Held,
    Instance,
    Outside,
    PickleError,
    check_growth,
    read_pickle,
)
from finetune.system.terminal import printable

logger = logging.getLogger("finetune")
MAX_NAMED = 5  # functions that a warning names

# torch before 1.6: the first pickle of a file is this number, and each storage has its length in front.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LENGTH_BYTES = 8
# A module may stand in several places, so a small file could name more than memory holds.
MAX_MODULES = 100_000
MAX_DEPTH = 100
MAX_NAME = 1_000
DICTS = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict", "collections.defaultdict")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The tensors in a file of `torch.save` by name, in dictionaries nested as in the file; on the CPU.

    Raises:
        PickleError: The pickle is damaged, or made to keep Python busy.
        NotPlainError: It is no dictionary of plain tensors.
        UserError: The file claims far more values than its bytes can hold.
    """
    outside = Outside()
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START  # as torch decides
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                check_growth(archive, path)
                tensors = _read_zip(archive, outside)
        else:
            file.seek(0)
            tensors = _read_legacy(file, path.stat().st_size, outside)
    if outside.code:
        names = ", ".join(sorted(outside.code)[:MAX_NAMED])
        logger.warning(
            "%s holds calls of %s beside its tensors: no weights need them, and nothing of them was run here; a program"
            " that opens the file by torch.load(weights_only=False) runs them",
            *(printable(str(path)), printable(names)),
        )
    return tensors


def _read_zip(archive: zipfile.ZipFile, outside: Outside) -> Mapping[str, Any]:
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.endswith("/data.pkl")]
    if not pickles:
        raise NotPlainError("it has no data.pkl, so torch.save did not write it")
    top = min(pickles, key=len).removesuffix("data.pkl")
    if f"{top}byteorder" in infos and archive.read(f"{top}byteorder") != b"little":
        raise NotPlainError("its bytes stand in the order of another kind of processor")
    root = read_pickle(
        bytes(read_record(archive, infos[f"{top}data.pkl"], "its pickle")), objects=True, outside=outside
    )

    def record(number: str, dtype: torch.dtype, name: str) -> bytearray:
        if f"{top}data/{number}" not in infos:
            raise NotPlainError(f"the storage of {name} is not in the file")
        return read_record(archive, infos[f"{top}data/{number}"], name)

    return _Opening(TensorMaker(record)).open(root)


def _read_legacy(file: IO[bytes], size: int, outside: Outside) -> Mapping[str, Any]:
    """Five pickles in a row, then the storages in the order of their keys."""
    held = Held(file, size)
    values = [read_pickle(held, objects=True, outside=outside) for _ in range(LEGACY_PICKLES)]
    magic, _, _, root, keys = values
    if magic != LEGACY_MAGIC or not isinstance(keys, list):
        raise NotPlainError("torch.save did not write it")
    sizes = {}
    for reference in outside.references:
        dtype, key = storage_of(reference, "a tensor")
        sizes[key] = dtype.itemsize
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        length = int.from_bytes(held.read(LENGTH_BYTES), "little")
        start = file.tell()
        if not isinstance(key, str) or key not in sizes or key in places:
            raise NotPlainError("its list of storages is not that of its tensors")
        if start + (taken := length * sizes[key]) > size:
            raise PickleError("its storages are cut")
        places[key] = start, taken
        file.seek(start + taken)

    def record(key: str, dtype: torch.dtype, name: str) -> bytearray:
        if key not in places:
            raise NotPlainError(f"the storage of {name} is not in the file")
        start, taken = places[key]
        file.seek(start)
        return bytearray(file.read(taken))

    return _Opening(TensorMaker(record)).open(root)


class _Opening:
    """Opens the values of a pickle like dictionaries, each once."""

    def __init__(self, tensors: TensorMaker) -> None:
        self.tensors = tensors
        self.modules = self.names = 0

    def open(self, root: object) -> Mapping[str, Any]:
        """All tensors by name, in dictionaries nested as in the pickle; one that stands in many places is opened once.

        Numbers and lists are None there, but for what can name classes: whole numbers, texts, lists of texts.

        A NotPlainError where `root` holds nothing by name.
        """
        if not _has_names(root):
            kind = f"the result of {root.function}" if isinstance(root, Call) else f"a {type(root).__name__}"
            raise NotPlainError(f"it holds {kind}, not a dictionary of tensors by name")
        opened: dict[int, dict[str, Any]] = {id(root): {}}
        waiting = [root]
        for value in waiting:  # which grows meanwhile
            for name, inner in self._entries(value).items():
                if isinstance(inner, Tensor):
                    opened[id(value)][name] = inner
                elif is_tensor(inner):
                    opened[id(value)][name] = self.tensors.make(inner, name)
                elif _has_names(inner):
                    if id(inner) not in opened:
                        opened[id(inner)] = {}
                        waiting.append(inner)
                    opened[id(value)][name] = opened[id(inner)]
                else:
                    opened[id(value)][name] = inner if _is_plain(inner) else None
        return opened[id(root)]

    def _entries(self, value: Any) -> dict[str, Any]:
        return self._state_dict(value) if _is_module(value) else self._counted(_named(value))

    def _counted(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The same, once their number is counted: many objects may share one long dictionary."""
        self.names += len(entries)
        if self.names > MAX_STEPS:
            raise NotPlainError(f"its objects hold more than {MAX_STEPS:,} names")
        return entries

    def _state_dict(self, module: Instance) -> dict[str, Tensor]:
        """The tensors of a module that was saved whole, by the names that its `state_dict()` gives them."""
        found: dict[str, Tensor] = {}
        waiting = [(module, "", 0)]
        for each, prefix, depth in waiting:  # which grows meanwhile
            self.modules += 1
            if self.modules > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
                raise NotPlainError("its modules are nested without end")
            own = _named(each)
            unsaved = _items(own.get("_non_persistent_buffers_set"))
            parameters, buffers = (self._counted(_named(own[kind])) for kind in ("_parameters", "_buffers"))
            for name, value in (*parameters.items(), *buffers.items()):
                if is_tensor(value) and name not in unsaved:
                    found[prefix + name] = self.tensors.make(value, prefix + name)
            inner = self._counted(_named(own["_modules"])).items()
            waiting += [(part, f"{prefix}{name}.", depth + 1) for name, part in inner if _is_module(part)]
        return found


def _is_module(value: object) -> bool:
    """Whether an object is a module of torch: these keep their parts in three dictionaries."""
    is_object = isinstance(value, Instance) and isinstance(value.state, dict)
    return is_object and {"_parameters", "_buffers", "_modules"} <= value.state.keys()  # type: ignore[attr-defined]


def _has_names(value: object) -> bool:
    return isinstance(value, (dict, Instance)) or (isinstance(value, Call) and not is_tensor(value))


def _is_plain(value: object) -> bool:
    texts = value if isinstance(value, (list, tuple)) else ()
    return type(value) in (int, str) or (bool(texts) and all(type(text) is str for text in texts))


def _named(value: object) -> dict[str, Any]:
    """What a value holds by name: the entries of a dict of any class, and the attributes of an object."""
    if isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    if isinstance(value, Instance) and isinstance(value.state, dict) and not value.entries:
        return value.state
    if isinstance(value, (Call, Instance)):
        # An object with slots has two dictionaries as its state.
        for state in value.state if isinstance(value.state, tuple) else (value.state,):
            found |= state if isinstance(state, dict) else {}
        if isinstance(value, Call) and str(value.function) in DICTS and value.args:
            pairs = value.args[-1]
            if isinstance(pairs, dict):
                found |= pairs
            elif isinstance(pairs, list):  # as Python 2 writes an OrderedDict
                pairs = [pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
                found |= {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
        found |= value.entries or {}
    return found


def _items(value: object) -> set[str]:
    """The texts in a set."""
    if isinstance(value, Call) and value.args and isinstance(value.args[0], list):
        return {item for item in value.args[0] if isinstance(item, str)}
    return set()
