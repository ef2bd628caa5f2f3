"""Checkpoints with objects of training programs are read without making any of them; hostile ones end in one line."""

import argparse
import enum
import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from finetune.models.upstream.inert_checkpoint import read_checkpoint
from finetune.models.upstream.weight_files import read_state_dict
from finetune.system.errors import UserError
from finetune.system.inert_pickle import MAX_ODD_KEYS, PickleError, check_pickles, read_pickle

RAN = "ran"  # a file that every attack here would make


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "a.weight": base,
        "a.view": base[1:3].t(),  # shares the storage, with other strides
        "a.row": base[0],
        "b.half": base.half(),
        "b.brain": base.bfloat16(),
        "b.double": base.double(),
        "c.count": torch.tensor(7),
        "c.mask": torch.tensor([True, False]),
        "c.bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "c.empty": torch.empty(0, 3),
        "d.parameter": nn.Parameter(base + 1),
    }


def equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str = "") -> bool:
    """Bit for bit, in single precision."""
    wanted = {prefix + name: t.float() if t.is_floating_point() else t for name, t in expected.items()}
    mine = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return mine.keys() == wanted.keys() and all(
        torch.equal(mine[name], wanted[name]) and mine[name].dtype == wanted[name].dtype for name in wanted
    )


class Colour(enum.Enum):
    red = 1


class Settings(OrderedDict):
    """A dict of a class of a training program."""


class Slots:
    """An object whose state is no dictionary."""

    __slots__ = ("path", "rate")

    def __init__(self) -> None:
        self.path, self.rate = Path("/data"), 0.1


class Average:
    """An average of the weights, as programs keep it."""

    def __init__(self, shadow: dict[str, torch.Tensor]) -> None:
        self.decay, self.shadow, self.history = 0.99, shadow, deque([1.0, 2.0], maxlen=3)


class List(list):
    """A list of a class of a training program."""


def optimizer_state() -> dict:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


OBJECTS = {
    "lightning": {
        "hyper_parameters": argparse.Namespace(root=PosixPath("/data"), cfg=OmegaConf.create({"lr": 1, "l": [1, 2]})),
        "pytorch-lightning_version": "2.0",
        "callbacks": {"ModelCheckpoint": {"best": np.float32(0.5), "dirpath": Path("/x")}},
        "loops": {"fit": Counter({"a": 1})},
    },
    "omegaconf": {"cfg": OmegaConf.create({"model": {"sizes": [1, 2, {"a": None}]}})},
    "list of omegaconf": {"sizes": OmegaConf.create([1, 2])},
    "numpy": {"dtype": np.dtype("float16"), "scalar": np.int16(3), "array": np.arange(5.0), "text": np.str_("a")},
    "deque": {"losses": deque(range(2000), maxlen=100)},
    "enum": {"colour": Colour.red, "colours": {Colour.red: 1}},
    "sets": {"names": {"a", "b"}, "frozen": frozenset([1, 2]), "list": List([1, 2])},
    "dicts": {"settings": Settings(a=1), "default": defaultdict(list, a=[1])},
    "slots": {"slots": Slots(), "type": Slots, "function": os.path.join, "none": None},
    "optimizer": {"optimizer": optimizer_state(), "scheduler": {"lambda": torch.optim.lr_scheduler.LambdaLR}},
    "numbers": {"huge": 3**4000, "bytes": b"ab\0", "bytearray": bytearray(b"xy"), "complex": 1j, "range": range(3)},
    "generator": {"device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([1, 2])},
    "itself": {"slots": [[]]},
}


@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_beside_objects_are_read_bit_for_bit(case: str, protocol: int, is_zip: bool, tmp_path: Path) -> None:
    state = weights()
    path = tmp_path / "w.ckpt"
    content = {**OBJECTS[case], "state_dict": OrderedDict(state), "epoch": 3}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    assert equal(read_state_dict(path), state, "state_dict.")


@pytest.mark.parametrize("is_zip", [True, False])
def test_dicts_of_other_classes_and_averages_are_opened(is_zip: bool, tmp_path: Path) -> None:
    state = weights()
    other = {name: tensor.detach().clone() for name, tensor in state.items()}
    content = {"model": Settings(state), "ema": Average(other), "default": defaultdict(dict, inner=state)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    read = read_state_dict(tmp_path / "w.pt")
    for prefix in ("model.", "ema.shadow.", "default.inner."):
        assert equal(read, state, prefix)


class Net(nn.Module):
    """A network with all that a state dict has and has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
        self.shared = self.layers[0]
        self.token = nn.Parameter(torch.randn(1, 2))
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("lost", torch.arange(4), persistent=False)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_module_that_was_saved_whole_gives_its_state_dict(protocol: int, tmp_path: Path) -> None:
    net = Net()
    torch.save(net, tmp_path / "whole.pt", pickle_protocol=protocol)
    assert equal(read_state_dict(tmp_path / "whole.pt"), net.state_dict())
    torch.save({"model": nn.DataParallel(net), "path": Path("/")}, tmp_path / "w.pt", pickle_protocol=protocol)
    assert equal(read_state_dict(tmp_path / "w.pt"), net.state_dict(), "model.module.")


def test_a_parameter_and_a_tensor_with_attributes_are_read(tmp_path: Path) -> None:
    tensor, parameter = torch.randn(3), nn.Parameter(torch.randn(2))
    tensor.note, parameter.note = "no decay", Path("/")  # type: ignore[attr-defined]
    torch.save({"t": tensor, "p": parameter}, tmp_path / "w.pt")
    assert equal(read_state_dict(tmp_path / "w.pt"), {"t": tensor.detach(), "p": parameter.detach()})


# Attacks.


class Attack:
    """Makes the file RAN when it is unpickled; `how` says by which part of a pickle."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce_ex__(self, protocol: int):
        touch = f"open({RAN!r}, 'w')"
        return {
            "system": (os.system, (f"touch {RAN}",)),
            "eval": (eval, (touch,)),
            "exec": (exec, (touch,)),
            "getattr": (getattr, (Path(RAN), "touch")),
            "method": (Path.touch, (Path(RAN),)),
            "state": (Victim, (), {"path": RAN}),
            "setter": (Victim, (), {"path": RAN}, None, None, lambda_like),
            "items": (Victim, (), None, iter([RAN])),
            "entries": (Victim, (), None, None, iter([("path", RAN)])),
        }[self.how]


class Victim(dict):
    """Each way of filling it makes the file RAN."""

    def __setstate__(self, state: dict) -> None:
        Path(RAN).touch()

    def append(self, item: str) -> None:
        Path(RAN).touch()

    def extend(self, items: list) -> None:
        Path(RAN).touch()

    def __setitem__(self, key: str, value: str) -> None:
        Path(RAN).touch()


def lambda_like(thing: object, state: dict) -> None:
    """A setter of states, as a pickle may name it."""
    Path(RAN).touch()


WAYS = ("system", "eval", "exec", "getattr", "method", "state", "setter", "items", "entries")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_of_a_file_runs(way: str, is_zip: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = weights()
    for protocol in (2, 4):
        arguments = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
        torch.save({"extra": Attack(way), "model": state}, "w.pt", **arguments)  # type: ignore[arg-type]
        assert equal(read_state_dict(tmp_path / "w.pt"), state, "model.")
        torch.save(Attack(way), "w.pt", **arguments)  # type: ignore[arg-type]
        with pytest.raises(UserError) as caught:
            read_state_dict(tmp_path / "w.pt")
        assert "w.pt" in str(caught.value) and "\n" not in str(caught.value)
        assert not Path(RAN).exists()
    if way not in ("method", "getattr"):  # the attacks are real ones
        torch.load("w.pt", weights_only=False)
        assert Path(RAN).exists()


def rewritten(path: Path, data: bytes, storage: bytes | None = None) -> Path:
    """A file of torch.save with the pickle `data`, and one storage of 16 bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/version", b"3")
        file.writestr("m/byteorder", b"little")
        file.writestr("m/data/0", bytes(16) if storage is None else storage)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value)) + value.encode()


def reference(key: str = "0", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + b"K\x04tQ"


def tensor(rest: bytes = b"K\x00K\x02\x85K\x01\x85", storage: bytes | None = None) -> bytes:
    """A tensor of two numbers; `rest` are offset, size and strides."""
    start = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return start + (storage or reference()) + rest + b"\x89NtR"


def entry(value: bytes) -> bytes:
    """A dict with an object of another class, and `value` as its tensor `w`."""
    return b"\x80\x02}(" + text("x") + b"cos\nsystem\n" + text("touch ran") + b"\x85R" + text("w") + value + b"u."


NOUGHT = b"K\x00"
MALFORMED = {
    "outside": entry(tensor(b"K\x03K\x02\x85K\x01\x85")),
    "negative": entry(tensor(b"J\xff\xff\xff\xffK\x02\x85K\x01\x85")),
    "without end": entry(tensor(NOUGHT + b"\x8a\x06" + b"\0\0\0\0\0\x01" + b"\x85" + NOUGHT + b"\x85")),
    "another file's": entry(tensor(storage=reference("../../etc/passwd"))),
    "no storage": entry(tensor(storage=NOUGHT)),
    "another class": entry(tensor(storage=reference(kind=b"cos\nsystem\n"))),
    "quantized": entry(b"ctorch._utils\n_rebuild_qtensor\n)R"),
    "a parameter of nothing": entry(b"ctorch._utils\n_rebuild_parameter\n)R"),
    "an extension": entry(b"\x82\x01"),
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "a class of no text": b"\x80\x04K\x01K\x02\x93.",
    "a pop of nothing": b"\x80\x020.",
    "a mark alone": b"\x80\x02(\x85.",
    "a step of memory": b"\x80\x02h\x07.",
    "nested": b"\x80\x02" + 200_000 * b"cos\nx\n" + NOUGHT + 200_000 * b"\x85R" + b".",
    "a text that is longer than its file": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",
    "bytes that are longer than their file": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
    "empty memory": entry(b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R"),
    "empty": b"",
    "cut": entry(tensor())[:-30],
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_hostile_file_is_one_line(case: str, is_legacy: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    if is_legacy:
        legacy(path, MALFORMED[case])
    else:
        rewritten(path, MALFORMED[case])
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert "MemoryError" not in str(caught.value) and "RecursionError" not in str(caught.value)
    assert not Path(RAN).exists()


def legacy(path: Path, data: bytes, keys: tuple[str, ...] = ("0",), length: int = 4) -> Path:
    """A file as torch before 1.6 wrote it, with the pickle `data` and one storage for each key."""
    start = b"".join(
        pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    data = data.replace(b"K\x04tQ", b"K\x04NtQ")
    storages = b"".join(struct.pack("<q", length) + bytes(16) for _ in keys)
    path.write_bytes(start + data + pickle.dumps(list(keys), protocol=2) + storages)
    return path


def test_storages_of_an_old_file_that_overlap_or_lie_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert read_state_dict(legacy(path, entry(tensor())))["w"].tolist() == [0, 0]
    for keys, length, words in (
        (("0",), 2**40, "cut"),
        (("0",), -1, "cut"),
        (("0", "0"), 4, "list of storages"),
        (("1",), 4, "list of storages"),
        ((), 4, "storage of w is not in the file"),
    ):
        with pytest.raises(UserError, match=words):
            read_state_dict(legacy(path, entry(tensor()), keys, length))


def test_records_that_overlap_or_are_compressed_are_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "w.pt", entry(tensor()))
    assert read_state_dict(path)["w"].tolist() == [0, 0]
    whole = path.read_bytes()
    start = whole.index(b"m/data/0", whole.index(b"PK\1\2"))  # in the list of records
    shifted = bytearray(whole)
    shifted[start - 4 : start] = struct.pack("<I", 0)  # its place is that of the pickle
    path.write_bytes(shifted)
    with pytest.raises(UserError, match=r"w\.pt"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/version", b"3", zipfile.ZIP_STORED)
        file.writestr("m/data.pkl", entry(tensor()), zipfile.ZIP_STORED)
        file.writestr("m/data/0", bytes(10**4))
    with pytest.raises(UserError, match="compressed"):
        read_state_dict(path)


def test_objects_that_share_a_long_dict_do_not_multiply(tmp_path: Path, monkeypatch) -> None:
    from finetune.models.upstream import inert_checkpoint

    monkeypatch.setattr(inert_checkpoint, "MAX_STEPS", 1000)
    shared = {str(k): k for k in range(100)}
    averages = {str(k): Average(shared) for k in range(5)}  # type: ignore[arg-type]
    for each in averages.values():
        each.__dict__ = shared  # type: ignore[assignment]
    torch.save({"w": torch.ones(1), **averages}, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt").keys() == {"w"}
    more = {str(k): Average(shared) for k in range(20)}  # type: ignore[arg-type]
    for each in more.values():
        each.__dict__ = shared  # type: ignore[assignment]
    torch.save({"w": torch.ones(1), **more}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="more than 1,000 names"):
        read_state_dict(tmp_path / "w.pt")


def test_modules_without_end_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net.again = net  # type: ignore[assignment]
    torch.save(net, tmp_path / "w.pt")
    with pytest.raises(UserError, match="nested without end"):
        read_state_dict(tmp_path / "w.pt")


# Our own states stay strict.


@pytest.mark.parametrize("value", [deque([1, 2]), frozenset([1]), {1, 2}, 3**4000])
def test_the_reader_of_our_own_states_takes_no_steps_of_objects(value: object, tmp_path: Path) -> None:
    data = pickle.dumps({"a": value}, protocol=4)
    with pytest.raises(PickleError):
        read_pickle(data)
    assert read_pickle(data, objects=True).keys() == {"a"}
    torch.save({"a": value}, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(PickleError):
        check_pickles(tmp_path / "w.pt")


def test_colliding_keys_stay_refused_among_objects() -> None:
    keys = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, MAX_ODD_KEYS + 10))
    with pytest.raises(PickleError, match="odd keys"):
        read_pickle(io.BytesIO(b"\x80\x04}(" + keys + b"u."), objects=True)


def test_every_cut_and_many_flips_end_in_one_line(tmp_path: Path) -> None:
    content = {"model": {"w": torch.ones(3)}, "path": Path("/data"), "losses": deque([1])}
    path = tmp_path / "w.pt"
    for is_zip in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        damaged = [whole[:end] for end in range(0, len(whole), 41)]
        for place in range(0, len(whole), 5):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            damaged.append(bytes(flipped))
        for bad in damaged:
            path.write_bytes(bad)
            try:
                read_state_dict(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_the_reader_alone_gives_nested_names(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1), "c": Path("/")}, "d": 3, "e": ["x"], "f": [2]}, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert read["a"]["b"].tolist() == [1] and (read["d"], read["e"], read["f"]) == (3, ["x"], None)
