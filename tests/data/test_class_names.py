"""A label is the same class in every source, however it is stored; different labels never become one without a word."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.labels import LabelReader, look_alikes, name_warnings
from finetune.system.errors import UserError
from tests.data.test_labels import picture, rows_of
from tests.data.test_sources import write_shard

IMAGES = [picture(i) for i in range(24)]


def spread(labels: Sequence[Any]) -> list[Any]:
    return [labels[i % len(labels)] for i in range(len(IMAGES))]


def as_csv(root: Path, labels: Sequence[Any], separator: str = ",") -> DataConf:
    path = root / ("t.csv" if separator == "," else "t.tsv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["path", "label"])
        for i, label in enumerate(spread(labels)):
            (root / f"{i}.png").write_bytes(IMAGES[i])
            writer.writerow([f"{i}.png", label])
    return DataConf(source=SourceKind.table, table=str(path))


def as_tsv(root: Path, labels: Sequence[Any]) -> DataConf:
    return as_csv(root, labels, "\t")


def as_jsonl(root: Path, labels: Sequence[Any]) -> DataConf:
    for i, image in enumerate(IMAGES):
        (root / f"{i}.png").write_bytes(image)
    lines = [json.dumps({"path": f"{i}.png", "label": label}) for i, label in enumerate(spread(labels))]
    (root / "t.jsonl").write_text("\n".join(lines))
    return DataConf(source=SourceKind.table, table=str(root / "t.jsonl"))


def as_parquet(root: Path, labels: Sequence[Any], *, stored: Any = None, metadata: Any = None) -> DataConf:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"image": IMAGES, "label": spread(labels) if stored is None else stored})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table, root / "t.parquet")
    return DataConf(source=SourceKind.table, table=str(root / "t.parquet"), path_column="image")


def as_cls(root: Path, labels: Sequence[Any]) -> DataConf:
    files = {f"{i}.png": image for i, image in enumerate(IMAGES)}
    write_shard(root / "0.tar", files | {f"{i}.cls": str(label).encode() for i, label in enumerate(spread(labels))})
    return DataConf(source=SourceKind.webdataset, root=str(root))


def as_hub(root: Path, labels: Sequence[Any]) -> DataConf:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"image": IMAGES, "label": spread(labels)})
    data.save_to_disk(str(root / "saved"))
    return DataConf(source=SourceKind.hf, name=str(root / "saved"))


WAYS = [as_csv, as_tsv, as_jsonl, as_parquet, as_cls, as_hub]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1.0, 2.0], ("1", "2")),
        (["1.0", "-2.0"], ("1", "-2")),
        (["1.0", "1.1"], ("1.0", "1.1")),
        (["2.0", "cat"], ("2.0", "cat")),
        ([" cat\xa0", "dog\t"], ("cat", "dog")),
        ([True, False], ("False", "True")),
    ],
    ids=str,
)
def test_a_label_is_the_same_class_in_every_source(
    tmp_path: Path, way: Callable[[Path, Sequence[Any]], DataConf], labels: list[Any], classes: tuple[str, ...]
) -> None:
    found = open_source(way(tmp_path, labels))
    assert found.classes == classes and not [line for line in found.warnings if "no image of" not in line]


@pytest.mark.parametrize("way", [as_csv, as_cls])
def test_numbers_that_were_written_in_two_ways_are_one_class_and_said(tmp_path: Path, way: Any) -> None:
    found = open_source(way(tmp_path, ["1", "1.0", "2"]))
    assert found.classes == ("1", "2") and found.num_images == 24
    counts = [int((split.labels == 0).sum()) for split in found.splits.values()]
    assert sum(counts) == 16
    (warning,) = [line for line in found.warnings if "no image of" not in line]
    assert warning == "all labels are whole numbers, so images of 1.0 and 1 are in one class"


def test_numbers_keep_their_point_where_a_person_or_the_data_names_them_so(tmp_path: Path) -> None:
    conf = as_csv(tmp_path, ["1.0", "2.0"])
    assert open_source(DataConf(**{**vars(conf), "classes": ["1.0", "2.0"]})).classes == ("1.0", "2.0")
    assert open_source(DataConf(**{**vars(conf), "classes": ["1", "2"]})).classes == ("1", "2")
    reader = LabelReader("label", names=["1.0", "2.0 "])
    reader.take("1.0")
    reader.take("2.0 ")  # as a data set of the hub may list it
    assert reader.names("x") == ("1.0", "2.0 ")


def test_lists_of_numbers_with_points_are_the_numbers() -> None:
    reader = LabelReader("tags", separator="|")
    for cell in ("1.0|2", "1", "", "3.0|1.0|1"):
        reader.take(cell)
    reader.take_out_withheld([0, 0, 0, 0])
    assert reader.names("x") == ("1", "2", "3") and len(reader.warnings) == 1
    assert reader.tensor(("1", "2", "3")).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]]


FEATURES: dict[str, Any] = {
    "plain": {"names": ["zebra", "ant", "None"], "_type": "ClassLabel"},
    "list": {"feature": {"names": ["zebra", "ant", "None"], "_type": "ClassLabel"}, "_type": "List"},
    "old list": [{"names": ["zebra", "ant", "None"], "_type": "ClassLabel"}],
}


@pytest.mark.parametrize("form", FEATURES)
def test_a_parquet_file_of_the_datasets_library_gives_its_class_names(tmp_path: Path, form: str) -> None:
    numbers: list[Any] = [i % 3 for i in range(24)]
    stored = numbers if form == "plain" else [[i] for i in numbers]
    metadata = {"info": {"features": {"label": FEATURES[form]}}}
    found = open_source(as_parquet(tmp_path, [], stored=stored, metadata=metadata))
    assert found.classes == ("ant", "None", "zebra") and found.is_multilabel == (form != "plain")
    for split in found.splits.values():
        for row, label in zip(split.rows.tolist(), split.labels, strict=True):
            index = int(label.argmax()) if found.is_multilabel else int(label)
            assert found.classes[index] == ("zebra", "ant", "None")[numbers[row]]
    stored[5] = 9 if form == "plain" else [9]
    with pytest.raises(UserError, match=r"t\.parquet: label: a label is \[?9\]?, and there are 3 names of classes"):
        open_source(as_parquet(tmp_path, [], stored=stored, metadata=metadata))


@pytest.mark.parametrize(
    "metadata",
    ["x", [], {"info": 3}, {"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}}],
    ids=str,
)
def test_other_metadata_names_no_classes(tmp_path: Path, metadata: Any) -> None:
    assert open_source(as_parquet(tmp_path, [0, 1], metadata=metadata)).classes == ("0", "1")


def test_a_typed_class_may_be_in_another_unicode_form_than_the_files(tmp_path: Path) -> None:
    typed, stored = (unicodedata.normalize(form, "thé") for form in ("NFC", "NFD"))
    conf = as_csv(tmp_path, [stored, "b", "c"])
    assert open_source(DataConf(**{**vars(conf), "classes": ["b", typed]})).classes == ("b", stored)
    conf = as_csv(tmp_path, [stored, typed, "c"])
    assert open_source(DataConf(**{**vars(conf), "classes": ["c", typed]})).classes == ("c", typed)


@pytest.mark.parametrize("other", ["Cat", "cat\u200b", "'cat'"])
def test_splits_whose_classes_look_alike_show_the_difference(tmp_path: Path, other: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, {"x": [other, "test"]})
    assert f"test has class {other!a}, which train has not (train has 'cat', dog)" in str(caught.value)


def test_quotes_that_are_part_of_a_name_are_said(tmp_path: Path) -> None:
    assert look_alikes(["'cat'", "cat", "dog's", "it's"]) == [["'cat'", "cat"]]
    (warning,) = name_warnings(["'cat'", "'dog'", "o'neil"])
    assert warning.startswith("2 class names in quotes, such as \"'cat'\"; take the quotes off")
    conf = as_csv(tmp_path, ["a", "b"])
    text = Path(conf.table or "").read_text()
    Path(conf.table or "").write_text(text.replace(".png,", ".png',").replace("\n", "\n'").rstrip("'"))
    with pytest.raises(UserError, match=r"such as '0\.png': there is 0\.png; take the quotes off"):
        open_source(conf)


def test_every_way_gives_the_same_images_of_a_class(tmp_path: Path) -> None:
    def classes_of(source: Source) -> dict[bytes, str]:
        found = {}
        for split in source.splits.values():
            for row, label in zip(split.rows.tolist(), split.labels.tolist(), strict=True):
                found[split.store.read(row)] = source.classes[label]
        return found

    expected = dict(zip(IMAGES, spread(["x y", "2", "Ä"]), strict=True))
    for number, way in enumerate(WAYS):
        (tmp_path / str(number)).mkdir()
        assert classes_of(open_source(way(tmp_path / str(number), ["x y", "2", "Ä"]))) == expected
