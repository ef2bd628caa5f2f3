"""Laws of the counts of a run: `data` in result.json and the data line say what was there, in every source."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.config import DataConf, OnError, SourceKind
from finetune.data import Source, check_at_start, open_source
from tests.data.test_sources import write_shard

Cell = tuple[str, str, bytes]  # split, class, file
SIZES = {"train": 8, "val": 3, "test": 2}  # images of each class


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def cells(splits: str) -> list[Cell]:
    """Pictures of the classes a, b and c; of the given splits, or of none."""
    names = splits.split() or ["train"]
    places = [(split, word) for split in names for word in "abc" for _ in range(SIZES[split] if splits else 20)]
    return [(split, word, picture(number)) for number, (split, word) in enumerate(places)]


def as_folder(root: Path, rows: list[Cell], given: bool) -> DataConf:
    for number, (split, word, data) in enumerate(rows):
        path = root / (split if given else "") / word / f"g{number // 2}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return DataConf(source=SourceKind.folder, root=str(root))


def as_csv(root: Path, rows: list[Cell], given: bool) -> DataConf:
    lines = ["path,label,part"]
    for number, (split, word, data) in enumerate(rows):
        (root / f"g{number // 2}_{number}.png").write_bytes(data)
        lines.append(f"g{number // 2}_{number}.png,{word},{split}")
    (root / "a.csv").write_text("\n".join(lines))
    return DataConf(source=SourceKind.table, table=str(root / "a.csv"), split_column="part" if given else None)


def as_parquet(root: Path, rows: list[Cell], given: bool) -> DataConf:
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    names = [f"g{number // 2}" for number in range(len(rows))]
    columns = {"path": [row[2] for row in rows], "label": [row[1] for row in rows], "part": [row[0] for row in rows]}
    parquet.write_table(pa.table({**columns, "film": names}), root / "a.parquet", row_group_size=7)
    return DataConf(source=SourceKind.table, table=str(root / "a.parquet"), split_column="part" if given else None)


def as_shards(root: Path, rows: list[Cell], given: bool) -> DataConf:
    for name in {row[0] for row in rows}:
        files = {}
        for number, (split, word, data) in enumerate(rows):
            if split == name:
                files |= {f"g{number // 2}_{number}.png": data, f"g{number // 2}_{number}.cls": word.encode()}
        folder = root / name if given else root
        folder.mkdir(exist_ok=True)
        write_shard(folder / "t-0.tar", files)
    return DataConf(source=SourceKind.webdataset, root=str(root))


def as_hf(root: Path, rows: list[Cell], given: bool) -> DataConf:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {}
    for name in dict.fromkeys(row[0] for row in rows):
        chosen = [(number, row) for number, row in enumerate(rows) if row[0] == name]
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": row[2], "path": None} for _, row in chosen],
            "label": [row[1] for _, row in chosen],
            "film": [f"g{number // 2}" for number, _ in chosen],
        }
        parts[name] = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    hidden = parts["train"].select(range(3)).remove_columns("label").add_column("label", [None] * 3)
    parts |= {} if "test" in parts or not given else {"test": hidden}  # withheld: counted nowhere, and named
    datasets.DatasetDict(parts).save_to_disk(str(root / "set"))
    return DataConf(source=SourceKind.hf, name=str(root / "set"))


SOURCES: dict[str, Callable[[Path, list[Cell], bool], DataConf]] = {
    "folder": as_folder,
    "csv": as_csv,
    "parquet": as_parquet,
    "shards": as_shards,
    "hf": as_hf,
}


def told(source: Source) -> dict[str, int]:
    """The numbers of the data line."""
    found = re.search(
        r"([\d,]+) images? in ([\d,]+) class.*?; ([\d,]+) train, ([\d,]+) val, ([\d,]+) test", source.description
    )
    assert found is not None, source.description
    return dict(
        zip(
            ("images", "classes", "train", "val", "test"),
            (int(part.replace(",", "")) for part in found.groups()),
            strict=True,
        )
    )


def counts(conf: DataConf, run_dir: Path) -> dict[str, int]:
    """The counts of a run's source, which agree with the data line and with the images that are there."""
    run_dir.mkdir(exist_ok=True)
    conf.cache_dir = str(run_dir)
    source = check_at_start(open_source(conf), conf, run_dir)
    assert source.counts == told(source)
    assert {name: len(split.rows.unique()) for name, split in source.splits.items()} == {
        name: source.counts[name] for name in source.splits
    }
    return source.counts


@pytest.mark.parametrize("kind", SOURCES)
def test_counts_of_given_splits(tmp_path: Path, kind: str) -> None:
    for splits in ("train val test", "train val", "train test"):
        root = made(tmp_path / splits.replace(" ", "_"))
        conf = SOURCES[kind](root, cells(splits), True)
        truth = {name: 3 * SIZES[name] if name in splits else 0 for name in SIZES}
        if splits == "train test":
            truth |= {"train": 21, "val": 3}
        assert counts(conf, tmp_path / "run") == {"images": sum(truth.values()), "classes": 3, **truth}
        conf.classes = ["c", "a"]
        some = {name: size * 2 // 3 for name, size in truth.items()}
        assert counts(conf, tmp_path / "run_of_two") == {"images": sum(some.values()), "classes": 2, **some}
        for folder in ("run", "run_of_two"):
            (tmp_path / folder / "skipped.txt").unlink()


@pytest.mark.parametrize("kind", SOURCES)
def test_counts_of_cut_splits_without_images_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    rows = cells("")
    for number in (0, 25, 59):
        rows[number] = (*rows[number][:2], f"no picture {number}".encode())
    conf = SOURCES[kind](made(tmp_path / "data"), rows, False)
    conf.on_error = OnError.skip
    found = counts(conf, tmp_path / "run")
    assert (found["images"], found["classes"]) == (57, 3)
    assert found["train"] + found["val"] + found["test"] == 57 and 45 <= found["train"] <= 48
    assert counts(conf, tmp_path / "run") == found  # of a continued run


@pytest.mark.parametrize("kind", SOURCES)
def test_counts_with_groups_folds_and_shots(tmp_path: Path, kind: str) -> None:
    conf = SOURCES[kind](made(tmp_path / "data"), cells(""), False)
    conf.group = "film" if kind in ("hf", "parquet") else r"(g\d+)_"
    found = counts(conf, tmp_path / "grouped")
    assert found == {"images": 60, "classes": 3, "train": 48, "val": 6, "test": 6}
    conf.folds, conf.fold = 3, 1
    found = counts(conf, tmp_path / "folded")
    assert found == {"images": 60, "classes": 3, "train": 36, "val": 18, "test": 6}
    conf.folds, conf.fold, conf.shots = 0, 0, 4
    assert counts(conf, tmp_path / "shots") == {"images": 60, "classes": 3, "train": 12, "val": 6, "test": 6}
    conf.shots, conf.fraction = 0, 0.25
    assert counts(conf, tmp_path / "part") == {"images": 60, "classes": 3, "train": 12, "val": 6, "test": 6}


def test_counts_of_the_digits_and_of_torchvision(tmp_path: Path) -> None:
    digits = DataConf(test_fraction=0.3)
    assert counts(digits, tmp_path / "digits") == {
        "images": 1797,
        "classes": 10,
        "train": 1079,
        "val": 179,
        "test": 539,
    }
    as_folder(tmp_path / "eurosat" / "2750", cells(""), False)
    conf = DataConf(source=SourceKind.torchvision, name="EuroSAT", root=str(tmp_path))
    assert counts(conf, tmp_path / "run") == {"images": 60, "classes": 3, "train": 48, "val": 6, "test": 6}


def test_result_and_log_of_a_run_that_shows_fewer_images_say_the_same(folder: Path) -> None:
    rows = cells("train val test")
    rows[1] = (*rows[1][:2], b"no picture")
    as_folder(folder / "data", rows, True)
    words = ["data=folder", "data.root=data", "data.on_error=skip", "data.batch_size=8", "train.epochs=1"]
    truth = {"images": 38, "classes": 3, "train": 23, "val": 9, "test": 6}
    assert main([*words, "data.epoch_images=20", "data.drop_last=true", "hydra.run.dir=run"]) == 0
    assert json.loads(Path("run/result.json").read_text())["data"] == truth
    assert "38 images in 3 classes; 23 train, 9 val, 6 test" in Path("run/run.log").read_text()
    assert main(["resume=run", "train.epochs=2"]) == 0
    assert json.loads(Path("run/result.json").read_text())["data"] == truth


def test_counts_of_several_labels_are_of_images_with_a_chosen_one(tmp_path: Path) -> None:
    conf = as_csv(tmp_path, cells(""), False)
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace("_1.png,a,", "_1.png,a;b,").replace("_3.png,a,", "_3.png,b;c,"))
    conf.label_separator = ";"
    assert counts(conf, tmp_path / "all")["images"] == 60
    conf.classes = ["b", "c"]
    found = counts(conf, tmp_path / "some")  # all of b and c, and the two images of `a` that got one of them
    assert (found["images"], found["classes"]) == (42, 2) and sum(found[name] for name in SIZES) == 42
