"""Seals find every change of a file, and reading errors of any kind become one that names the file."""

import errno
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.system.errors import UserError
from finetune.system.reading import DamagedError
from finetune.system.seals import (
    CHECKSUM_KEY,
    PLACEHOLDER,
    SealedFile,
    SealedStream,
    check_checksum,
    check_seal,
    damaged_if_unreadable,
    put_checksum,
    read_sealed,
    seal,
)

CONTENT = bytes(random.Random(0).randbytes(1000))


def sealed(folder: Path, block: int | None = None, content: bytes = CONTENT) -> Path:
    path = folder / "file"
    path.write_bytes(content)
    seal(path, block=block)
    return path


@pytest.mark.parametrize("block", [None, 1, 64, 999, 1000, 4096])
@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
def test_what_was_sealed_is_read(tmp_path: Path, block: int | None, content: bytes) -> None:
    path = sealed(tmp_path, block, content)
    assert read_sealed(path) == content and check_seal(path)
    file = SealedFile(path)
    for offset, size in [(0, 10), (5, 0), (3, 700), (990, 100), (2000, 5), (0, 10**15)]:
        assert file.read(offset, size) == content[offset : offset + size] == file.read(offset, size)
    stream = SealedStream(file)
    assert stream.read() == content and stream.seek(-1, os.SEEK_END) == len(content) - 1


@pytest.mark.parametrize("block", [None, 64])
def test_every_single_flipped_bit_is_found(tmp_path: Path, block: int | None) -> None:
    path = sealed(tmp_path, block)
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (0, 7) if place < len(CONTENT) else range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            with pytest.raises(DamagedError, match="file is damaged"):
                read_sealed(path)


def test_cuts_additions_and_zeros_are_found(tmp_path: Path) -> None:
    path = sealed(tmp_path, 64)
    data = path.read_bytes()
    broken = [data[:n] for n in range(len(data))] + [data + b"\0", data + data, b"\0" * len(data), data[1:]]
    broken += [data[:n] + bytes(50) + data[n + 50 :] for n in range(0, len(data), 50)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="file is damaged"):
            read_sealed(path)


def test_no_size_in_a_damaged_file_asks_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tracemalloc.start()
    for size, block in [(2**63, 1), (2**63, 2**62), (1, 0), (0, 0), (2**64 - 1, 2**64 - 1)]:
        table = zlib.crc32(struct.pack("<QQ", size, block))
        path.write_bytes(CONTENT + struct.pack("<8sQQI", b"FTSEAL1\n", size, block, table))
        with pytest.raises(DamagedError):
            SealedFile(path).check()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_block_is_compared_when_it_is_first_read(tmp_path: Path) -> None:
    path = sealed(tmp_path, 100)
    data = bytearray(path.read_bytes())
    data[550] ^= 1
    path.write_bytes(data)
    file = SealedFile(path)
    assert file.read(0, 500) == CONTENT[:500] and file.read(600, 400) == CONTENT[600:]
    with pytest.raises(DamagedError, match="from 500 on"):
        file.read(499, 2)


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    for read in (check_seal, read_sealed, check_checksum):
        with pytest.raises(DamagedError, match="no regular file"):
            read(tmp_path / "file")


def test_every_flipped_bit_of_a_safetensors_file_is_found_and_the_file_stays_a_plain_one(tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.safetensors", {"a": torch.arange(20.0), "b": torch.ones(3, dtype=torch.int64)}
    classes = '["\\"finetune_crc32\\":\\"00000000\\""]'  # a text that looks like the place of the checksum
    save_file(tensors, path, metadata={"classes": classes, CHECKSUM_KEY: PLACEHOLDER})
    put_checksum(path)
    assert check_checksum(path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    data = path.read_bytes()
    key = data.index(CHECKSUM_KEY.encode() + b'":"')
    for place in set(range(len(data))) - set(range(key - 1, key + len(CHECKSUM_KEY) + 3)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        # A length of the header that has become shorter hides the checksum; the library refuses such a header.
        with pytest.raises(DamagedError), damaged_if_unreadable(path):
            check_checksum(path)
            load_file(path)


def test_a_safetensors_file_of_another_program_has_no_checksum(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", metadata={"classes": "[]"})
    assert not check_checksum(tmp_path / "w.safetensors")


ODD = [
    NotImplementedError("that compression method"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    struct.error("x"),
]
ODD += [KeyError("name"), IndexError(), EOFError(), OverflowError(), RuntimeError("encrypted"), zlib.error("x")]
ODD += [OSError("bad content"), OSError(errno.EINVAL, "Invalid argument"), RecursionError(), AssertionError()]


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_what_libraries_raise_on_damage_is_one_error(error: Exception) -> None:
    with pytest.raises(DamagedError, match="a/b"), damaged_if_unreadable(Path("a/b")):
        raise error


STAYS = [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left"), PermissionError(13, "no")]
STAYS += [FileNotFoundError(2, "no"), UserError("said already"), MemoryError(), KeyboardInterrupt(), SystemExit()]


@pytest.mark.parametrize("error", STAYS, ids=repr)
def test_errors_of_the_disk_of_memory_and_stops_are_no_damage(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, damaged_if_unreadable(Path("a/b")):
        raise error
    assert found.value is error
