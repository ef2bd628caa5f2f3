"""Several tables are read as one: a folder of them or a pattern; their names say splits by the words of shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.images.decode import ImageError
from finetune.system.errors import UserError
from tests.data.test_labels import picture, sizes

LABELS = ("cat", "dog")


def table(place: Path | str, **changes: Any) -> Source:
    return open_source(DataConf(source=SourceKind.table, table=str(place), **changes))


def write(path: Path, numbers: Sequence[int], ending: str = "csv") -> Path:
    """A table of pictures in the folder `pics` beside it; the label of picture `i` is LABELS[i % 2]."""
    (path.parent / "pics").mkdir(parents=True, exist_ok=True)
    rows = [(f"pics/{i}.png", LABELS[i % 2]) for i in numbers]
    for i in numbers:
        (path.parent / "pics" / f"{i}.png").write_bytes(picture(i))
    path = path.with_name(f"{path.name}.{ending}")
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps({"path": name, "label": label}) for name, label in rows))
    else:
        path.write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
    return path


def write_images(path: Path, numbers: Sequence[int], group_size: int = 3) -> Path:
    """A Parquet file with the pictures themselves."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(i), "path": None} for i in numbers]
    labels = [LABELS[i % 2] for i in numbers]
    parquet.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=group_size)
    return path


def seeds(source: Source, split: str, most: int = 100) -> list[int]:
    """Which pictures are in a split, by their seeds; each must have its label."""
    part = source.splits[split]
    number_of = {picture(i): i for i in range(most)}
    found = [number_of[part.store.read(int(row))] for row in part.rows]
    assert [source.classes[int(label)] for label in part.labels] == [LABELS[i % 2] for i in found]
    return sorted(found)


def test_files_of_one_set_in_a_folder_are_one_table(tmp_path: Path) -> None:
    for part in range(3):
        write_images(tmp_path / "data" / f"train-{part:05}-of-00003.parquet", range(10 * part, 10 * part + 10))
    (tmp_path / "data" / "README.md").touch()
    source = table(tmp_path / "data", path_column="image")
    assert all(sizes(source).values())
    assert sorted(i for name in source.splits for i in seeds(source, name)) == list(range(30))
    assert "(3 files)" in source.description and "[left out: 1 .md]" in source.description and not source.warnings
    again = table(tmp_path / "data" / "train-*.parquet", path_column="image")
    braces = table(tmp_path / "data" / "train-{00000..00002}-of-00003.parquet", path_column="image")
    for name, split in source.splits.items():
        assert torch.equal(split.rows, again.splits[name].rows) and torch.equal(split.rows, braces.splits[name].rows)
    store = pickle.loads(pickle.dumps(source.splits["train"].store))
    assert store.read(25) == picture(25) and store.name_of(25).endswith("train-00002-of-00003.parquet: image[6]")
    assert len({store.stamp(row) for row in range(30)}) == 30
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    (warning,) = table(tmp_path / "data", path_column="image").warnings
    assert "is one of 3 files, by its name, and 2 of them are read" in warning


@pytest.mark.parametrize("form", ["names", "folders", "csv", "nested"])
def test_the_names_of_tables_say_their_splits(tmp_path: Path, form: str) -> None:
    parts = {"train": range(0, 20), "validation": range(20, 26), "test": range(30, 34)}
    for word, numbers in parts.items():
        if form == "csv":
            write(tmp_path / f"{word}_labels", numbers)
        elif form == "nested":
            write(tmp_path / word / "metadata", numbers)
        else:
            name = f"{word}-00000-of-00001.parquet" if form == "names" else f"{word}/0000.parquet"
            write_images(tmp_path / name, numbers)
    source = table(tmp_path, path_column="path" if form in ("csv", "nested") else "image")
    for split, numbers in zip(source.splits, parts.values(), strict=True):
        assert seeds(source, split) == [*numbers]
    assert "cut by" not in source.description


def test_names_of_one_split_or_a_split_column_leave_the_cut_to_the_program(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / "a" / f"test-{part}", range(10 * part, 10 * part + 10), "jsonl")
    assert sizes(table(tmp_path / "a")) == {"train": 16, "val": 2, "test": 2}
    for number, word in enumerate(("train", "test")):
        path = write(tmp_path / "b" / word, range(10 * number, 10 * number + 10))
        lines = path.read_text().splitlines()
        cells = [f"{line},{'val' if i > 8 else 'train'}" for i, line in enumerate(lines[1:])]
        path.write_text("\n".join(["path,label,part", *cells]))
    assert sizes(table(tmp_path / "b", split_column="part")) == {"train": 18, "val": 2, "test": 0}


def test_relative_paths_start_from_the_folder_of_each_table_or_from_the_root(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / "t" / f"part{part}" / "labels", range(10 * part, 10 * part + 10))
    source = table(tmp_path / "t")
    assert sorted(i for name in source.splits for i in seeds(source, name)) == list(range(20))
    (tmp_path / "pics").mkdir()
    for i in range(20):
        (tmp_path / "t" / f"part{i // 10}" / "pics" / f"{i}.png").rename(tmp_path / "pics" / f"{i}.png")
    source = table(tmp_path / "t", root=str(tmp_path))
    assert sorted(i for name in source.splits for i in seeds(source, name)) == list(range(20))


def test_a_doubtful_folder_is_a_question(tmp_path: Path) -> None:
    for name in ("train", "test", "sample_submission"):
        write(tmp_path / "kaggle" / name, range(4))
    with pytest.raises(UserError, match=r"test\.csv is named like a split and .*sample_submission\.csv like none"):
        table(tmp_path / "kaggle")
    write(tmp_path / "two" / "a", range(4))
    write(tmp_path / "two" / "b", range(4), "jsonl")
    with pytest.raises(UserError, match=r"2 tables of the kinds \.csv, \.jsonl; name one kind by a pattern, such as"):
        table(tmp_path / "two")
    assert table(tmp_path / "two" / "*.csv", val_fraction=0.0, test_fraction=0.0).num_images == 4
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").touch()
    with pytest.raises(UserError, match=r"is a folder without files that end in \.csv .* data=hf data\.name="):
        table(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match=r"there is no such file"):
        table(tmp_path / "nothing-*.csv")
    write_images(tmp_path / "mixed" / "a.parquet", range(4))
    pytest.importorskip("pyarrow.parquet").write_table(
        pytest.importorskip("pyarrow").table({"image": ["x.png"], "label": ["cat"]}), tmp_path / "mixed" / "b.parquet"
    )
    with pytest.raises(UserError, match=r"image of .*a\.parquet holds images, and of .*b\.parquet paths"):
        table(tmp_path / "mixed", path_column="image")


def test_messages_name_the_table_of_a_row(tmp_path: Path) -> None:
    write(tmp_path / "a", range(20))
    other = write(tmp_path / "b", range(20, 24))
    (tmp_path / "pics" / "22.png").write_bytes(b"")
    source = table(tmp_path)
    rows = {
        name: row
        for split in source.splits.values()
        for row, name in ((int(row), split.store.name_of(int(row))) for row in split.rows)
    }
    with pytest.raises(ImageError, match=r"22\.png: .*; b\.csv, row 4"):
        source.splits["train"].store.load(next(row for name, row in rows.items() if name.endswith("22.png")))
    lines = other.read_text()
    other.write_text(f"{lines}pics/3.png,cat\n")
    with pytest.raises(UserError, match=r"pics/3\.png in .*a\.csv: row 5 and .*b\.csv: row 6; keep one"):
        table(tmp_path)
    other.write_text(f"{lines}pics/99.png,\n")
    with pytest.raises(UserError, match=r"1 row cannot be used: .*b\.csv: row 6 has no label"):
        table(tmp_path)
