"""Laws of files that claim too much: each is refused in one line, which names it, before memory is asked for."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConf, SourceKind
from finetune.data import open_source
from finetune.data.images.decode import ImageError, decode
from finetune.data.sources import table_formats, tables
from finetune.data.sources.data_files import expand_braces
from finetune.data.sources.shard_lists import SHARDS
from finetune.data.sources.tables import find_table
from finetune.models.heads.zeroshot import read_class_names
from finetune.system.errors import UserError
from finetune.system.limits import NAMES, read_text, text_limit
from finetune.system.natural import natural_key

TB = 2**40


def picture(seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


# --- tar shards ------------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(text: bytes) -> bytes:
    return header("pax", len(text), tarfile.XHDTYPE) + padded(text)


def record(key: str, value: str) -> bytes:
    length = next(n for n in range(9999) if len(f"{n} {key}={value}\n") == n)
    return f"{length} {key}={value}\n".encode()


SAMPLE = b"".join(
    header(f"{i}s.png", len(picture(i))) + padded(picture(i)) + header(f"{i}s.cls", 1) + padded(str(i % 2).encode())
    for i in range(20)
)
DAMAGED: dict[str, bytes] = {
    "a member of 1 TB": SAMPLE + header("1.cls", 1) + padded(b"1") + header("1.png", TB),
    "a label of 1 TB": SAMPLE + header("1.cls", TB),
    "a size beyond 64 bits": SAMPLE + header("1.png", 2**70),
    "a negative size": SAMPLE + header("1.png", 0)[:124] + b"\xff" * 12 + header("1.png", 0)[136:],
    "a pax header of 1 TB": SAMPLE + header("p", TB, tarfile.XHDTYPE),
    "a global pax header of 1 TB": SAMPLE + header("p", TB, tarfile.XGLTYPE),
    "a long name of 1 TB": SAMPLE + header("p", TB, tarfile.GNUTYPE_LONGNAME),
    "a long name of 2 GiB": SAMPLE + header("p", 2**31, tarfile.GNUTYPE_LONGNAME) + bytes(2**20),
    "a size of 5,000 digits": SAMPLE + pax(b"5012 size=" + b"9" * 5000 + b"\n") + header("1.png", 1) + padded(b"x"),
    "a record of 5,000 digits": SAMPLE + pax(b"9" * 5000 + b" size=1\n") + header("1.png", 1) + padded(b"x"),
    "a pax size of 1 TB": SAMPLE + pax(record("size", str(TB))) + header("1.png", 1) + padded(b"x"),
    "headers in headers": SAMPLE + pax(b"") * 3000,
    "a sparse map without an end": SAMPLE
    + pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"))
    + header("1.png", 512)
    + padded(b"999999999\n"),
    "a sparse map of letters": SAMPLE
    + pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"))
    + header("1.png", 512)
    + padded(b"x\ny\n"),
    "an old sparse file": SAMPLE + header("1.png", 8, tarfile.GNUTYPE_SPARSE) + padded(b"12345678"),
}


@pytest.mark.parametrize("name", list(DAMAGED))
@pytest.mark.parametrize("tail", [0, 2**41], ids=["short", "a sparse file of 2 TB"])
def test_a_shard_that_claims_too_much_is_damaged(tmp_path: Path, name: str, tail: int) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(DAMAGED[name] + bytes(1024) * name.startswith("an old"))
    if tail:
        try:
            with open(path, "r+b") as file:
                file.truncate(tail)
        except OSError:
            pytest.skip("no files of 2 TB here")
    with pytest.raises(UserError) as error:
        source = open_source(DataConf(source=SourceKind.webdataset, root=str(tmp_path)))
        # A whole archive, of which an image is too large: it is one that cannot be read.
        for split in source.splits.values():
            for index in range(len(split)):
                split.load(index)
    assert str(tmp_path / "0.tar") in str(error.value) and len(str(error.value)) < 600


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def opened_shard(folder: Path, label: bytes, ending: str = "json", **settings: Any) -> Any:
    files: dict[str, bytes] = {}
    for i in range(20):
        files |= {f"{i}.png": picture(i), f"{i}.{ending}": label if i == 7 else json.dumps({"label": i % 2}).encode()}
        if ending == "cls" and i != 7:
            files[f"{i}.cls"] = str(i % 2).encode()
    write_shard(folder / "0.tar", files)
    return open_source(DataConf(source=SourceKind.webdataset, root=str(folder), **settings))


def test_labels_of_shards_have_limits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.tar: 7\.json: has 1\.\d\d MiB, .*data\.max_text_mib \(now 1\) raises"):
        opened_shard(tmp_path, json.dumps({"label": 1, "x": "y" * 1_100_000}).encode(), max_text_mib=1)
    opened_shard(tmp_path, json.dumps({"label": 1, "x": "y" * 1_100_000}).encode(), max_text_mib=2)
    for label in (b"[" * 200_000, b'{"label": ' + b"7" * 5000 + b"}"):
        with pytest.raises(UserError, match=r"1 image without a label, such as 7\.png"):
            opened_shard(tmp_path, label)
    with pytest.raises(UserError, match=r"0\.tar: 7\.png has a label of 5,000 letters, at most 4,096"):
        opened_shard(tmp_path, b"7" * 5000, "cls")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"classes\.txt: has 2 names, expected one for each label up to 7777"):
        opened_shard(tmp_path, b"7" * 4000, "cls")


def test_a_list_of_class_names_has_a_limit_and_a_name(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    with open(names, "wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(UserError, match=r"classes\.txt: has 5\.00 GiB, and at most 16\.0 MiB .*data\.max_text_mib"):
        opened_shard(tmp_path, b"1", "cls")
    with pytest.raises(UserError, match=r"model\.class_names=.*classes\.txt: has 5\.00 GiB"):
        read_class_names(names, ["a", "b"])
    names.write_bytes("cat\nd\u00f6g\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.root: .*classes\.txt: line 2 is no UTF-8"):
        opened_shard(tmp_path, b"1", "cls")
    with pytest.raises(UserError, match=r"model\.class_names=.*classes\.txt: line 2 is no UTF-8"):
        read_class_names(names, ["a", "b"])
    names.write_bytes("\ufeffcat\nd\u00f6g\n".encode())  # a byte order mark is no part of a name
    assert opened_shard(tmp_path, b"1", "cls").classes == ("cat", "d\u00f6g")
    assert read_class_names(names, ["a", "b"]) == ["cat", "d\u00f6g"]


def test_a_pattern_names_a_million_shards_at_most() -> None:
    bombs = ["{0..99999999}", "{000000..99999999}.tar", "{0..999}" * 3, "{a,b}" * 40, "{0.." + "9" * 5000 + "}"]
    for pattern in bombs:
        with pytest.raises(UserError, match=r"at most 1,000,000 shards can be used; .*typing mistake"):
            expand_braces(pattern, SHARDS)
    assert expand_braces("{a,b{00..01}}-{5000000000..5000000001}", SHARDS) == [
        *("a-5000000000", "a-5000000001", "b00-5000000000", "b00-5000000001"),
        *("a-5000000000", "a-5000000001", "b01-5000000000", "b01-5000000001"),
    ]


# --- tables ----------------------------------------------------------------------------------------------------------

HEAD = b"path,label\n"


def bomb(head: bytes, mebibytes: int) -> bytes:
    """A gzip file of so many zeros behind `head`, in one line."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [squeeze.compress(head), *(squeeze.compress(b"0" * 2**20) for _ in range(mebibytes)), squeeze.flush()]
    return b"".join(parts)


TABLES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a line of 64 MiB": (
        "t.csv.gz",
        lambda: bomb(HEAD + b"a.png,", 64),
        r"row 2: has more than 16\.0 MiB; data\.max_text",
    ),
    "a first line of 64 MiB": ("t.csv.gz", lambda: bomb(b"", 64), r"row 1: has more than 16\.0 MiB"),
    "a json of 64 MiB": ("t.jsonl.gz", lambda: bomb(b'{"path": "', 64), r"row 1: has more than 16\.0 MiB"),
    "a quote that stays open": (
        "t.tsv",
        lambda: b'path\tlabel\na\t"' + (b"x" * 255 + b"\n") * 2**16,
        r"more than 16\.0 MiB",
    ),
    "brackets": ("t.jsonl", lambda: b"[" * 200_000, r"row 1: brackets stand in more brackets"),
    "digits": (
        "t.jsonl",
        lambda: b'{"path": "a", "label": ' + b"1" * 5000 + b"}",
        r"row 1 holds a number of more than",
    ),
    "a long label": ("t.csv", lambda: HEAD + b"a.png," + b"1" * 5000, r"row 2 has a label of 5,000 letters"),
    "a long path": ("t.csv", lambda: HEAD + b"a" * 5000 + b",1", r"row 2 has a path of 5,000 letters"),
    "a label beyond all numbers": ("t.jsonl", lambda: b'{"path": "a", "label": 1e400}', r"row 1 has label='inf'"),
    "a million columns": (
        "t.csv",
        lambda: b",".join(b"c%d" % i for i in range(10**6)),
        r"1,000,000 columns, and at most",
    ),
    "many columns": ("t.csv", lambda: b",".join(b"c%d" % i for i in range(10**5)), r"no column path.* and 99,980 more"),
    "half a gzip": ("t.csv.gz", lambda: gzip.compress(HEAD * 999)[:60], r"cannot be read"),
    "a gzip with other bytes": ("t.csv.gz", lambda: gzip.compress(HEAD)[:12] + b"\xff" * 80, r"cannot be read"),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_that_is_too_large_is_one_line(tmp_path: Path, name: str) -> None:
    file, content, words = TABLES[name]
    (tmp_path / file).write_bytes(content())
    with pytest.raises(UserError, match=words) as error:
        open_source(DataConf(source=SourceKind.table, table=str(tmp_path / file)))
    assert f"data.table={tmp_path / file}" in str(error.value) and len(str(error.value)) < 2000


def test_long_cells_of_other_columns_are_read(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [f'{i}.png,{i % 2},"{"x" * 200_000}"' for i in range(20)]  # csv's own limit is 128 KiB
    (tmp_path / "t.csv").write_text("\n".join(["path,label,notes", *rows]))
    conf = DataConf(source=SourceKind.table, table=str(tmp_path / "t.csv"))
    assert open_source(conf).classes == ("0", "1")
    with pytest.raises(UserError, match=r"at most|more than 1\.00 MiB; data\.max_text_mib \(now 1\) raises the limit"):
        (tmp_path / "t.csv").write_text("\n".join(["path,label,notes", *rows, f"a.png,1,{'x' * 2**21}"]))
        open_source(DataConf(source=SourceKind.table, table=str(tmp_path / "t.csv"), max_text_mib=1))


def test_many_labels_that_are_no_classes_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.system.limits.free_memory", lambda: 10_000)
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{i}.png,{i}|x\n" for i in range(100)))
    conf = DataConf(source=SourceKind.table, table=str(tmp_path / "t.csv"), label_separator="|")
    with pytest.raises(
        UserError, match=r"100 images and 101 classes needs 39\.5 KiB of memory, 9\.77 KiB are free; is"
    ):
        open_source(conf)


def test_numbers_of_any_length_have_an_order() -> None:
    words = ["10", "9", "1" * 5000, "09", "2" * 4999, "", "a", "\u0663", "4"]
    expected = ["", "\u0663", "4", "09", "9", "10", "2" * 4999, "1" * 5000, "a"]
    assert sorted(words, key=natural_key) == expected


# --- images ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *chunks: bytes) -> bytes:
    """A PNG that claims `side` pixels a side and has hardly any, with other chunks behind its header."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(2**27), 9)
IMAGES: dict[str, bytes] = {
    "60,000 pixels a side": png(60_000),
    "two thousand million pixels a side": png(2**31 - 1),
    "an ICC profile of 128 MiB": png(8, chunk(b"iCCP", b"x\0\0" + ZEROS)),
    "a text of 128 MiB": png(8, chunk(b"zTXt", b"x\0\0" + ZEROS)),
    "a text of 128 MiB in another chunk": png(8, chunk(b"iTXt", b"x\0\1\0\0\0" + ZEROS)),
    "a GIF of 65,535 pixels a side": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\0\0" + bytes(6),
    "a BMP of 10^9 pixels a side": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 10**9, 10**9, 1, 24, *[0] * 6),
    "a PPM of 10^9 pixels a side": b"P6\n1000000000 1000000000\n255\n",
    "a PPM of a number without an end": b"P6\n" + b"9" * 5000,
    "a TIFF of 10^6 tags": b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 4, 2**31, 0) * 1000,
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_an_image_that_claims_too_much_is_named(name: str) -> None:
    with pytest.raises(ImageError) as error:
        decode(IMAGES[name], "x.png")
    assert str(error.value).startswith("x.png: cannot be read as an image (") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_many_frames_only_the_first_is_read(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), i % 250, dtype=np.uint8)) for i in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
    assert decode(buffer.getvalue(), "x").shape == (3, 8, 8) and int(decode(buffer.getvalue(), "x").max()) < 9


def test_the_key_raises_the_limit_of_an_image(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "d" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (700, 700), (i, 0, 0)).save(tmp_path / "d" / label / f"{i}.png")
    conf = {"source": SourceKind.folder, "root": str(tmp_path / "d")}
    small, large = (open_source(DataConf(**conf, max_image_mib=most)) for most in (1, 2))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"more than 349,525 pixels.* data\.max_image_mib raises the limit"):
        small.splits["train"].load(0)
    assert large.splits["train"].load(0).shape == (3, 700, 700) and small.location != large.location


@pytest.mark.skipif(os.name != "posix", reason="no such files")
@pytest.mark.parametrize("ending", ["csv", "tsv.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("sort", ["pipe", "device", "folder"])
def test_a_table_that_is_no_file_is_named_and_waited_for_by_nobody(tmp_path: Path, ending: str, sort: str) -> None:
    path = tmp_path / f"t.{ending}"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[sort](path)
    with pytest.raises(
        UserError, match=rf"{re.escape(str(path))}: (cannot be read: it is no regular file|is a folder)"
    ):
        find_table(DataConf(source=SourceKind.table, table=str(path), path_column="path", label_column="label"))


@pytest.mark.skipif(os.name != "posix", reason="no such files")
def test_a_list_of_names_that_is_a_pipe_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "names.txt")
    with pytest.raises(OSError, match=r"the list: cannot be read: it is no regular file"):
        read_text(tmp_path / "names.txt", "the list", NAMES)


# --- tables that grow as they are read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_endless_empty_lines_are_refused(name: str, tmp_path: Path) -> None:
    head = b"path,label\n" if ".csv" in name else b'{"path": "a.png", "label": 1}\n'
    with gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(head + b"\n" * 2**21)
    conf = DataConf(source=SourceKind.table, table=str(tmp_path / name), max_text_mib=1)
    with pytest.raises(UserError, match=r"row [\d,]+: has more than 1\.00 MiB; data\.max_text_mib"):
        find_table(conf)


def test_one_long_text_behind_many_rows_is_read_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, text = 20_000, "x" * 5000
    ids = arrow.array(np.zeros(rows, np.int32))
    columns = {name: arrow.DictionaryArray.from_arrays(ids, arrow.array([text])) for name in ("path", "label")}
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    monkeypatch.setattr(table_formats, "BLOCK_LETTERS", 2**20)
    blocks = list(table_formats.read_blocks(str(tmp_path / "t.parquet"), ["path", "label"], text_limit(1)))
    assert max(len(block.numbers) for block in blocks) * 10_000 <= 2**20
    assert [number for block in blocks for number in block.numbers] == list(range(1, rows + 1))
    monkeypatch.setattr(tables, "MAX_PROBLEMS", 500)
    conf = DataConf(source=SourceKind.table, table=str(tmp_path / "t.parquet"))
    with pytest.raises(UserError, match=r"\d{3} rows cannot be used: row 1 .* the rest was not read"):
        find_table(conf)


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_huge_text_in_a_parquet_table_is_refused_before_it_is_copied(tmp_path: Path, is_dictionary: bool) -> None:
    """Packed it takes a few kilobytes of the file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = arrow.array([*"ab" * 10, "x" * 3_000_000])
    columns = {
        "path": [f"{i}.png" for i in range(21)],
        "label": labels.dictionary_encode() if is_dictionary else labels,
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 300_000
    limit = text_limit(1)
    with pytest.raises(UserError, match=r"t\.parquet: a text in the column label: has 2\.86 MiB, .*data\.max_text_mib"):
        list(table_formats.read_blocks(str(tmp_path / "t.parquet"), ["path", "label"], limit))
    assert (
        len(next(table_formats.read_blocks(str(tmp_path / "t.parquet"), ["path", "label"], text_limit(3))).numbers)
        == 21
    )
