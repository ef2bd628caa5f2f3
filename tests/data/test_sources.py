"""Laws of the sources and of selection: tables, shards, data sets of libraries; classes, folds, shots, balance."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import struct
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.config import Balance, Conf, DataConf, SourceKind, find_problems
from finetune.data import ImageError, Source, open_source
from finetune.data.loading.order import epoch_order, most_showings
from finetune.data.packed import PackedStrings
from finetune.data.selection import class_weights
from finetune.data.sources import table_formats
from finetune.data.sources.tables import find_table
from finetune.data.streams import mix, ranks

Rows = list[tuple[str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Twelve images of each of three classes, and (path, label) of each."""
    found = []
    for value, name in enumerate(("2", "10", "ä b")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (9, 7), (value * 80, i * 20, 0)).save(tmp_path / "images" / name / f"{i}.png")
            found.append((f"images/{name}/{i}.png", name))
    return found


def write_csv(path: Path, header: list[str], rows: list[tuple[object, ...]], separator: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def table(path: Path, **changes: object) -> Source:
    return open_source(DataConf(source=SourceKind.table, table=str(path), **changes))  # type: ignore[arg-type]


def labelled(source: Source) -> dict[str, tuple[str, object]]:
    """Name -> (split, label in words), of every image."""
    found: dict[str, tuple[str, object]] = {}
    for name, split in source.splits.items():
        for i, label in enumerate(split.labels):
            words: object = source.classes[int(label)] if label.ndim == 0 else label.tolist()
            assert split.name_of(i) not in found
            found[split.name_of(i)] = (name, words)
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_format_says_the_same(tmp_path: Path, rows: Rows) -> None:
    write_csv(tmp_path / "a.csv", ["path", "label"], [*rows])
    write_csv(tmp_path / "a.tsv", ["more", "label", "path"], [("", label, path) for path, label in rows], "\t")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes()))
    lines = [json.dumps({"label": label, "path": path}) for path, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    expected = labelled(table(tmp_path / "a.csv"))
    assert {words for _, words in expected.values()} == {"2", "10", "ä b"} and len(expected) == 36
    for name in ("a.tsv", "a.csv.gz", "a.jsonl"):
        source = table(tmp_path / name)
        assert source.classes == ("2", "10", "ä b") and labelled(source) == expected
    assert torch.equal(source.splits["val"].load(0), open_source(folder(tmp_path)).splits["val"].load(0))


def folder(tmp_path: Path) -> DataConf:
    return DataConf(source=SourceKind.folder, root=str(tmp_path / "images"))


def test_parquet_says_the_same(tmp_path: Path, rows: Rows) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    expected = labelled(table(write_csv(tmp_path / "a.csv", ["path", "label"], [*rows])))
    paths, labels = [path for path, _ in rows], [label for _, label in rows]
    parquet.write_table(pa.table({"path": paths, "label": labels}), tmp_path / "a.parquet", row_group_size=5)
    assert labelled(table(tmp_path / "a.parquet")) == expected
    numbers = pa.table({"path": paths, "label": [i % 11 for i in range(36)]})
    parquet.write_table(numbers, tmp_path / "n.parquet")
    assert table(tmp_path / "n.parquet").classes == tuple(map(str, range(11)))
    parquet.write_table(pa.table({"path": paths, "label": [[label, "x"] for label in labels]}), tmp_path / "m.parquet")
    assert table(tmp_path / "m.parquet").is_multilabel
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet: cannot be read"):
        table(tmp_path / "bad.parquet")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1, 5, 16_384])
def test_a_table_says_the_same_however_it_is_cut_into_blocks(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch, end: str, block: int
) -> None:
    monkeypatch.setattr(table_formats, "ROWS", block)

    def write(quoted: int, more: str = "", last: str = end) -> Path:
        """A table whose row `quoted` has a line break within quotes, and `more` behind it."""
        lines = ["path,label", *(f"{path},{label}" for path, label in rows)]
        lines[quoted:quoted] = [f'"q.png","2{end}"{more}'] if quoted else []
        (tmp_path / "a.csv").write_bytes((end.join(lines) + last).encode())
        return tmp_path / "a.csv"

    expected = labelled(table(write_csv(tmp_path / "b.csv", ["path", "label"], [*rows])))
    (tmp_path / rows[-1][0]).unlink()
    for last in (end, "", 2 * end):
        assert labelled(table(write(0, last=last))) == expected
    for place in (1, 20, 36):
        assert set(labelled(table(write(place)))) == {*expected, str(tmp_path / "q.png")}
        found = find_table(DataConf(source=SourceKind.table, table=str(write(place)))).store
        for row, number in ((place - 1, place + 2), (36, 39)):  # that of its last line
            with pytest.raises(ImageError, match=rf"a\.csv, row {number}\)"):
                found.read(row)
        with pytest.raises(ValueError, match=rf"row {place + 2} has 3 cells"):
            table(write(place, more=",x"))


def test_several_labels_a_cell(tmp_path: Path, rows: Rows) -> None:
    cells = [(path, f"{label}| wet" if i % 3 else label if i else "") for i, (path, label) in enumerate(rows)]
    source = table(write_csv(tmp_path / "m.csv", ["path", "label"], [*cells]), label_separator="|")
    assert source.is_multilabel and source.classes == ("2", "10", "wet", "ä b")
    found = labelled(source)
    assert len(found) == 36
    assert found[str(tmp_path / rows[0][0])][1] == [0, 0, 0, 0]
    assert found[str(tmp_path / rows[1][0])][1] == [1, 0, 1, 0]
    few = table(tmp_path / "m.csv", label_separator="|", classes=["wet", "10"])
    assert few.classes == ("10", "wet") and len(labelled(few)) == 28 and few.splits["train"].labels.shape[1] == 2
    shots = table(tmp_path / "m.csv", label_separator="|", shots=2).splits["train"]
    assert (shots.labels.sum(0) >= 2).all() and len(shots) <= 8
    lists = [json.dumps({"path": path, "label": [x.strip() for x in cell.split("|") if x]}) for path, cell in cells]
    (tmp_path / "m.jsonl").write_text("\n".join(lists))
    assert labelled(table(tmp_path / "m.jsonl")) == found


def test_split_column_and_root(tmp_path: Path, rows: Rows) -> None:
    words = ["train", "Train", "dev", "test "]
    cells = [(Path(path).relative_to("images"), label, words[i % 4]) for i, (path, label) in enumerate(rows)]
    (tmp_path / "t").mkdir()
    path = write_csv(tmp_path / "t" / "a.csv", ["file", "kind", "part"], [*cells])
    columns = {"path_column": "file", "label_column": "kind", "split_column": "part"}
    source = table(path, root=str(tmp_path / "images"), **columns)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 18, "val": 9, "test": 9}
    assert source.splits["test"].load(3).shape == (3, 7, 9)
    cut = table(path, root=str(tmp_path / "images"), path_column="file", label_column="kind")
    assert labelled(cut).keys() == labelled(source).keys()


def test_what_is_wrong_with_a_table_is_said_by_row(tmp_path: Path, rows: Rows) -> None:
    def refused(content: str | list[tuple[object, ...]], *words: str, name: str = "a.csv", **changes: object) -> None:
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        else:
            write_csv(path, ["path", "label"], content)
        with pytest.raises(ValueError) as caught:
            table(path, **changes)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value

    refused("path,labels\na,b\n", "no column label", "did you mean 'labels'", "path, labels")
    refused("path,label,label\na,b,c\n", "two columns called label")
    refused("path,label\n", "has no rows")
    refused("path,label\na,b\nc\n", "row 3 has 1 cells where the first line has 2")
    refused('path,label\na,"b\n', "row 2", "unexpected end of data")
    refused([*rows, ("", "x"), ("p", " ")], "2 rows cannot be used", "row 38 has no path", "row 39 has no label")
    refused([*rows, (rows[3][0], "10")], "with several labels", f"{rows[3][0]} in rows 5 and 38", "label_separator")
    refused([(f"{i}", i * 0.37) for i in range(9)], "too few images", "0.37 (1)")
    refused("{}\n", "row 1", "no column path", name="a.jsonl")
    refused('{"path": 1}\nnone\n', "row 1", "it has path", name="a.jsonl")
    refused('{"path": "a", "label": {"x": 1}}\n', "row 1 has label=\"{'x': 1}\"", name="a.jsonl")
    refused("x", "ends in .csv", name="a.xlsx")
    refused([*((*row,) for row in rows)], "no column split", split_column="split")
    with pytest.raises(FileNotFoundError):
        table(tmp_path / "nowhere.csv")


def test_repeated_rows_are_said(tmp_path: Path, rows: Rows) -> None:
    source = table(write_csv(tmp_path / "a.csv", ["path", "label"], [*rows, rows[3]]))
    assert len(source.warnings) == 1 and "in 1 row," in source.warnings[0] and "rows 5 and 38" in source.warnings[0]
    other = (rows[30][0].replace("ä", "a\u0308"), rows[30][1])  # the same name, as another file system writes it
    source = table(write_csv(tmp_path / "a.csv", ["path", "label"], [*rows, other]))
    assert len(source.warnings) == 1 and "in 1 row," in source.warnings[0] and "rows 32 and 38" in source.warnings[0]


def test_long_lists_of_names_are_exact() -> None:
    names = ["", "a", "ü" * 300, "日本.jpg", "\udcff\n", "b"] * 900
    packed = PackedStrings(iter(names))
    assert list(packed) == names and [packed[i] for i in range(len(names))] == names and len(packed) == len(names)
    assert list(PackedStrings([])) == []
    assert ranks("split", 3, ["a", "ü\udcff"]).tolist() == [mix("split", 3, "a"), mix("split", 3, "ü\udcff")]
    assert ranks("split", 0, ["u\u0308"]) == ranks("split", 0, ["ü"])  # as another file system writes it
    assert (ranks("split", 3, packed) == ranks("split", 3, names)).all()


# --- shards ----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shards(root: Path | str, **changes: object) -> Source:
    return open_source(DataConf(source=SourceKind.webdataset, root=str(root), **changes))  # type: ignore[arg-type]


def test_shards_give_the_bytes_that_were_packed(tmp_path: Path, rows: Rows) -> None:
    for number in range(3):
        files: dict[str, bytes] = {}
        for i, (path, label) in enumerate(rows[number::3]):
            files[f"d/{i:03}.png"] = (tmp_path / path).read_bytes()
            files[f"d/{i:03}.{'cls' if number else 'json'}"] = (
                label.encode() if number else json.dumps({"label": label}).encode()
            )
        write_shard(tmp_path / "s" / f"t-{number + 8}.tar", files)
    source = shards(tmp_path / "s")
    assert source.classes == ("2", "10", "ä b") and len(labelled(source)) == 36
    assert (
        labelled(source)
        == labelled(shards(tmp_path / "s" / "t-{8..10}.tar"))
        == labelled(shards(tmp_path / "s" / "*.tar"))
    )
    expected = {(tmp_path / path).read_bytes(): label for path, label in rows}
    for split in source.splits.values():
        for i, row in enumerate(split.rows.tolist()):
            assert expected.pop(split.store.read(row)) == source.classes[int(split.labels[i])]
            assert split.store.header(row)[:2] == split.load(i).shape[1:]
    assert not expected


def test_shards_with_splits_and_names(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (3, 3)).save(image, "PNG")
    for split, count in {"train": 8, "test": 4}.items():
        files = {}
        for i in range(count):
            files |= {f"{i}.png": image.getvalue(), f"{i}.cls": str(i % 2 + 1).encode()}
        write_shard(tmp_path / split / "0.tar", files)
    assert shards(tmp_path).classes == ("1", "2")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    source = shards(tmp_path, classes=["dog", "bird"])
    assert source.classes == ("dog", "bird") and len(source.splits["test"]) == 4
    write_shard(tmp_path / "train" / "1.tar", {"x.png": image.getvalue()})
    with pytest.raises(ValueError, match=r"1 image without a label, such as x\.png"):
        shards(tmp_path)
    (tmp_path / "train" / "1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"1\.tar is damaged"):
        shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.tar files"):
        shards(tmp_path / "nowhere")


def test_a_shard_that_breaks_off_between_two_images_is_damaged(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {f"{i}.{end}": b"1" for i in range(9) for end in ("png", "cls")})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: 4 * 1024])
    with pytest.raises(ValueError, match=r"0\.tar is damaged .*breaks off at byte 4,096"):
        shards(tmp_path)
    (tmp_path / "0.tar").write_bytes(whole[: 4 * 1024] + b"x" * 512 + whole[4 * 1024 + 512 :])
    with pytest.raises(ValueError, match=r"0\.tar is damaged"):
        shards(tmp_path)


@pytest.mark.parametrize("names", ["{split}/{n}.tar", "{split}-{n}.tar", "set_{split}.{n}.tar"])
def test_splits_by_the_names_of_shards(tmp_path: Path, rows: Rows, names: str) -> None:
    for split in ("train", "validation", "test"):
        for n in range(2):
            files: dict[str, bytes] = {}
            for i, (path, label) in enumerate(rows[n::2]):
                files |= {f"{split}{i}.png": (tmp_path / path).read_bytes(), f"{split}{i}.cls": label.encode()}
            write_shard(tmp_path / "s" / names.format(split=split, n=n), files)
    everything = str(tmp_path / "s" / names.format(split="{train,validation,test}", n="{1..0}"))
    for root in (everything, f"{everything}::{everything}"):
        source = shards(root)
        for mine, word in (("train", "train"), ("val", "validation"), ("test", "test")):
            split = source.splits[mine]
            assert len(split) == len(rows) and all(f"/{word}" in split.name_of(i) for i in range(len(split)))
    only = shards(everything.replace("{train,validation,test}", "test"))
    assert sum(map(len, only.splits.values())) == len(rows)  # one word only: cut by seed


# --- data sets of libraries ------------------------------------------------------------------------------------------


def torchvision(root: Path, name: str, **changes: object) -> Source:
    return open_source(DataConf(source=SourceKind.torchvision, name=name, root=str(root), **changes))  # type: ignore[arg-type]


def test_torchvision_keeps_its_splits_and_labels(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 255, (60, 28, 28), dtype=np.uint8)
    for start, count in (("train", 60), ("t10k", 30)):
        (raw / f"{start}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, count, 28, 28) + images[:count].tobytes()
        )
        (raw / f"{start}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, count) + bytes(i % 10 for i in range(count))
        )
    source = torchvision(tmp_path, "MNIST")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 50, "val": 10, "test": 30}
    assert source.classes[3] == "3 - three" and source.splits["test"].labels.tolist() == [i % 10 for i in range(30)]
    assert (source.splits["test"].load(7).numpy() == images[7]).all()
    before = [source.splits["test"].store.stamp(int(row)) for row in source.splits["test"].rows]
    images[7] += 1  # a changed file is another image, and only that one
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:16] + images[:30].tobytes())
    again = torchvision(tmp_path, "MNIST").splits["test"]
    after = [again.store.stamp(int(row)) for row in again.rows]
    assert [i for i in range(30) if before[i] != after[i]] == [7] and len(set(after)) == 30


def test_torchvision_without_splits_of_its_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "eurosat" / "2750" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "eurosat" / "2750" / name / f"{i}.jpg")
    source = torchvision(tmp_path, "EuroSAT")
    assert source.classes == ("a", "b") and {n: len(s) for n, s in source.splits.items()} == {
        "train": 16,
        "val": 2,
        "test": 2,
    }


def test_torchvision_refuses_what_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such data set \(did you mean 'CIFAR10'\?\)"):
        torchvision(tmp_path, "CIFAR")
    with pytest.raises(ValueError, match=r"data\.download=true fetches it"):
        torchvision(tmp_path, "CIFAR10")
    with pytest.raises(ValueError, match="asks for"):
        torchvision(tmp_path, "CocoDetection")


def test_hugging_face_from_a_disk(tmp_path: Path, rows: Rows) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    columns = {"image": [str(tmp_path / path) for path, _ in rows], "label": [i % 3 for i in range(36)]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    named = data.cast_column("label", datasets.ClassLabel(names=["z", "y", "x"]))
    datasets.DatasetDict({"train": named, "validation": named, "extra": named}).save_to_disk(str(tmp_path / "saved"))

    def hf(**changes: object) -> Source:
        return open_source(DataConf(source=SourceKind.hf, name=str(tmp_path / "saved"), **changes))  # type: ignore[arg-type]

    source = hf()
    assert source.classes == ("z", "y", "x") and "36 images in extra" in source.description
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 36, "val": 36, "test": 0}
    assert source.splits["val"].labels.tolist() == columns["label"]
    assert source.splits["val"].store.read(int(source.splits["val"].rows[5])) == (tmp_path / rows[5][0]).read_bytes()
    with pytest.raises(ValueError, match=r"data\.label_column=labels: no such column \(did you mean 'label'"):
        hf(label_column="labels")
    with pytest.raises(ValueError, match=r"data\.subset=plain would be ignored: .* was saved by save_to_disk"):
        hf(subset="plain")
    with pytest.raises(ValueError, match="no images"):
        hf(image_column="label")


def test_a_replaced_file_behind_a_data_set_of_paths_is_another_image(tmp_path: Path, rows: Rows) -> None:
    """Parquet files of cells without bytes, as other programs write them: the library's own writers copy the bytes."""
    datasets = pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets.disable_progress_bars()
    paths = [str(tmp_path / path) for path, _ in rows]
    whole, lone = (
        [{"bytes": Path(p).read_bytes(), "path": p} for p in paths],
        [{"bytes": None, "path": p} for p in paths],
    )
    cells = {"paths": lone, "mixed": whole[:-1] + lone[-1:], "bytes": whole}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for name, images in cells.items():
        (tmp_path / name).mkdir()
        columns = {"image": pyarrow.array(images, kind), "label": pyarrow.array([i % 3 for i in range(36)])}
        parquet.write_table(pyarrow.table(columns), tmp_path / name / "train-00000-of-00001.parquet")

    def opened(name: str) -> Any:
        conf = DataConf(source=SourceKind.hf, name=str(tmp_path / name), val_fraction=0.0, test_fraction=0.0)
        return open_source(conf).splits["train"]

    before = {name: opened(name).content_digest() for name in cells}
    assert before == {name: opened(name).content_digest() for name in cells}
    for path in paths:
        status = os.stat(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # as another image of the same size
    assert {name for name in cells if opened(name).content_digest() != before[name]} == {"paths", "mixed"}
    Path(paths[3]).unlink()
    split = opened("paths")
    with pytest.raises(ImageError, match=r"3\.png"):
        [split.store.stamp(row) for row in range(36)]
    assert opened("bytes").content_digest() == before["bytes"]


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"finetune\[parquet\]"):
        table(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"finetune\[hf\]"):
        open_source(DataConf(source=SourceKind.hf, name="x"))


@pytest.mark.parametrize(("version", "expected"), [("2.18.0", False), ("3.6.0", False), ("4.0.0", None)])
def test_a_script_of_a_data_set_never_runs(
    version: str, expected: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before version 4 the library runs `name/name.py` of a local folder unless it is told not to."""
    asked: dict = {}

    def load_dataset(*_: object, **options: object) -> None:
        asked.update(options)
        raise ValueError("it needs a script")

    library = types.SimpleNamespace(
        __version__=version, DownloadConfig=lambda **_: None, load_dataset=load_dataset, Image=None
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(ValueError, match="cannot be opened: it needs a script"):
        open_source(DataConf(source=SourceKind.hf, name=str(tmp_path)))
    assert asked.get("trust_remote_code") is expected


@pytest.mark.parametrize("name", ["LSUN", "LSUNClass"])
def test_a_data_set_that_unpickles_a_file_of_the_current_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pickle.*data=folder"):
        open_source(DataConf(source=SourceKind.torchvision, name=name, root=str(tmp_path)))


# --- selection -------------------------------------------------------------------------------------------------------


def parts(**changes: object) -> dict[str, set[str]]:
    source = open_source(DataConf(**changes))  # type: ignore[arg-type]
    return {name: {split.name_of(i) for i in range(len(split))} for name, split in source.splits.items()}


def test_shots_and_fraction_draw_from_train_only() -> None:
    everything, eight, two = parts(), parts(shots=8), parts(shots=2)
    assert two["train"] < eight["train"] < everything["train"] and len(two["train"]) == 20 and len(eight["train"]) == 80
    assert two["val"] == everything["val"] and two["test"] == everything["test"]
    assert parts(shots=2, shots_seed=1)["train"] != two["train"]
    tenth = open_source(DataConf(test_fraction=0.3, fraction=0.1)).splits["train"]
    assert tenth.labels.bincount().tolist() == [11] * 8 + [10, 11] or set(tenth.labels.bincount().tolist()) <= {10, 11}
    assert parts(shots=10_000) == everything


def test_classes_leave_the_others_where_they_are() -> None:
    source = open_source(DataConf(classes=["7", "3"]))
    assert source.classes == ("3", "7")
    whole, few = parts(), parts(classes=["7", "3"])
    assert all(few[name] < whole[name] for name in whole)
    with pytest.raises(ValueError, match=r"no class '77' \(did you mean '7'\?\)"):
        open_source(DataConf(classes=["3", "77"]))


def test_folds_deal_train_and_val_out_once() -> None:
    whole = parts()
    folds = [parts(folds=5, fold=fold) for fold in range(5)]
    assert all(fold["test"] == whole["test"] for fold in folds)
    assert set().union(*(fold["val"] for fold in folds)) == whole["train"] | whole["val"]
    assert sum(len(fold["val"]) for fold in folds) == len(whole["train"]) + len(whole["val"])
    assert all(not fold["train"] & fold["val"] for fold in folds)
    assert max(len(fold["val"]) for fold in folds) - min(len(fold["val"]) for fold in folds) <= 1
    counts = torch.stack([open_source(DataConf(folds=5, fold=f)).splits["val"].labels.bincount() for f in range(5)])
    assert (counts.amax(0) - counts.amin(0) <= 1).all()


def test_class_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    torch.testing.assert_close(class_weights(labels, 3), torch.from_numpy(expected).float())
    source = open_source(DataConf(balance=Balance.weights))
    assert source.class_weights is not None
    assert abs(float(source.class_weights[source.splits["train"].labels].mean()) - 1) < 1e-6
    assert open_source(DataConf()).class_weights is None


@pytest.mark.parametrize("counts", [(50, 7, 3), (1, 1, 1), (10, 0, 5), (97, 2)])
def test_balanced_epochs_show_classes_equally(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    seen = set()
    for epoch in range(30):
        samples, occurrences = epoch_order(labels, seed=1, epoch=epoch, balanced=True)
        shown = labels[samples].bincount(minlength=len(counts))
        assert (
            len(samples) == len(labels)
            and shown[torch.tensor(counts) > 0].max() - shown[torch.tensor(counts) > 0].min() <= 1
        )
        pairs = set(zip(samples.tolist(), occurrences.tolist(), strict=True))
        assert len(pairs) == len(samples)  # no view of an image comes twice
        assert all((sample, k) in pairs for sample, n in pairs for k in range(n))
        seen |= set(samples.tolist())
    assert seen == set(range(len(labels)))
    again = epoch_order(labels, seed=1, epoch=3, balanced=True)
    assert torch.equal(again.samples, epoch_order(labels, seed=1, epoch=3, balanced=True).samples)
    twice = again.repeated(2)
    assert len(set(zip(*(part.tolist() for part in twice), strict=True))) == 2 * len(labels)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("counts", [(10, 10), (1, 7, 50), (2, 0, 3), (1, 0, 5, 1, 20), (1,)])
def test_how_often_an_image_comes_at_most_is_known_ahead(counts: tuple[int, ...], repeats: int, balanced: bool) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    bound = most_showings(labels, balanced=balanced, repeats=repeats)
    seen = torch.zeros_like(labels)
    for epoch in range(200):
        order = epoch_order(labels, seed=3, epoch=epoch, balanced=balanced).repeated(repeats)
        shown = order.samples.bincount(minlength=len(labels))
        assert (order.occurrences < bound[order.samples]).all() and (shown <= bound).all()
        seen = torch.maximum(seen, shown)
    assert bound.dtype == torch.int64 and torch.equal(seen, bound)


@pytest.mark.parametrize(("count", "images"), [(7, 3), (7, 7), (5, 200), (1, 4), (20, 1)])
def test_resampled_epochs_draw_with_replacement(count: int, images: int) -> None:
    labels = torch.zeros(count, dtype=torch.int64)
    seen, drawn = torch.zeros(count), 0
    for epoch in range(300):
        order = epoch_order(labels, seed=1, epoch=epoch, balanced=False, images=images)
        assert len(order.samples) == images
        before: dict[int, int] = {}
        for sample, occurrence in zip(order.samples.tolist(), order.occurrences.tolist(), strict=True):
            assert occurrence == before.get(sample, 0)
            before[sample] = occurrence + 1
        seen += order.samples.bincount(minlength=count)
        drawn += images
    share = seen / drawn
    error = (1 / count * (1 - 1 / count) / drawn) ** 0.5
    assert ((share - 1 / count).abs() <= 5 * error).all()  # five standard deviations of a binomial share
    again = epoch_order(labels, seed=1, epoch=3, balanced=False, images=images)
    assert torch.equal(again.samples, epoch_order(labels, seed=1, epoch=3, balanced=False, images=images).samples)
    if images > 1 and count > 1:
        other = epoch_order(labels, seed=2, epoch=3, balanced=False, images=images)
        assert not torch.equal(again.samples, other.samples)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "x"}, "data.root=x would be ignored: data=digits is bundled"),
        ({"source": SourceKind.folder}, "data=folder needs data.root=PATH"),
        ({"source": SourceKind.folder, "root": "x", "table": "y"}, "data.table=y would be ignored"),
        ({"source": SourceKind.table}, "data=table needs data.table=PATH"),
        ({"source": SourceKind.torchvision, "root": "x"}, "data=torchvision needs data.name=CLASS"),
        ({"source": SourceKind.hf, "name": "x", "label_separator": "|"}, "data.label_separator=| would be ignored"),
        ({"source": SourceKind.webdataset, "root": "x", "download": True}, "data.root=x is neither a URL nor"),
        ({"epoch_images": 9, "balance": Balance.sampling}, "both say how often images come"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 3, "fold": 3}, "expected 0 to 2"),
        ({"fold": 1}, "would be ignored: data.folds=0"),
        ({"folds": 3, "val_fraction": 0.2}, "data.val_fraction=0.2 would be ignored"),
        ({"shots": 2, "fraction": 0.5}, "exclude each other"),
        ({"shots_seed": 2}, "data.shots_seed=2 would be ignored"),
        ({"classes": ["3"]}, "one class"),
        ({"classes": ["3", "4", "3"]}, "twice"),
        ({"workers": "many"}, "expected auto or a number"),
    ],
)
def test_settings_that_do_nothing_are_errors(changes: dict[str, object], words: str) -> None:
    problems = find_problems(Conf(data=DataConf(**changes)))  # type: ignore[arg-type]
    assert len(problems) == 1 and words in problems[0], problems


def test_every_setting_of_the_data_has_a_reader() -> None:
    """For every source: its own settings pass, every other source's are refused."""
    from finetune.config.data import _NEEDS, _READERS

    for kind in SourceKind:
        needed = {name: "https://x/0.tar" if name == "root" else "x" for name in _NEEDS[kind]}
        assert find_problems(Conf(data=DataConf(source=kind, **needed))) == []  # type: ignore[arg-type]
        for name, readers in _READERS.items():
            value = {"download": True, "group": "similar"}.get(name, "y")
            problems = find_problems(Conf(data=DataConf(**{"source": kind, **needed, name: value})))  # type: ignore[arg-type]
            assert (kind in readers) == (problems == []), (kind, name, problems)
