"""Laws of withheld labels: a val or test of which no image has a label is left out and counted, in every source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.labels import LabelError, LabelReader
from finetune.system.errors import UserError
from tests.data.test_labels import picture, sizes
from tests.data.test_sources import write_shard

Cells = dict[str, list[Any]]  # split -> the labels of its images, as JSON may hold them


def as_table(root: Path, cells: Cells) -> Source:
    lines = []
    for split, labels in cells.items():
        for i, label in enumerate(labels):
            (root / f"{split}{i}.png").write_bytes(picture(len(lines)))
            lines.append(json.dumps({"path": f"{split}{i}.png", "label": label, "split": split}))
    (root / "t.jsonl").write_text("\n".join(lines))
    return open_source(DataConf(source=SourceKind.table, table=str(root / "t.jsonl"), split_column="split"))


def as_shards(root: Path, cells: Cells) -> Source:
    """A shard or two of each split; a label stands in a .json, which an image without one has not."""
    number = 0
    for split, labels in cells.items():
        half = (len(labels) + 1) // 2
        for part, some in enumerate([labels[:half], labels[half:]]):
            files = {}
            for i, label in enumerate(some):
                number += 1
                files[f"{part}{i}.png"] = picture(number)
                files |= {f"{part}{i}.json": json.dumps({"label": label}).encode()} if label is not None else {}
            write_shard(root / f"{split}-{part}.tar", files)
    return open_source(DataConf(source=SourceKind.webdataset, root=str(root)))


def as_hub(root: Path, cells: Cells) -> Source:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    number, parts = 0, {}
    for split, labels in cells.items():
        images = []
        for _ in labels:
            number += 1
            images.append({"bytes": picture(number), "path": None})
        kind = isinstance(cells["train"][0], list)
        features = {"image": datasets.Image(decode=False)}
        features["label"] = [datasets.Value("string")] if kind else datasets.Value("string")
        shown = [label if label is None or kind else str(label) for label in labels]
        data = datasets.Dataset.from_dict({"image": images, "label": shown})
        parts[split] = data.cast(datasets.Features(features))
    datasets.DatasetDict(parts).save_to_disk(str(root / "saved"))
    return open_source(DataConf(source=SourceKind.hf, name=str(root / "saved")))


SOURCES = [as_table, as_shards, as_hub]
TRAIN = ["cat", "dog"] * 10


@pytest.mark.parametrize("source_of", SOURCES)
@pytest.mark.parametrize("hidden", [[None] * 3, [-1] * 3, ["null"] * 3, ["", "NA", None, -1]], ids=str)
def test_a_split_without_any_label_is_left_out_and_counted(
    tmp_path: Path, source_of: Callable[[Path, Cells], Source], hidden: list[Any]
) -> None:
    source = source_of(tmp_path, {"test": hidden, "train": TRAIN})
    assert source.classes == ("cat", "dog") and sizes(source) == {"train": 16, "val": 2, "test": 2}
    assert f"{len(hidden)} images without a label in test" in source.description
    assert all(source.splits[name].load(0).shape == (3, 6, 6) for name in source.splits)
    kept = [split.name_of(row) for split in source.splits.values() for row in range(len(split))]
    assert len(set(kept)) == 20 and not any("test" in name.removeprefix(str(tmp_path)) for name in kept)


@pytest.mark.parametrize("source_of", SOURCES)
def test_an_image_without_a_label_beside_others_is_an_error_with_its_name(
    tmp_path: Path, source_of: Callable[[Path, Cells], Source]
) -> None:
    where = {as_table: "row 22 has no label", as_shards: r"test-1\.tar/10\.png", as_hub: r"test\[1\] has no label"}
    with pytest.raises(UserError, match=where[source_of]):
        source_of(tmp_path, {"train": TRAIN, "test": ["cat", None]})


@pytest.mark.parametrize("source_of", SOURCES)
def test_lists_that_are_all_empty_are_withheld(tmp_path: Path, source_of: Callable[[Path, Cells], Source]) -> None:
    cells: Cells = {"train": [["a"], ["b"], ["a", "b"], []] * 4, "val": [["a"], []], "test": [[], [], []]}
    source = source_of(tmp_path, cells)
    assert source.is_multilabel and sizes(source) == {"train": 16, "val": 2, "test": 0}
    assert "3 images without a label in test" in source.description


def read(cells: Cells, **named: Any) -> tuple[LabelReader, list[int]]:
    reader, given = LabelReader("label", **named), list[int]()
    for number, labels in enumerate(cells.values()):
        for cell in labels:
            reader.take(cell, number)
            given.append(number)
    return reader, given


def test_minus_one_is_a_class_where_train_or_the_person_has_it() -> None:
    cells: Cells = {"train": [-1, 1], "val": [-1, -1.0], "test": ["-1"]}
    for part, named in ((cells, {}), (cells | {"train": [0, 1]}, {"names": ["-1", "0"]})):
        reader, given = read(part, **named)
        stays, left_out = reader.take_out_withheld(given)
        assert all(stays) and not left_out and "-1" in reader.known
    reader, given = read(cells | {"train": [0, 1], "val": [-1, 0]})
    stays, left_out = reader.take_out_withheld(given)
    assert stays == [True] * 4 + [False] and left_out == {"image without a label in test": 1}
    assert "-1" in reader.known  # of val, which has another label as well: an error about classes follows
    reader, given = read({"train": ["b", "a"], "val": [-1], "test": ["a", None]})
    reader.take_out_withheld(given)
    assert [*reader.known] == ["b", "a"] and [*reader.lacking] == [3]


def test_training_images_have_labels() -> None:
    for cell in (None, "", "NA", [None]):
        with pytest.raises(LabelError, match=r"has .*label"):
            read({"train": [cell]})
