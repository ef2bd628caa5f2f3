"""Laws of data sets of the library `datasets`: labels are names, withheld ones are said, images may be plain bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.sources.hugging_face import _parts
from finetune.system.errors import UserError

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def part(labels: list[Any], feature: Any = None, start: int = 0, image: Any = None) -> Any:
    cells = [{"bytes": picture(start + i), "path": None} for i in range(len(labels))]
    data = datasets.Dataset.from_dict({"image": cells, "label": labels})
    data = data.cast_column("image", datasets.Image() if image is None else image)
    return data if feature is None else data.cast_column("label", feature)


def opened(tmp_path: Path, **parts: Any) -> Source:
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    return open_source(DataConf(source=SourceKind.hf, name=str(tmp_path / "set")))


def names(source: Source, split: str) -> list[str]:
    return [source.classes[label] for label in source.splits[split].labels.tolist()]


def label(*words: str) -> Any:
    return datasets.ClassLabel(names=list(words))


def test_labels_of_all_splits_are_compared_by_name(tmp_path: Path) -> None:
    train = part([0, 1] * 5, label("ant", "bee"))
    source = opened(tmp_path, train=train, test=part([0, 0, 1], label("bee", "ant"), 50))
    assert source.classes == ("ant", "bee") and names(source, "test") == ["bee", "bee", "ant"]
    source = opened(tmp_path / "text", train=train, test=part(["bee", " ant"], start=50))
    assert names(source, "test") == ["bee", "ant"]
    source = opened(tmp_path / "other", train=part(["bee", "ant"] * 5), test=part([1, 0], label("bee", "ant"), 50))
    assert source.classes == ("ant", "bee") and names(source, "test") == ["ant", "bee"]
    lists = part([["b"], ["a", "b"]] * 5, datasets.Sequence(label("b", "a")))
    source = opened(tmp_path / "lists", train=lists, test=part([["a"], []], datasets.Sequence(label("a", "b")), 50))
    assert source.classes == ("b", "a") and source.splits["test"].labels.tolist() == [[0, 1], [0, 0]]


def test_names_that_differ_are_listed(tmp_path: Path) -> None:
    train = part([0, 1] * 5, label("ant", "bee"))
    both = r"train has the classes ant, bee; another split has {}, which train has not"
    with pytest.raises(UserError, match=both.format("cow")):
        opened(tmp_path, train=train, test=part([0, 1], label("bee", "cow"), 50))
    with pytest.raises(UserError, match=both.format("0, 1")):
        opened(tmp_path / "n", train=train, test=part([0, 1], start=50))
    with pytest.raises(UserError, match=both.format("'Bee'")):
        opened(tmp_path / "c", train=train, test=part(["Bee"], start=50))


def test_withheld_labels_leave_their_split_out(tmp_path: Path) -> None:
    train = part([0, 1] * 10, label("ant", "bee"))
    for number, hidden in enumerate([part([-1] * 3, label("ant", "bee"), 50), part([None] * 3, label("x"), 50)]):
        source = opened(tmp_path / str(number), train=train, test=hidden)
        assert "[left out: 3 images without a label in test]" in source.description and len(source.splits["test"]) == 2
    source = opened(tmp_path / "gone", train=train, validation=part([1], None, 70).remove_columns("label"))
    assert "[left out: 1 image without a label in val]" in source.description
    with pytest.raises(UserError, match=r"test\[1\] has no label"):
        opened(tmp_path / "some", train=train, test=part([1, -1], label("ant", "bee"), 50))
    with pytest.raises(UserError, match=r"train\[0\] has no label"):
        opened(tmp_path / "all", train=part([-1] * 9, label("ant", "bee")))
    with pytest.raises(UserError, match=r"train\[2\] has label='0\.5'"):
        opened(tmp_path / "real", train=part([1.0, 0.0, 0.5]))
    with pytest.raises(UserError, match=r"its split test has no images"):
        _parts({"train": [1], "test": []}, "x")


@pytest.mark.parametrize("kind", ["image", "struct", "named", "bytes"])
def test_images_may_be_bytes(tmp_path: Path, kind: str) -> None:
    cells = [picture(i) if kind == "bytes" else {"bytes": picture(i), "path": None} for i in range(20)]
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 10})
    (tmp_path / "set").mkdir()
    if kind == "image":
        data = data.cast_column("image", datasets.Image())
    elif kind == "named":
        data = data.cast_column("image", {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    assert isinstance(data.features["image"], datasets.Image) == (kind == "image")
    data.to_parquet(str(tmp_path / "set" / "train.parquet"))
    source = open_source(DataConf(source=SourceKind.hf, name=str(tmp_path / "set")))
    assert source.num_images == 20
    split = source.splits["train"]
    rows = split.rows.tolist()
    assert [split.store.read(row) for row in rows] == [picture(row) for row in rows]
