"""TorchScript archives are read without running them, and give the same tensors as `torch.jit.load`."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights

from finetune.config import Family, Library, ModelConf
from finetune.models import build_model
from finetune.models.upstream import torchscript
from finetune.models.upstream.torchscript import is_torchscript, read_torchscript
from finetune.models.upstream.weight_files import read_state_dict
from finetune.system import inert_pickle
from finetune.system.errors import UserError
from finetune.system.inert_pickle import Call, Instance, PickleError, Reference, read_pickle

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(6).reshape(2, 3).t())  # not contiguous
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("transient", torch.ones(2), persistent=False)
        self.note = torch.ones(5)  # an attribute, neither a parameter nor a buffer
        self.names = ["a", "b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.note[:4].to(x.dtype)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Inner()
        self.again = self.one  # one module under two names
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.many[1].weight = self.many[0].weight  # one tensor under two names
        whole = torch.randn(10)
        self.first, self.second = nn.Parameter(whole[:4]), nn.Parameter(whole[2:8])  # one storage behind two
        self.register_parameter("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.many[0](self.one(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["script", "trace"])
def test_the_tensors_are_those_of_torch(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Outer().to(dtype), tmp_path / "m.pt"
    made = torch.jit.script(model) if way == "script" else torch.jit.trace(model, torch.ones(2, 3, dtype=dtype))
    made.save(str(path))
    expected = torch.jit.load(str(path)).state_dict()
    got = read_torchscript(path)
    assert got.keys() == expected.keys() and "one.note" not in got
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name
        assert got[name].stride() == tensor.stride(), name
    assert is_torchscript(path)


def test_an_archive_without_its_code_gives_all_tensors(tmp_path: Path) -> None:
    torch.jit.script(Outer()).save(str(tmp_path / "m.pt"))
    rewrite(tmp_path / "m.pt", drop="/code/")
    assert {"one.note", "one.linear.weight"} <= read_torchscript(tmp_path / "m.pt").keys()


# Archives of people who want to run something.


def rewrite(path: Path, *, drop: str = "\n", **content: bytes) -> None:
    """Write the archive again, without some records, and with other content for `data.pkl` (`data_pkl=`) and others."""
    with zipfile.ZipFile(path) as archive:
        records = {info: archive.read(info) for info in archive.infolist() if drop not in info.filename}
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in records.items():
            name = info.filename.partition("/")[2].replace(".", "_").replace("/", "_")
            archive.writestr(info.filename, content.get(name, data), info.compress_type)


class Writer(nn.Module):
    """Loading it with torch overwrites a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.from_file(self.path, True, 4, dtype=torch.uint8).copy_(torch.tensor([112, 119, 110, 33]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Saver(Writer):
    """Loading it with torch writes a new file."""

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)


class Endless(Writer):
    """Loading it with torch never ends."""

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        while self.path != "":
            pass


@pytest.mark.parametrize("kind", [Writer, Saver, Endless])
def test_code_of_an_archive_does_not_run(kind: type[Writer], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    torch.jit.script(nn.Sequential(kind(str(victim)))).save(str(tmp_path / "m.pt"))
    with pytest.raises(UserError, match=r"restores itself by code of its own.*torch\.jit\.load") as caught:
        read_state_dict(tmp_path / "m.pt")
    assert victim.read_bytes() == b"mine" and "\n" not in str(caught.value)


def archive(path: Path, data: bytes, storage: bytes = b"\0" * 16, **zipped: int) -> Path:
    """A TorchScript archive of one storage with the pickle `data`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", data)
        file.writestr("m/constants.pkl", b"\x80\x02).")
        file.writestr("m/data/0", storage, **zipped)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value)) + value.encode()


def whole(value: int) -> bytes:
    """A whole number of up to 255 bytes."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def module(*entries: bytes) -> bytes:
    """A pickle of one module with these entries of its state."""
    return b"\x80\x02c__torch__.m\nM\n)\x81}(" + b"".join(entries) + b"ub."


def tensor(
    offset: bytes = b"K\x00",
    size: bytes = b"K\x02\x85",
    stride: bytes = b"K\x01\x85",
    storage: bytes = b"ctorch\nFloatStorage\n",
    key: bytes = text("0"),
) -> bytes:
    reference = b"(" + text("storage") + storage + key + text("cpu") + b"K\x04tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + offset + size + stride + b"\x89NtR"


def test_an_archive_made_by_hand_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", module(text("w"), tensor()), torch.arange(4.0).numpy().tobytes())
    assert read_state_dict(path)["w"].tolist() == [0, 1]


SYSTEM = b"cos\nsystem\n" + text("touch ran") + b"\x85R"
HUGE = 2**40
CASES = {
    "a call of the system": module(text("w"), SYSTEM),
    "a call beside a tensor": module(text("w"), tensor(), text("v"), SYSTEM),
    "a root that is a call": b"\x80\x02" + SYSTEM + b".",
    "an object of the library": b"\x80\x02csubprocess\nPopen\n)\x81}(" + text("args") + text("ls") + b"ub.",
    "a size past the end": module(text("w"), tensor(size=b"K\x05\x85")),
    "a huge size": module(text("w"), tensor(size=whole(HUGE) + b"\x85")),
    "a huge size without a step": module(text("w"), tensor(size=whole(HUGE) + b"\x85", stride=b"K\x00\x85")),
    "a size whose product overflows": module(
        text("w"), tensor(size=3 * whole(2**31) + b"\x87", stride=b"K\x00K\x00K\x00\x87")
    ),
    "a number beyond all": module(text("w"), tensor(size=whole(2**500) + b"\x85")),
    "a negative size": module(text("w"), tensor(size=whole(-1) + b"\x85")),
    "a negative offset": module(text("w"), tensor(offset=whole(-2))),
    "an offset past the end": module(text("w"), tensor(offset=b"K\x03")),
    "a negative step": module(text("w"), tensor(stride=whole(-1) + b"\x85", offset=b"K\x02")),
    "a huge step": module(text("w"), tensor(stride=whole(2**47) + b"\x85")),
    "another number of steps": module(text("w"), tensor(stride=b")")),
    "a size that is a text": module(text("w"), tensor(size=text("2") + b"\x85")),
    "a size that is a truth": module(text("w"), tensor(size=b"\x88\x85")),
    "a size that is no row": module(text("w"), tensor(size=b"K\x02")),
    "a hundred dimensions": module(
        text("w"), tensor(size=b"(" + 100 * b"K\x01" + b"t", stride=b"(" + 100 * b"K\x01" + b"t")
    ),
    "a storage of no type": module(text("w"), tensor(storage=b"cos\nFloatStorage\n")),
    "a storage of complex numbers": module(text("w"), tensor(storage=b"ctorch\nComplexFloatStorage\n")),
    "a storage outside the archive": module(text("w"), tensor(key=text("../../../etc/passwd"))),
    "a storage that is a number": module(text("w"), tensor(key=b"K\x00")),
    "one storage of two types": module(
        text("w"), tensor(), text("v"), tensor(storage=b"ctorch\nHalfStorage\n", size=b"K\x08\x85")
    ),
    "a reference that is no tuple": module(text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00QK\x00)K\x01tR"),
    "a tensor without arguments": module(text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "a quantized tensor": module(text("w"), b"ctorch._utils\n_rebuild_qtensor\n)R"),
    "no tensor": module(text("epoch"), b"K\x03"),
    "a state that is no dict": b"\x80\x02c__torch__.m\nM\n)\x81K\x01b.",
    "no state": b"\x80\x02c__torch__.m\nM\n)\x81.",
    "a module that holds itself": b"\x80\x02c__torch__.m\nM\n)\x81q\x00}(" + text("x") + b"h\x00ub.",
    "modules nested without end": b"\x80\x02"
    + 3000 * (b"c__torch__.m\nM\n)\x81}(" + text("x"))
    + b"N"
    + 3000 * b"ub"
    + b".",
    "a state for what is no object": b"\x80\x02]}b.",
    "entries of what is no dict": b"\x80\x02](" + text("x") + b"K\x01u.",
    "items of what is no list": b"\x80\x02}(K\x01e.",
    "an object of what is no class": b"\x80\x02K\x01)\x81.",
    "a call of a text": b"\x80\x02" + text("os.system") + b")R.",
    "a step of other pickles": b"\x80\x02\x8c\x02os\x8c\x06system\x93.",
    "the extension registry": b"\x80\x02\x82\x01.",
    "no mark": b"\x80\x02t.",
    "an empty stack": b"\x80\x02R.",
    "an unknown place in the memo": b"\x80\x02h\x07.",
    "a text that is cut": b"\x80\x02X\xff\xff\xff\x7fab.",
    "a text that is no UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "two values": b"\x80\x02K\x01K\x02.",
    "no pickle": b"hello",
}


@pytest.mark.parametrize("case", CASES)
def test_senseless_and_hostile_pickles_are_refused_in_one_line(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "m.pt", CASES[case])
    if case == "a call beside a tensor":  # nobody asks for it, so it is left unread
        assert read_state_dict(path).keys() == {"w"}
    else:
        with pytest.raises(UserError, match=r"without running it|damaged or incomplete") as caught:
            read_state_dict(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_modules_in_many_places_do_not_multiply(tmp_path: Path) -> None:
    """Forty modules, each of which holds the next one twice, have 2 ** 40 names."""
    inner = module(text("w"), tensor())[2:-1] + b"q\x00"
    for _ in range(40):
        inner = module(text("a"), inner, text("b"), b"h\x00")[2:-1] + b"q\x00"
    with pytest.raises(UserError, match="nested without end"):
        read_state_dict(archive(tmp_path / "m.pt", b"\x80\x02" + inner + b"."))


def test_many_names_of_one_storage_do_not_fill_the_memory(tmp_path: Path) -> None:
    """Half-precision weights become single precision, so each name of one storage takes memory of its own."""
    half = tensor(storage=b"ctorch\nHalfStorage\n", size=whole(2**20) + b"\x85")
    entries = [text(f"w{number}") + half for number in range(300)]
    path = archive(tmp_path / "m.pt", module(*entries), bytes(2**21))
    with pytest.raises(UserError, match="claim to be weights of"):
        read_state_dict(path)


def test_archives_that_unpack_without_end_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = archive(tmp_path / "m.pt", module(text("w"), tensor()), bytes(10**8), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="bytes claim to hold"):
        read_state_dict(path)
    path = archive(tmp_path / "m.pt", module(text("w"), tensor()), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="w is compressed"):
        read_state_dict(path)
    monkeypatch.setattr(torchscript, "MAX_TEXT", 10)
    with pytest.raises(UserError, match=r"data\.pkl has \d+ bytes"):
        read_state_dict(archive(tmp_path / "m.pt", module(text("w"), tensor())))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_a_limit_are_not_used(method: int, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("m/data.pkl", module(text("w"), tensor()))
        file.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(UserError, match="compressed in a way"):
        read_state_dict(path)


def test_a_long_pickle_is_refused_before_it_takes_long(monkeypatch) -> None:
    monkeypatch.setattr(inert_pickle, "MAX_STEPS", 1000)
    with pytest.raises(PickleError, match="steps"):
        read_pickle(b"\x80\x02]" + 1001 * b"N" + b".")


# Numbers with one hash make a dict of n entries take n * n steps: 200,000 of them would take an hour.
COLLIDING = b"".join(whole(number * (2**61 - 1)) + b"N" for number in range(30_000))
# So do tuples of -1 and -2, which have one hash.
MINUS = {"0": b"J\xff\xff\xff\xff", "1": b"J\xfe\xff\xff\xff"}
TUPLES = [b"(" + b"".join(MINUS[bit] for bit in f"{number:015b}") + b"t" for number in range(2**15)]
BUSY = {
    "numbers": b"}(" + COLLIDING + b"u",
    "one by one": b"}" + b"".join(whole(number * (2**61 - 1)) + b"Ns" for number in range(30_000)),
    "tuples": b"}(" + b"".join(key + b"N" for key in TUPLES) + b"u",
    "an ordered dict": b"ccollections\nOrderedDict\n)R(" + COLLIDING + b"u",
    "pairs": b"ccollections\nOrderedDict\n](" + b"".join(key + b"N\x86" for key in TUPLES) + b"e\x85R",
    "a counter": b"ccollections\nCounter\n](" + b"".join(TUPLES) + b"e\x85R",
    "memory": b"cbuiltins\nbytearray\n" + whole(2**37) + b"\x85R",
    "a tuple in a tuple": b"}" + b")" + 300_000 * b"\x85" + b"Ns",
}


@pytest.mark.parametrize("case", BUSY)
@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_pickle_made_to_keep_python_busy_is_refused(case: str, is_legacy: bool, tmp_path: Path) -> None:
    """The last one would end the process by a signal."""
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=not is_legacy)
    busy = b"\x80\x02" + BUSY[case] + b"."
    if is_legacy:
        path.write_bytes(
            path.read_bytes().replace(
                b"\x80\x02}q\x00X\x06\x00\x00\x00weight", busy[:-1] + b"0}q\x00X\x06\x00\x00\x00weight"
            )
        )
    else:
        rewrite(path, data_pkl=busy)
    with pytest.raises(UserError, match=r"odd keys|nested tuples|empty memory"):
        read_state_dict(path)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_checkpoints_with_long_histories_are_read(is_legacy: bool, tmp_path: Path) -> None:
    history = {step: {"loss": float(step), (step, "lr"): 1} for step in range(5000)}
    ordered = OrderedDict([(("a", 1), 2), (3.5, 4)])
    content = {
        "model": OrderedDict(weight=torch.ones(2)),
        "history": history,
        "ordered": ordered,
        "set": {1, 2},
        "empty": set(),
    }
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not is_legacy)
    assert read_state_dict(tmp_path / "w.pt").keys() == {"model.weight"}


def test_what_an_inert_pickle_gives() -> None:
    value = read_pickle(pickle.dumps({"a": [1, 2.5, None, True, (1,), "x"], "b": ()}, protocol=2))
    assert value == {"a": [1, 2.5, None, True, (1,), "x"], "b": ()}
    called = read_pickle(b"\x80\x02cos\nsystem\n" + text("ls") + b"\x85R.")
    assert isinstance(called, Call) and (str(called.function), called.args) == ("os.system", ("ls",))
    made = read_pickle(b"\x80\x02cos\nthing\n)\x81K\x01b.")
    assert isinstance(made, Instance) and (str(made.cls), made.state) == ("os.thing", 1)
    kept = read_pickle(b"\x80\x02K\x07Q.")
    assert isinstance(kept, Reference) and kept.key == 7


def test_every_cut_and_many_flips_of_an_archive_end_in_one_line(tmp_path: Path) -> None:
    """A damaged archive is refused by name, or gives tensors; never another exception."""
    torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "m.pt"))
    whole_file, path = (tmp_path / "m.pt").read_bytes(), tmp_path / "damaged.pt"
    damaged = [whole_file[:end] for end in range(0, len(whole_file), 97)]
    for place in range(0, len(whole_file), 7):
        flipped = bytearray(whole_file)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > len(damaged) // 4


# Other pickles and archives of numbers.


def test_a_pickle_that_holds_itself_is_read(tmp_path: Path) -> None:
    content: dict = {"weight": torch.ones(2)}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt").keys() == {"weight"}


def test_names_that_are_no_texts_are_no_weights(tmp_path: Path) -> None:
    torch.save({3: torch.ones(2), 2**2000: 1, "x" * 10_000: 2}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no weights: expected tensors by name, found a int") as caught:
        read_state_dict(tmp_path / "w.pt")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(3, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(value: torch.Tensor, word: str, tmp_path: Path) -> None:
    torch.save({"weight": value}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"weight is no plain tensor.*{word}"):
        read_state_dict(tmp_path / "w.pt")


def test_torchs_advice_to_trust_the_file_is_not_passed_on(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}X\x01\0\0\0a\x82\x01s.")  # a class by its number in a registry
        archive.writestr("w/version", "3")
    with pytest.raises(UserError, match="a step EXT1") as caught:
        read_state_dict(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_hostile_file_in_torchs_own_cache_does_not_run(tmp_path: Path, monkeypatch) -> None:
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    monkeypatch.setattr("finetune.models.upstream.downloads._reachable", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = ResNet18_Weights.DEFAULT.url
    conf = ModelConf(family=Family.vit, library=Library.torchvision, name="resnet18", pretrained="DEFAULT")
    for content in (Touch(), {"fc.weight": Touch()}):
        torch.save(content, tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
        with pytest.raises(UserError, match=r"damaged.*TORCH_HOME"):
            build_model(conf, ["a", "b"])
    assert not (tmp_path / "ran").exists()


def test_one_number_behind_a_huge_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1).half().expand(10**12)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="claim to be weights of"):
        read_state_dict(tmp_path / "w.pt")


def test_a_pickle_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(10**7)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="bytes claim to hold"):
        read_state_dict(tmp_path / "w.pt")


def test_an_archive_of_arrays_claims_no_more_than_it_has(tmp_path: Path) -> None:
    import numpy as np

    from finetune.models.upstream.weight_files import check_npz

    np.savez(tmp_path / "w.npz", a=np.ones(3), b=np.zeros((0, 2), np.float16))
    check_npz(tmp_path / "w.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("a.npy", header.getvalue() + bytes(100))
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(10**7))
    (tmp_path / "no.npz").write_bytes(b"PK\x03\x04")
    for name in ("objects", "huge", "zeros", "no"):
        with pytest.raises(UserError, match=rf"{name}\.npz is (damaged|refused)"):
            check_npz(tmp_path / f"{name}.npz")
