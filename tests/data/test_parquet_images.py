"""Images in a column of a Parquet file: the same pictures and labels as in a folder, read one row group at a time."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.__main__ import main
from finetune.config import DataConf, SourceKind
from finetune.data.images.decode import ImageError
from finetune.data.sources import open_source, parquet_images
from finetune.data.sources.tables import find_table
from finetune.system.errors import UserError
from finetune.system.limits import Limit

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402


def write(path: Path, images: list[Any], labels: list[Any], **more: Any) -> Path:
    parquet.write_table(pa.table({"image": images, "label": labels, **more}), path, row_group_size=7)
    return path


def conf(path: Path, **more: Any) -> DataConf:
    more = {"path_column": "image", **more}
    return DataConf(source=SourceKind.table, table=str(path), cache_dir=str(path.parent / "cache"), **more)


@pytest.fixture
def files(stripes: Path) -> list[Path]:
    return sorted(stripes.glob("*/*.png"))


@pytest.mark.parametrize("form", ["struct", "plain", "large"])
def test_images_and_labels_are_those_of_the_files(tmp_path: Path, files: list[Path], form: str) -> None:
    cells: Any = [file.read_bytes() for file in files]
    if form == "struct":
        cells = [{"bytes": cell, "path": None} for cell in cells]
    elif form == "large":
        cells = pa.array(cells, pa.large_binary())
    words = [["train", "val", "test"][number % 3] for number in range(len(files))]
    path = write(tmp_path / "a.parquet", cells, [file.parent.name for file in files], part=words)
    found = find_table(conf(path, split_column="part"))
    assert found.classes == ("across", "down", "flat") and found.given.tolist() == [0, 1, 2] * (len(files) // 3)
    for row in (0, 6, 7, 59, 3):
        assert found.store.read(row) == files[row].read_bytes()
        assert found.store.name_of(row) == f"{path}: image[{row + 1}]"
    copy = pickle.dumps(found.store)
    assert len(copy) < 2000 and pickle.loads(copy).read(8) == files[8].read_bytes()


def test_equal_images_stay_in_one_split_wherever_the_file_lies(tmp_path: Path, files: list[Path]) -> None:
    cells = [file.read_bytes() for file in files]
    labels = [file.parent.name for file in files]
    cells[19], cells[1] = cells[0], cells[0]
    first = open_source(conf(write(tmp_path / "a.parquet", cells, labels)))
    assert "3 images of 1 group that stay together" in first.description
    inside = [len({0, 1, 19} & set(split.rows.tolist())) for split in first.splits.values()]
    assert sorted(inside) == [0, 0, 3]
    os.rename(tmp_path / "a.parquet", tmp_path / "b.parquet")
    second = open_source(conf(tmp_path / "b.parquet"))
    for name, split in first.splits.items():
        assert torch.equal(split.rows, second.splits[name].rows)


def test_a_replaced_file_is_read_anew(tmp_path: Path, files: list[Path]) -> None:
    labels = [file.parent.name for file in files]
    path = write(tmp_path / "a.parquet", [file.read_bytes() for file in files], labels)
    store = find_table(conf(path)).store
    before, stamp = store.read(0), store.stamp(0)
    write(path, [file.read_bytes() for file in files[::-1]], labels)
    os.utime(path, ns=(1, 1))
    assert store.read(0) == files[-1].read_bytes() != before and store.stamp(0) != stamp
    path.write_bytes(b"PAR1")
    with pytest.raises(ImageError, match=r"a\.parquet: image\[1\]"):
        store.read(0)


def test_limits_and_faults_are_named(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cells: list[bytes | None] = [file.read_bytes() for file in files[:25]]
    cells[3] = None
    path = write(tmp_path / "a.parquet", cells, ["a", "b"] * 12 + ["a"])
    store = find_table(conf(path)).store
    with pytest.raises(ImageError, match=r"image\[4\]: .*the cell has no bytes"):
        store.load(3)
    store.max_pixels = 1
    with pytest.raises(ImageError, match=r"image\[1\]: .*data\.max_image_mib"):
        store.load(0)
    with pytest.raises(UserError, match=r"data\.root=x would be ignored: .* holds images"):
        find_table(conf(path, root="x"))
    monkeypatch.setattr(parquet_images, "ROW_GROUP", Limit(100, "smaller ones"))
    with pytest.raises(UserError, match=r"row group 0 of image: has .* and at most 100 bytes .*; smaller ones"):
        find_table(conf(path))


def test_row_groups_that_are_slow_to_read_are_said(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", [file.read_bytes() for file in files], [file.parent.name for file in files])
    assert not find_table(conf(path)).warnings
    monkeypatch.setattr(parquet_images, "SLOW", 1000)
    (warning,) = find_table(conf(path)).warnings
    assert "each image is read by unpacking" in warning and "its row group of 7 images; write the table anew" in warning


def test_a_row_group_that_holds_more_than_it_claims_is_refused(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [file.read_bytes() for file in files]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": cells, "label": [file.parent.name for file in files]}), path)
    store = find_table(conf(path)).store
    assert [store.read(row) for row in (59, 0, 16, 15)] == [cells[59], cells[0], cells[16], cells[15]]
    monkeypatch.setattr(parquet_images, "ROW_GROUP", Limit(100_000, ""))
    large = cells[0] + bytes(10_000)  # written once, as the only word of a dictionary, and so claimed once
    parquet.write_table(pa.table({"image": [large] * 100, "label": ["a", "b"] * 50}), path)
    store = find_table(conf(path)).store
    with pytest.raises(ImageError, match=r"its row group holds more than it claims, .*row_group_size="):
        store.read(0)


def test_cells_without_bytes_say_what_else_they_have(tmp_path: Path, files: list[Path]) -> None:
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    cells[4] = {"bytes": None, "path": "x.png"}
    store = find_table(conf(write(tmp_path / "a.parquet", cells, [file.parent.name for file in files]))).store
    with pytest.raises(ImageError, match=r"image\[5\]: .*no bytes of an image, only the path x\.png: data=hf reads"):
        store.load(4)


def test_one_of_several_files_is_said(tmp_path: Path, files: list[Path]) -> None:
    cells, labels = [file.read_bytes() for file in files], [file.parent.name for file in files]
    for count, warned in ((2, True), (1, False)):
        path = write(tmp_path / f"train-00000-of-{count:05}.parquet", cells, labels)
        told = [line for line in find_table(conf(path)).warnings if "is one of 2 files" in line]
        pattern = tmp_path / "train-*-of-00002.parquet"
        assert len(told) == warned and all(f"'data.table={pattern}' reads all" in line for line in told)


def test_predict_and_embed_read_such_a_table(folder: Path, files: list[Path]) -> None:
    cells: list[Any] = [file.read_bytes() for file in files[:20]]
    cells[3] = b"no picture"
    write(folder / "a.parquet", cells, ["a"] * 20)
    (folder / "plain").mkdir()
    for number, cell in enumerate(cells):
        (folder / "plain" / f"{number:02}.png").write_bytes(cell)
    words = ["model=clip", "--classes", "one,two", "--batch-size", "8"]
    assert main(["predict", *words, "a.parquet", "--path-column", "image", "--out", "table.csv"]) == 1
    assert main(["predict", *words, "plain", "--out", "files.csv"]) == 1
    found, plain = (list(csv.DictReader(Path(n).read_text().splitlines())) for n in ("table.csv", "files.csv"))
    names = [f"a.parquet: image[{number + 1}]" for number in range(20) if number != 3]
    assert [row["path"] for row in found] == names and len(plain) == 19
    assert [row["probability"] for row in found] == [row["probability"] for row in plain]
    assert "a.parquet: image[4]" in Path("table.csv.unreadable.csv").read_text()
    assert main(["embed", *words, "a.parquet", "plain", "--path-column", "image", "--out", "both.npy"]) == 1
    features = np.load("both.npy")
    assert len(features) == 38 and np.allclose(features[:19], features[19:], atol=1e-5)


def test_a_run_with_workers_resumes_and_equals_a_run_on_the_files(folder: Path, files: list[Path]) -> None:
    words = [["train", "val", "test"][number % 3] for number in range(len(files))]
    labels = [file.parent.name for file in files]
    path = write(folder / "a.parquet", [file.read_bytes() for file in files], labels, part=words)
    header = "path,label,part\n"
    rows = [f"{file},{label},{word}\n" for file, label, word in zip(files, labels, words, strict=True)]
    (folder / "a.csv").write_text(header + "".join(rows))
    more = ["data=table", "data.split_column=part", "train.epochs=2", "data.batch_size=8", "augment=none"]
    byte = [*more, f"data.table={path}", "data.path_column=image", "data.workers=1"]
    assert main([*byte, "train.epochs=1", "hydra.run.dir=parquet"]) == 0
    assert main(["resume=parquet", "train.epochs=2"]) == 0
    assert main([*more, "data.table=a.csv", "data.workers=0", "train.epochs=1", "hydra.run.dir=csv"]) == 0
    assert main(["resume=csv", "train.epochs=2"]) == 0
    both = [json.loads(Path(name, "result.json").read_text()) for name in ("parquet", "csv")]
    assert both[0]["test/top1"] == both[1]["test/top1"] and both[0]["data"] == both[1]["data"]
    losses = [Path(name, "history.jsonl").read_text().splitlines()[-1] for name in ("parquet", "csv")]
    assert json.loads(losses[0])["train/loss"] == json.loads(losses[1])["train/loss"]
