"""A checkpoint's classifier is kept for classes that are found by name, wherever a program has put the names."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.config import Family, HeadKind, Library, ModelConf
from finetune.models import build_model
from finetune.models.heads.head import Head
from finetune.models.upstream.beside import names_of_hub
from finetune.models.upstream.class_names import names_by_row, names_in
from finetune.system.errors import UserError

CLASSES = ["ant", "bee", "cat"]
THEIRS = ["cat", "ant", "bee"]
ROWS = [1, 2, 0]  # of the checkpoint, for CLASSES
BY_NAME = {name: row for row, name in enumerate(THEIRS)}
BY_ROW = dict(enumerate(THEIRS))


class Note:
    """An object of a training program: with it a checkpoint is read as data alone."""


def kept(
    folder: Path,
    classes: list[str] = CLASSES,
    *,
    number: int = 3,
    inside: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    name: str = "resnet10t",
    library: Library = Library.timm,
) -> tuple[list[int | None], str]:
    """The rows of a checkpoint with `number` classes that stand in the head for `classes`, and the model's line."""
    torch.manual_seed(0)
    settings = ModelConf(family=Family.vit, library=library, name=name, pretrained="none")
    net = build_model(settings, [f"class {row}" for row in range(number)]).model.net
    weight = next(each for each in net.modules() if isinstance(each, Head)).weight
    if metadata is None:
        path = folder / "w.pth"
        torch.save({"state_dict": net.state_dict(), **(inside or {})}, path)
    else:
        path = folder / "w.safetensors"
        save_file(net.state_dict(), path, metadata=metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    settings = ModelConf(family=Family.vit, library=library, name=name, pretrained=str(path), head=HeadKind.keep)
    built = build_model(settings, classes)
    head = next(each for each in built.model.net.modules() if isinstance(each, Head))
    return [_row_of(each, weight) for each in head.weight], built.description


def _row_of(values: Tensor, weight: Tensor) -> int | None:
    return next((row for row, other in enumerate(weight) if torch.equal(values, other)), None)


PLACES: dict[str, dict[str, Any]] = {
    "torchvision": {"inside": {"class_to_idx": BY_NAME}},
    "list": {"inside": {"classes": THEIRS}},
    "tuple in a dictionary": {"inside": {"meta": {"dataset_meta": {"CLASSES": tuple(THEIRS)}}}},
    "by row": {"inside": {"hyper_parameters": {"id2label": BY_ROW}}},
    "names": {"inside": {"names": BY_ROW, "epoch": 3, "class_weights": [1.0, 2.0, 1.0], "label_smoothing": 0.1}},
    "with an object": {"inside": {"class_to_idx": BY_NAME, "note": Note()}},
    "by row with an object": {"inside": {"idx_to_class": BY_ROW, "note": Note()}},
    "descriptions": {"inside": {"categories": [{"id": 7, "name": name} for name in THEIRS]}},
    "descriptions by row": {"inside": {"labels": {row: {"name": name} for row, name in BY_ROW.items()}}},
    "pairs": {"inside": {"class_to_idx": [*BY_NAME.items()]}},
    "a list with an object": {"inside": {"args": {"class_names": THEIRS}, "note": Note()}},
    "metadata": {"metadata": {"class_names": json.dumps(THEIRS), "label": "not JSON", "format": "pt"}},
    "metadata by name": {"metadata": {"class_to_idx": json.dumps(BY_NAME)}},
    "label2id": {"config": {"label2id": BY_NAME}},
    "label2id in texts": {"config": {"label2id": {name: str(row) for name, row in BY_NAME.items()}}},
    "LABEL_ and label2id": {"config": {"id2label": {row: f"LABEL_{row}" for row in range(3)}, "label2id": BY_NAME}},
    "both": {"config": {"label_names": THEIRS, "id2label": BY_ROW}},
    "described": {
        "config": {
            "pretrained_cfg": {
                "label_names": ["n1", "n2", "n3"],
                "label_descriptions": {"n1": "cat, feline", "n2": "ant", "n3": "bee"},
            }
        }
    },
    "another number beside": {"inside": {"class_to_idx": BY_NAME}, "config": {"label_names": ["tench", "newt"]}},
    "twice": {"inside": {"classes": THEIRS, "opts": {"class_to_idx": BY_NAME}}},
    "bundled": {"inside": {"classes": THEIRS}, "name": "glyph_vit", "library": Library.auto},
    "a network of torchvision": {"inside": {"classes": THEIRS}, "name": "resnet18", "library": Library.torchvision},
}


@pytest.mark.parametrize("place", PLACES)
def test_rows_follow_the_names_wherever_they_stand(place: str, tmp_path: Path) -> None:
    rows, line = kept(tmp_path, **PLACES[place])
    assert rows == ROWS and "nothing names" not in line
    rows, line = kept(tmp_path, ["gnu", "Cat"], **PLACES[place])
    assert rows == [None, 0] and "; 1 of 2 classes keep their classifier, new are: gnu" in line


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "other classes": (
        {"inside": {"class_to_idx": {"x": 0, "y": 1, "z": 2}}},
        CLASSES,
        "other classes than the data, such as 'x' for 'ant'",
    ),
    "two orders": (
        {"inside": {"classes": THEIRS}, "config": {"label_names": CLASSES}},
        CLASSES,
        r"w\.pth: classes and .*config\.json: label_names name the rows of the classifier differently",
    ),
    "two orders in one file": (
        {"config": {"label_names": THEIRS, "id2label": dict(enumerate(CLASSES))}},
        CLASSES,
        "label_names and .*id2label name the rows of the classifier differently",
    ),
    "fewer names": ({"config": {"label_names": CLASSES[:2]}}, CLASSES, r"into 3 classes and 2 names are known of them"),
    "no names, other number": ({"number": 1}, ["no", "yes"], r"into 1 class and the data has 2, .*\"label_names\""),
    "no names, numbers": ({}, ["1", "2", "10"], "row 1 may be '2' or, by the order of letters, '10'"),
    "no names, capitals": ({}, ["ant", "Bee", "cat"], "row 0 may be 'ant' or, by the order of letters, 'Bee'"),
    "two rows of one name": ({"config": {"label2id": {"ant": 1, "bee": 1, "cat": 0}}}, CLASSES, "0 names are known"),
    "two heads": ({"name": "levit_128s", "config": {"label_names": CLASSES}}, CLASSES, "has 2 classifiers, not one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_rows_stand_for_is_never_guessed(case: str, tmp_path: Path) -> None:
    place, classes, words = REFUSED[case]
    if case == "two heads":
        torch.save(timm.create_model("levit_128s", num_classes=3).state_dict(), tmp_path / "w.pth")
        conf = ModelConf(family=Family.vit, name="levit_128s", pretrained=str(tmp_path / "w.pth"), head=HeadKind.keep)
        with pytest.raises(UserError, match=words):
            build_model(conf, classes)
        return
    with pytest.raises(UserError, match=words) as caught:
        kept(tmp_path, classes, **place)
    assert "\n" not in str(caught.value) and "use model.head=random" in str(caught.value)


def test_unnamed_rows_are_the_users_classes_in_their_order_and_the_line_says_so(tmp_path: Path) -> None:
    rows, line = kept(tmp_path)
    assert rows == [0, 1, 2] and "; nothing names the 3 classes of its classifier: taken for yours" in line
    # A data set with an order of its own is no folder, so nothing is unclear.
    assert kept(tmp_path, ["dog", "10", "2"])[0] == [0, 1, 2]


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "label_names": ({"label_names": THEIRS}, ""),
    "in pretrained_cfg": ({"pretrained_cfg": {"classifier": "fc", "label_names": THEIRS}}, ""),
    "id2label": ({"id2label": BY_ROW}, ""),
    "labels": ({"labels": THEIRS}, ""),
    "two orders": ({"label_names": THEIRS, "id2label": dict(enumerate(CLASSES))}, "name the rows of the classifier"),
    "no names": ({"label_names": 7}, r"config\.json cannot be used: expected"),
    "too few": ({"label_names": ["cat", "ant"]}, "into 3 classes and 2 names are known of them"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_as_the_model_names_its_classes(case: str, tmp_path: Path) -> None:
    config, words = FOLDERS[case]
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    about = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"classifier": "fc"}, **config}
    (tmp_path / "config.json").write_text(json.dumps(about))
    conf = ModelConf(family=Family.vit, name=f"local-dir:{tmp_path}", head=HeadKind.keep)
    if words:
        with pytest.raises(UserError, match=words):
            build_model(conf, CLASSES)
    else:
        assert torch.equal(build_model(conf, CLASSES).model.net.fc.weight, state["fc.weight"][ROWS])


def test_names_in_a_hubs_configuration_are_of_a_stranger() -> None:
    assert names_of_hub({"label_names": ["a"], "tag": 3}, "hub") == {"hub: label_names": ["a"]}
    assert names_of_hub({"label_names": None}, "hub") == names_of_hub({}, "hub") == {}
    for odd in (7, [7], {"a": 1}):
        with pytest.raises(UserError, match=r"hub: the names of its classes cannot be used"):
            names_of_hub({"label_names": odd}, "hub")


@pytest.mark.parametrize("names", [["ant", "ant", "cat"], ["Ant", "ANT", "cat"]])
def test_a_name_of_two_rows_fits_none_and_accents_are_one_letter(names: list[str], tmp_path: Path) -> None:
    assert kept(tmp_path, config={"label_names": names})[0] == [None, None, 2]
    accents = {"label_names": [unicodedata.normalize("NFD", "café"), "b", "c"]}
    assert kept(tmp_path, ["b", "café"], config=accents)[0] == [1, 0]


@pytest.mark.parametrize(
    ("names", "classes", "rows"),
    [
        (
            ["goldfish, Carassius auratus", "tench, Tinca tinca", "crane"],
            ["n01440764", "n02012849", "x"],
            [1, None, None],
        ),
        (["n01443537", "n01440764", "n02012849"], ["tench", "crane", "Goldfish"], [1, 2, 0]),
        (["n01443537", "n01440764", "mine"], ["n01440764", "mine"], [1, 2]),
        (["n01443537", "n01440764", "n00000001"], ["n01440764", "n00000001"], [1, 2]),
    ],
)
def test_imagenets_ids_and_words_are_one_name(names: list, classes: list, rows: list, tmp_path: Path) -> None:
    assert kept(tmp_path, classes, config={"id2label": dict(enumerate(names))})[0] == rows


def test_only_names_of_classes_are_taken_for_them() -> None:
    loop: dict[str, Any] = {"classes": [1, 2], "labels": [], "label": "x", "class": {"a": 1.5}, "names": {"a": True}}
    loop |= {"class_token": torch.zeros(3), "again": loop, 7: {"classes": ["a"]}, "files": ["a", "b"]}
    assert names_in(loop, "w.pt") == {}
    deep: dict[str, Any] = {"classes": ["a"]}
    for _ in range(20):
        deep = {"part": deep}
    assert names_in(deep, "w.pt") == {}
    assert names_in({"classes": [["a", "b"], ["c", "d"]], "labels": [{"id": 1}], "names": [("a", 1), 2]}, "w") == {}
    assert names_in({"a": {"classes": ["x"]}}, "w.pt") == {"w.pt: a.classes": ["x"]}
    assert names_by_row({"b": 1, "a": "0"}) == ["a", "b"] and names_by_row({"b": 1, "a": 1}) == []
    assert names_by_row({"b": -1}) is names_by_row({"b": 10**5000}) is names_by_row({1: 2}) is names_by_row("a") is None
