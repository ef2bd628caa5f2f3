"""Laws of labels: each means what the person meant, in every source; a doubtful layout is a question, in one line."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import DataConf, SourceKind
from finetune.data import Source, open_source
from finetune.data.labels import LabelError, LabelReader, look_alikes, name_warnings
from finetune.data.sources.shards import _classes
from finetune.data.split import Groups
from finetune.data.split_words import is_extra, split_of
from finetune.system.errors import UserError
from finetune.system.limits import text_limit
from finetune.system.ours import OWN, FolderKind, claim
from tests.data.test_sources import write_shard


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make(root: Path, *folders: str, count: int = 4) -> Path:
    """A folder with `count` different images in each of `folders`."""
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(picture(100 * number + i))
    return root


def folder(root: Path, **changes: Any) -> Source:
    return open_source(DataConf(source=SourceKind.folder, root=str(root), **changes))


def sizes(source: Source) -> dict[str, int]:
    return {name: len(split) for name, split in source.splits.items()}


# --- words and folders -----------------------------------------------------------------------------------------------


def test_words_of_splits() -> None:
    words = {
        0: "train Training training_set train-set TrainSet train2017 train_images trn",
        1: "val valid VALIDATION validation_set dev devset val2017 val_data",
        2: "test testing test_set testset Test-Data eval evaluation holdout tst",
    }
    assert all(split_of(word) == split for split, text in words.items() for word in text.split())
    others = "cat set data images 2017 trained testament devil valley evil trainer"
    assert all(split_of(word) is None for word in ("", *others.split()))
    assert all(map(is_extra, ["unlabeled", "Unlabelled_set", "extra", "unlabeled2017"])) and not is_extra("unknown")


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("Train", "TEST"), ("train2017", "eval")])
def test_folders_with_the_usual_words_are_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    source = folder(make(tmp_path, *(f"{split}/{name}" for split in names for name in ("cats", "dogs"))))
    assert source.classes == ("cats", "dogs") and sizes(source) == {"train": 6, "val": 2, "test": 8}


def test_train_and_dev_are_train_and_val(tmp_path: Path) -> None:
    source = folder(make(tmp_path, "train/a", "train/b", "dev/a", "dev/b"))
    assert source.classes == ("a", "b") and sizes(source) == {"train": 8, "val": 8, "test": 0}


@pytest.mark.parametrize("inside", ["", "/deep", "/a"])
def test_unlabeled_images_beside_train_are_left_out_and_counted(tmp_path: Path, inside: str) -> None:
    source = folder(make(tmp_path, "train/a", "train/b", f"unlabeled{inside}"))
    assert source.classes == ("a", "b") and source.num_images == 8
    assert "[left out: 4 images in unlabeled]" in source.description


def test_folders_with_shared_names_are_a_question(tmp_path: Path) -> None:
    for root, parts in {"x": ["part1", "part2"], "y": ["more", "train"], "z": ["2019", "2020", "2021"]}.items():
        make(tmp_path / root, *(f"{part}/{name}" for part in parts for name in ("cats", "dogs")))
        with pytest.raises(UserError) as caught:
            folder(tmp_path / root)
        message = str(caught.value)
        assert all(f"{words} {', '.join(parts)}" in message for words in ("parts", "classes")), message
        assert "classes cats, dogs" in message and f"data.classes=[{','.join(parts)}]" in message
        assert folder(tmp_path / root, classes=parts).classes == tuple(sorted(parts))


def test_splits_inside_class_folders_are_refused(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}/{split}" for name in ("cat", "dog") for split in ("train", "test")))
    with pytest.raises(UserError, match=r"class folders hold splits \(cat/test, train\).*train/cat"):
        folder(tmp_path)


def test_folders_inside_classes_are_no_question_where_names_repeat_or_images_lie_beside(tmp_path: Path) -> None:
    one = make(tmp_path / "one", "cat/photos", "dog/more/pictures")
    part = make(tmp_path / "part", "cat/a", "cat/b", "cat", "dog/c", "dog/d")
    beside = make(tmp_path / "beside", "cat", "cat/indoor", "cat/outdoor", "dog", "dog/indoor", "dog/outdoor")
    same = make(tmp_path / "same", "cat/images", "dog/images")
    many = make(tmp_path / "many", *(f"{i}/{side}" for i in range(11) for side in ("left", "right")), count=2)
    assert all(folder(root).classes == ("cat", "dog") for root in (one, part, beside, same))
    assert len(folder(many).classes) == 11


@pytest.mark.parametrize("start", ["", "train/"])
@pytest.mark.parametrize("between", ["", "x/"])
def test_classes_in_categories_are_a_question_with_both_readings(tmp_path: Path, start: str, between: str) -> None:
    names = {"animals": ["cats", "dogs"], "vehicles": ["cars"], "plants": ["moss", "oak"]}
    inner = [f"{outer}/{between}{name}" for outer, some in names.items() for name in some]
    make(tmp_path, *(f"{start}{path}" for path in inner), *([f"val/{path}" for path in inner] if start else []))
    if between:
        make(tmp_path, f"{start}animals/{between}cats/indoor")
    with pytest.raises(UserError) as caught:
        folder(tmp_path)
    both = "may be the classes animals, plants, vehicles, or the classes cats, dogs, moss, oak, cars in them"
    assert both in str(caught.value) and "data.group='([^/]+)/[^/]+$'" in str(caught.value)
    assert folder(tmp_path, classes=[*names]).classes == ("animals", "plants", "vehicles")
    if not start:
        grouped = folder(tmp_path, group="([^/]+)/[^/]+$")
        assert grouped.classes == ("animals", "plants", "vehicles")
        assert any("too few groups of images" in line for line in grouped.warnings)
    source = folder(tmp_path, classes=["oak", "cats", "cars"])
    assert source.classes == ("cars", "cats", "oak")
    for split in source.splits.values():
        for row, label in enumerate(split.labels.tolist()):
            assert f"/{source.classes[label]}/" in split.name_of(row)
    with pytest.raises(UserError, match=r"may be the classes animals"):
        folder(tmp_path, classes=["oak", "animals"])


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train: no class folders in it \[found only 4 images\]"):
        folder(make(tmp_path, "train", "val"))


def test_only_train_needs_every_class(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{name}" for name in "abc"), "val/a", "val/b", "test/c")
    (tmp_path / "val" / "c").mkdir()
    (tmp_path / "val" / "z").mkdir()  # without images nobody is of this class
    source = folder(tmp_path)
    assert source.classes == ("a", "b", "c") and sizes(source) == {"train": 12, "val": 8, "test": 4}
    assert source.splits["test"].labels.tolist() == [2] * 4
    assert [line for line in source.warnings if "no image of" in line] == [
        "val has no image of 1 of 3 classes: c",
        "test has no image of 2 of 3 classes: a, b",
    ]
    make(tmp_path, "test/z")
    with pytest.raises(UserError, match=r"test has z, which train has not \(train has a, b, c; test has c, z\)"):
        folder(tmp_path)
    assert sizes(folder(tmp_path, classes=["a", "c"])) == {"train": 8, "val": 4, "test": 4}
    (tmp_path / "train" / "z").mkdir()
    with pytest.raises(UserError, match=r"/train: no images in class folder z"):
        folder(tmp_path)


def test_a_test_split_without_class_folders_is_left_out_and_said(tmp_path: Path) -> None:
    make(tmp_path, "train/cat", "train/dog", "test", count=10)
    (tmp_path / "test" / "sample.csv").write_text("x")
    source = folder(tmp_path)
    assert source.classes == ("cat", "dog") and sizes(source) == {"train": 16, "val": 2, "test": 2}
    assert "[left out: 10 images without a label in test, 1 .csv]" in source.description
    for image in (tmp_path / "test").glob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"/test: no class folders in it \[found only 1 \.csv\]"):
        folder(tmp_path)
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(UserError, match=r"/test: no images in its class folders \[found nothing\]"):
        folder(tmp_path)


@pytest.mark.parametrize("name", ["unlabeled", "unlabeled/deep", "extra"])
def test_a_folder_without_labels_in_a_test_split_is_left_out_and_said(tmp_path: Path, name: str) -> None:
    source = folder(make(tmp_path, "train/cat", "train/dog", f"test/{name}", count=10))
    assert source.classes == ("cat", "dog") and sizes(source) == {"train": 16, "val": 2, "test": 2}
    assert f"[left out: 10 images in test/{name.split('/')[0]}]" in source.description
    source = folder(make(tmp_path, "test/cat", count=3))
    assert sizes(source)["test"] == 3 and "10 images in test/" in source.description


def test_inner_classes_are_found_in_splits_that_lack_categories(tmp_path: Path) -> None:
    inner = ["animals/cats", "animals/dogs", "plants/moss", "plants/oak"]
    make(tmp_path, *(f"train/{path}" for path in inner), "val/animals/cats", "val/plants/oak", "test/plants/oak")
    source = folder(tmp_path, classes=["cats", "oak", "moss"])
    assert sizes(source) == {"train": 12, "val": 8, "test": 4} and source.splits["test"].labels.tolist() == [2] * 4


def test_a_folder_around_the_data_is_named(tmp_path: Path) -> None:
    for name, inside, message in [
        (
            "a",
            ["flowers/rose", "flowers/lily"],
            r"only one class, flowers.*is it data\.root=.*/flowers, with lily, rose\?",
        ),
        ("b", ["x/y/train/cat", "x/y/val/cat"], r"is it data\.root=.*/b/x/y, with train, val\?"),
        (
            "c",
            ["images/train/cat", "images/val/cat", "labels/train", "labels/val"],
            r"\(images/train, val\).*is it data\.root=.*/c/images\?",
        ),
        (
            "d",
            ["train/images/cat", "train/images/dog", "val/images/cat"],
            r"move them from .*/train/images to .*/train,",
        ),
    ]:
        make(tmp_path / name, *inside)
        for image in tmp_path.glob("*/labels/*/*.png"):
            image.rename(image.with_suffix(".txt"))
        with pytest.raises(UserError, match=message):
            folder(tmp_path / name)


def test_a_class_that_is_named_like_a_split_is_said(tmp_path: Path) -> None:
    make(tmp_path, "cat", "test", "unlabeled")
    (warning,) = folder(tmp_path).warnings
    assert "read as a class" in warning and "test, unlabeled" in warning
    assert not folder(tmp_path, classes=["cat", "test", "unlabeled"]).warnings


def test_runs_are_no_classes(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    for kind, place in {
        FolderKind.run: "outputs/day/1",
        FolderKind.check: "checked",
        FolderKind.cache: "a/cache",
    }.items():
        (tmp_path / place).mkdir(parents=True)
        claim(tmp_path / place, kind)
        for name in OWN[kind].replaced:  # among them pictures
            (tmp_path / place / name).write_bytes(b"of a run")
    source = folder(tmp_path)
    assert source.classes == ("a", "b") and source.num_images == 8
    assert "[left out: 3 folders of a run]" in source.description
    make(tmp_path, "outputs/mine")  # images beside the runs are a class
    assert folder(tmp_path).classes == ("a", "b", "outputs")


# --- names that look alike -------------------------------------------------------------------------------------------


def test_names_that_look_alike() -> None:
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for same in (
        [nfc, nfd],
        ["cat ", "cat"],
        ["01", "1"],
        ["Cat", "cat"],
        ["red fox", "red_fox"],
        ["class 01", "class 1"],
    ):
        assert look_alikes([*same, "dog"]) == [same]
    assert not look_alikes(["A", "a", "1_1", "11", "1.05", "1.5", "-1", "1", "C", "C++", "10", "100", "0"])


def test_look_alikes_are_one_warning_that_shows_the_difference(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFC", "thé"), unicodedata.normalize("NFD", "thé"), "cat", "cat ", "1", "01"]
    (warning,) = (line for line in folder(make(tmp_path, *names)).warnings if "alike" in line)
    assert "'the\\u0301' and 'th\\xe9'" in warning.replace("'th\\xe9' and 'the\\u0301'", "'the\\u0301' and 'th\\xe9'")
    assert "'cat '" in warning and "'01'" in warning


def test_splits_that_differ_in_an_accent_show_it(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "thé") for form in ("NFC", "NFD"))
    with pytest.raises(UserError, match=r"val has 'the\\u0301', which train has not \(train has b, 'th\\xe9';"):
        folder(make(tmp_path, f"train/{nfc}", "train/b", f"val/{nfd}", "val/b"))


# --- one reader of labels --------------------------------------------------------------------------------------------


def test_cells_that_are_labels_and_cells_that_are_none() -> None:
    reader = LabelReader("label")
    for cell in (" cat", "cat", 3, 3.0, True):
        reader.take(cell)
    assert reader.names("x") == ("3", "cat", "True") and reader.tensor(reader.names("x")).tolist() == [1, 1, 0, 0, 2]
    for bad in (None, "", " ", float("nan"), 0.5, {"a": 1}, b"cat", ["cat"], "None", " nan", "NA", "a\nb", "[1, 2]"):
        with pytest.raises(LabelError, match="label"):
            reader.ids(bad)
    lists = LabelReader("tags")
    for cells in (["a", "b "], [], ["b", "b"]):
        lists.take(cells)
    assert lists.tensor(lists.names("x")).tolist() == [[1, 1], [0, 0], [0, 1]]
    for bad in ("a", [None], [["a"]], [""]):
        with pytest.raises(LabelError, match="tags"):
            lists.ids(bad)


def test_texts_that_are_lists_are_lists_in_every_source() -> None:
    reader = LabelReader("tags")
    for cell in ("[0, 2]", [2], ' ["2", "0"] ', "[]"):
        reader.take(cell)
    assert reader.tensor(reader.names("x")).tolist() == [[1, 1], [0, 1], [1, 1], [0, 0]]
    for bad in ("['a', 'b']", "[0 1 0]", "[[1]]", "[null]", "[0.5]", "0"):
        with pytest.raises(LabelError, match="tags"):
            reader.ids(bad)
    with pytest.raises(LabelError, match=r"leave data\.label_separator out"):
        LabelReader("tags", ",").ids("[0,2]")
    assert list(LabelReader("x", ",").ids("a, b")) == [0, 1]


def test_lists_of_a_place_for_each_class_are_refused() -> None:
    for cells in ([[0, 1], [1, 0]], ["[1, 0, 0]", "[0, 1, 0]"], [[1.0, 0.0, 1.0]]):
        reader = LabelReader("tags")
        for cell in cells:
            reader.take(cell)
        with pytest.raises(UserError, match=r"each list in tags is \d numbers 0 and 1.*such as \[2\] for \[0, 0, 1\]"):
            reader.tensor(reader.names("x"))


def test_names_that_may_be_several_labels_or_none_are_said() -> None:
    assert not name_warnings(["a", "b", "a b", "c|d", "R&D", "-1", "1"])
    (warning,) = name_warnings(["a", "b", "a|b", "b, a"])
    assert "2 class names may be several labels, such as 'a|b'" in warning and "data.label_separator" in warning
    (warning,) = name_warnings(["-1", "0", "1"])
    assert "-1 is read as a class" in warning


def test_names_of_missing_values_and_odd_brackets_are_classes_where_they_are_named() -> None:
    reader = LabelReader("label", names=["None", "[a b]"])
    for cell in ("None", "none", "[a b]", "[unknown]", "[", "x\u2028y"):
        reader.ids(cell)
    assert [*reader.known] == ["None", "none", "[a b]", "[unknown]", "[", "x\u2028y"]
    for bad in ("nan", "[a c]", None):
        with pytest.raises(LabelError, match="label"):
            reader.ids(bad)


# --- shards ----------------------------------------------------------------------------------------------------------


def samples(count: int = 20, name: str = "{i}", image: str = "png", label: str = "cls") -> dict[str, bytes]:
    files = {}
    for i in range(count):
        files[f"{name.format(i=i)}.{image}"] = picture(i)
        files[f"{name.format(i=i)}.{label}"] = f"{i % 2}\n".encode()
    return files


def shards(root: Path | str, **changes: Any) -> Source:
    return open_source(DataConf(source=SourceKind.webdataset, root=str(root), **changes))


@pytest.mark.parametrize("label", [None, "", "  ", 0.5, {"a": 1}, [None], [1]], ids=str)
def test_a_bad_label_of_a_shard_names_its_sample(tmp_path: Path, label: Any) -> None:
    write_shard(
        tmp_path / "0.tar", {**samples(), "bad.png": picture(99), "bad.json": json.dumps({"label": label}).encode()}
    )
    with pytest.raises(UserError, match=r"0\.tar: bad\.png has .*label"):
        shards(tmp_path)


def test_lists_in_shards_are_several_labels(tmp_path: Path) -> None:
    files = {}
    for i in range(20):
        files |= {f"{i}.png": picture(i), f"{i}.json": json.dumps({"label": [i % 2, 2] if i % 3 else [i % 2]}).encode()}
    write_shard(tmp_path / "0.tar", files)
    source = shards(tmp_path)
    assert source.is_multilabel and source.classes == ("0", "1", "2")
    total = sum(split.labels.sum(0) for split in source.splits.values())
    assert total.tolist() == [10, 10, 13]  # type: ignore[union-attr]
    (tmp_path / "classes.txt").write_bytes("\ufeffcat\ndog\nwet\n".encode())
    assert shards(tmp_path).classes == ("cat", "dog", "wet")


def test_lists_and_several_lines_in_cls_files(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(i) for i in range(20)}
    lists = {f"{i}.cls": f" [{i % 2}, 2]\r\n".encode() for i in range(20)}
    write_shard(tmp_path / "0.tar", files | lists)
    assert shards(tmp_path).is_multilabel and shards(tmp_path).classes == ("0", "1", "2")
    write_shard(tmp_path / "0.tar", files | lists | {"7.cls": b"1"})
    with pytest.raises(UserError, match=r"7\.png has one label in label where others have lists"):
        shards(tmp_path)
    write_shard(tmp_path / "0.tar", samples() | {"7.cls": b"0\n2\n"})
    with pytest.raises(UserError, match=r"7\.png has label='0\\n2', a label of several lines"):
        shards(tmp_path)


@pytest.mark.parametrize("name", ["im{i}_0.5", "v1.2/im{i}.a.b", "IM.{i}"])
@pytest.mark.parametrize(("image", "label"), [("png", "cls"), ("PNG", "CLS"), ("Png", "cls")])
def test_names_with_dots_and_upper_case_endings_are_read(tmp_path: Path, name: str, image: str, label: str) -> None:
    write_shard(tmp_path / "0.TAR", samples(name=name, image=image, label=label))
    source = shards(tmp_path)
    assert source.num_images == 20 and source.classes == ("0", "1") and "left out" not in source.description


def test_what_else_lies_in_shards_is_counted(tmp_path: Path) -> None:
    more = {f"{i}.seg.png": picture(i) for i in range(20)} | {f"{i}.txt": b"a cat" for i in range(3)} | {"x.cls": b"1"}
    write_shard(tmp_path / "0.tar", {**samples(), **more, "._1.png": b"", "__MACOSX/1.png": b""})
    source = shards(tmp_path)
    assert source.num_images == 20
    assert "[left out: 20 .seg.png, 3 .txt, 1 label without an image]" in source.description


def test_one_image_of_another_ending_is_the_image_and_two_are_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", samples(image="input.png"))
    assert shards(tmp_path).num_images == 20
    write_shard(
        tmp_path / "0.tar", {**samples(), **samples(3, name="pair{i}", image="a.png"), "pair0.b.png": picture(77)}
    )
    source = shards(tmp_path)
    assert source.num_images == 22 and "left out: 1 .b.png, 1 .a.png" in source.description.replace(
        "1 .a.png, 1 .b.png", "1 .b.png, 1 .a.png"
    )


def test_archives_beside_and_below_are_read_or_counted(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples())
    write_shard(tmp_path / "part2" / "deep" / "b.tar", samples(name="b{i}"))
    for name in ("c.tar.gz", "d.tgz", "part2/e.tar.zst", "notes"):
        (tmp_path / name).write_bytes(b"x")
    source = shards(tmp_path)
    assert source.num_images == 40
    assert "[left out: 1 .tar.gz, 1 .tgz, 1 file without an ending, 1 .tar.zst]" in source.description
    (tmp_path / "packed").mkdir()
    (tmp_path / "c.tar.gz").rename(tmp_path / "packed" / "c.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"no \.tar files there \(found 1 \.tar\.gz\); unpack these"):
        shards(tmp_path / "packed")


def test_a_split_of_shards_that_ends_empty_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / split / "0.tar", samples(name=f"{split}{{i}}"))
    assert sizes(shards(tmp_path)) == {"train": 20, "val": 20, "test": 0}
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"/test is named like a split and has no \.tar files"):
        shards(tmp_path)
    write_shard(tmp_path / "test" / "0.tar", {"x.txt": b"nothing"})
    with pytest.raises(UserError, match=r"the shards of test hold no images \[left out: 1 \.tar\.gz, 1 \.txt\]"):
        shards(tmp_path)


def test_shards_beside_those_of_splits_are_a_question_or_extra(tmp_path: Path) -> None:
    for place in ("train", "val", "unlabeled"):
        write_shard(tmp_path / place / "0.tar", samples(name=f"{place}{{i}}"))
    assert "[left out: 1 shard in unlabeled]" in shards(tmp_path).description
    write_shard(tmp_path / "rest" / "0.tar", samples(name="rest{i}"))
    with pytest.raises(UserError, match="rest beside train, val"):
        shards(tmp_path)


def test_folder_and_name_of_a_shard_agree_or_are_a_question(tmp_path: Path) -> None:
    def write(*names: str) -> Path:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            write_shard(root / name, samples(name=f"{name.replace('/', '-')}{{i}}"))
        return root

    for names in (
        ("train/a-0.tar", "train/val-0.tar"),
        ("train/0.tar", "val/test-0.tar"),
        ("val/a/train0.tar", "b.tar"),
    ):
        with pytest.raises(UserError, match=r"its folder is of \w+ and its name says \w+; rename it"):
            shards(write(*names))
    both = write("train/train-test-0.tar", "val/set-val-0.tar")  # the folder is one of the words
    assert sizes(shards(both)) == {"train": 20, "val": 20, "test": 0}
    assert sizes(shards(f"{both}/train/*.tar::{both}/val/*.tar")) == {"train": 20, "val": 20, "test": 0}
    place = write("test/train-0.tar", "test/val-0.tar", "test/sub/train-1.tar")  # data.root may be called anything
    assert sizes(shards(place / "test")) == {"train": 40, "val": 20, "test": 0}
    assert sizes(shards(place / "test" / "{train,val}-0.tar")) == {"train": 20, "val": 20, "test": 0}
    with pytest.raises(UserError, match=r"is named like a split and .* like none"):
        shards(write("0.tar", "val/0.tar"))


def test_a_name_with_brackets_is_a_name_first_and_a_pattern_then(tmp_path: Path) -> None:
    for folder_name in ("w[v2]", "wv", "w2"):
        for number in range(2):
            write_shard(tmp_path / folder_name / f"t-{number:03}.tar", samples(name=f"{folder_name}{number}_{{i}}"))
    assert shards(tmp_path / "w[v2]" / "t-{000..001}.tar").num_images == 40
    assert shards(tmp_path / "w[v2]" / "t-*.tar").num_images == 40
    assert shards(tmp_path / "w[v2]").num_images == 40
    assert shards(tmp_path / "w[v2]" / "t-000.tar").num_images == 20
    assert shards(tmp_path / "w[2]" / "t-*.tar").num_images == 40
    with pytest.raises(FileNotFoundError, match=r"there is no file for 2 shards: .*t-002\.tar, .*t-003\.tar"):
        shards(tmp_path / "wv" / "t-{000..003}.tar")


def test_a_class_that_is_no_utf8_is_carried_through_and_utf16_is_named(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar",
        samples() | {"l.png": picture(50), "l.cls": b"caf\xe9"} | {f"{i}.cls": b"a" for i in range(20)},
    )
    with pytest.raises(UserError, match=r"in class caf\udce9 \(1\)"):
        shards(tmp_path)
    write_shard(tmp_path / "0.tar", samples() | {"l.png": picture(50), "l.cls": "caf\xe9".encode("utf-16")})
    with pytest.raises(UserError, match=r"l\.cls: is text in UTF-16"):
        shards(tmp_path)


# --- tables ----------------------------------------------------------------------------------------------------------


def table(path: Path, **changes: Any) -> Source:
    return open_source(DataConf(source=SourceKind.table, table=str(path), **changes))


def listed(root: Path, form: str, separator: str = ",", encoding: str = "utf-8") -> Path:
    """A table of the images in `root/pics/{cat,dog}`, each path in the form `form`."""
    make(root / "pics", "cat", "dog", count=6)
    rows = [(form.format(name=name, i=i), name) for name in ("cat", "dog") for i in range(6)]
    text = "\n".join(separator.join(row) for row in [("path", "label"), *rows])
    (root / "t.csv").write_bytes(text.encode(encoding))
    return root / "t.csv"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("pics/{name}/{i}", r"there is pics/cat/0\.png, so the ending is missing: add data\.path_suffix=\.png"),
        ("https://host/{name}/{i}.png", "it is an address; download the images"),
        ("{name}/{i}.png", None),
        ("/home/me/set/pics/{name}/{i}.png", r"there is pics/cat/0\.png in .*: take /home/me/set/ off the paths"),
        ("C:\\me\\{name}\\no{i}.png", "it is a path of Windows"),
        ("file:///pics/{name}/{i}.png", r"an address of a file on a machine; write it as a path, /pics/cat/0\.png"),
        ("PICS/{name}/{i}.PNG", r"there is pics/cat/0\.png, in other upper and lower case"),
        ("pics/{name}%2F{i}.png", r"there is pics/cat/0\.png; write the paths as the files are called"),
        ("pics/{name}/{i}.jpg", r"there is pics/cat/0\.png, with another ending than \.jpg"),
    ],
)
def test_paths_that_lead_nowhere_say_what_they_look_like(tmp_path: Path, form: str, words: str | None) -> None:
    path = listed(tmp_path, form)
    if words is None:
        with pytest.raises(UserError, match=rf"from another folder: set data\.root={tmp_path / 'pics'}\b"):
            table(path)
        with pytest.raises(UserError, match=rf"from another folder: set data\.root={tmp_path / 'pics'}\b"):
            table(path, root=str(tmp_path / "pics" / "cat"))
        assert table(path, root=str(tmp_path / "pics")).num_images == 12
        return
    with pytest.raises(UserError, match=words) as caught:
        table(path)
    assert "\n" not in str(caught.value)


def test_backslashes_of_windows_are_read(tmp_path: Path) -> None:
    source = table(listed(tmp_path, "pics\\{name}\\{i}.png"))
    assert source.num_images == 12 and source.splits["train"].load(0).shape == (3, 6, 6)
    assert any("have backslashes" in line for line in source.warnings)


@pytest.mark.parametrize("suffix", [".png", "auto"])
def test_endings_are_put_behind_paths(tmp_path: Path, suffix: str) -> None:
    path = listed(tmp_path, "pics/{name}/{i}")
    source = table(path, path_suffix=suffix)
    assert all(source.splits[name].load(0).shape == (3, 6, 6) for name in source.splits)
    assert table(listed(tmp_path, "pics/{name}/{i}.png"), path_suffix=suffix).num_images == 12
    if suffix == "auto":
        (tmp_path / "pics" / "cat" / "3.jpg").touch()
        path = listed(tmp_path, "pics/{name}/{i}")
        with pytest.raises(UserError, match=r"pics/cat/3 may be 3\.jpg or 3\.png; say the ending"):
            table(path, path_suffix=suffix)


def rows_of(root: Path, rows: dict[str, Any], **changes: Any) -> Source:
    """A table of cats and dogs with 10 rows of train for each, and `rows`: name -> [label, split]."""
    (root / "pics").mkdir(exist_ok=True)
    cells = {f"{i}": [("cat", "dog")[i % 2], "train"] for i in range(20)} | rows
    for number, name in enumerate(cells):
        (root / "pics" / f"{name}.png").write_bytes(picture(number))
    lines = [json.dumps({"path": f"pics/{name}.png", "label": a, "split": b}) for name, (a, b) in cells.items()]
    (root / "t.jsonl").write_text("\n".join(lines))
    return table(root / "t.jsonl", split_column="split", **changes)


def test_rows_beside_the_splits_and_withheld_labels_are_left_out_and_counted(tmp_path: Path) -> None:
    extra = {f"e{i}": [None, word] for i, word in enumerate(("unlabeled", "Extra ", "withheld"))}
    hidden = {f"h{i}": [cell, "test"] for i, cell in enumerate((None, "", " "))}
    source = rows_of(tmp_path, extra | hidden)
    assert sizes(source) == {"train": 16, "val": 2, "test": 2}
    assert "3 images without a label in test" in source.description and "1 row of Extra" in source.description
    assert source.splits["train"].name_of(0).endswith("/0.png")
    with pytest.raises(UserError, match=r"3 rows cannot be used: row 21 has no label; row 22 .*; row 23 has no label$"):
        rows_of(tmp_path, hidden | {"x": ["cat", "test"]})
    with pytest.raises(UserError, match=r"1 row cannot be used: row 21 has no label"):
        rows_of(tmp_path, {"x": [None, "train"]})
    with pytest.raises(UserError, match=r"1 row cannot be used: row 21 has split='trian'"):
        rows_of(tmp_path, {"x": ["cat", "trian"]})


@pytest.mark.parametrize("word", ["nan", "None", "null", "NA", "NaN "])
def test_words_for_missing_values_are_no_classes_unless_they_are_named(tmp_path: Path, word: str) -> None:
    rows = {f"n{i}": [word, "train"] for i in range(5)}
    with pytest.raises(UserError, match=rf"row 21 has label='{word.strip()}', as programs write a missing label"):
        rows_of(tmp_path, rows)
    names = sorted(["cat", "dog", word.strip()], key=str.casefold)
    assert list(rows_of(tmp_path, rows, classes=names).classes) == names


@pytest.mark.parametrize("again", ["./pics/0.png", "pics//0.png", "pics/././0.png", "{root}/pics/0.png"])
def test_a_path_that_is_written_in_two_ways_is_one_path(tmp_path: Path, again: str) -> None:
    rows_of(tmp_path, {})
    for label in ("cat", "dog"):
        line = json.dumps({"path": again.format(root=tmp_path), "label": label, "split": "train"})
        (tmp_path / "u.jsonl").write_text((tmp_path / "t.jsonl").read_text() + "\n" + line)
        if label == "cat":
            (warning,) = table(tmp_path / "u.jsonl").warnings
            assert "pics/0.png in rows 1 and 21" in warning
        else:
            with pytest.raises(UserError, match=r"1 path with several labels: pics/0\.png in rows 1 and 21"):
                table(tmp_path / "u.jsonl")


def test_cells_in_quotes_behind_blanks_lose_both(tmp_path: Path) -> None:
    path = listed(tmp_path, "pics/{name}/{i}.png", ", ")
    path.write_text(path.read_text().replace(", cat", ', "cat"').replace(", dog", ",dog "))
    assert table(path).classes == ("cat", "dog")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_first_line_says_what_stands_between_cells(tmp_path: Path, separator: str) -> None:
    source = table(listed(tmp_path, "pics/{name}/{i}.png", separator))
    assert source.classes == ("cat", "dog") and source.num_images == 12


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_tables_in_utf16_are_named(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(UserError, match=r"t\.csv: (is|looks like) text in UTF-16.*`CSV UTF-8` in Excel"):
        table(listed(tmp_path, "pics/{name}/{i}.png", encoding=encoding))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"PK\x03\x04", "Excel"),
        (b"PAR1", "ends? in .parquet"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path: Path, start: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(start + b"path,label\n" * 9)
    with pytest.raises(UserError, match=words):
        table(tmp_path / "t.csv")


# --- a second look: what was silently read otherwise ------------------------------------------------------------------


def test_one_class_folder_with_splits_in_it_is_enough_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the class folders hold splits \(cats/train, val\); put the splits outside"):
        folder(make(tmp_path / "a", "cats/train", "cats/val", "dogs"))
    with pytest.raises(UserError, match=r"hold splits \(data/Training, Test\)|hold splits \(data/Test, Training\)"):
        folder(make(tmp_path / "b", "data/Training", "data/Test", "masks/Training"))
    assert folder(make(tmp_path / "c", "cats/train", "cats/x", "dogs")).num_images == 12  # no split but train


def test_a_missing_shard_in_a_folder_with_brackets_is_said(tmp_path: Path) -> None:
    write_shard(tmp_path / "a[1]" / "t-0.tar", samples())
    with pytest.raises(FileNotFoundError, match=r"there is no file for 1 shard: .*t-1\.tar"):
        shards(tmp_path / "a[1]" / "t-{0..1}.tar")


def test_shards_of_no_split_beside_those_of_test_are_not_trained_on_silently(tmp_path: Path) -> None:
    for number, names in enumerate((("trainval-0", "test-0"), ("train-0", "val-0", "rest-0"), ("0", "dev-1"))):
        for name in names:
            write_shard(tmp_path / str(number) / f"{name}.tar", samples(name=f"{name}_{{i}}"))
        with pytest.raises(UserError, match=r"is named like a split and \S+ like none; put the shards into folders"):
            shards(tmp_path / str(number))
    for name in ("train0000", "train0001", "val0000"):
        write_shard(tmp_path / "digits" / f"{name}.tar", samples(name=f"{name}_{{i}}"))
    assert sizes(shards(tmp_path / "digits")) == {"train": 40, "val": 20, "test": 0}


def test_a_key_that_was_named_is_read_and_no_cls(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i in range(20):
        cells = {"label": "ba"[i % 2], "fine": f"fine{i % 2}"}
        files |= {f"{i}.png": picture(i), f"{i}.cls": b"ab"[i % 2 :][:1], f"{i}.json": json.dumps(cells).encode()}
    write_shard(tmp_path / "0.tar", files)
    assert shards(tmp_path, label_column="fine").classes == ("fine0", "fine1")
    with pytest.raises(UserError, match=r"20 images without .* a \.json with 'fime' beside each.*leave it out to read"):
        shards(tmp_path, label_column="fime")
    source = shards(tmp_path, val_fraction=0.0, test_fraction=0.0)
    label = dict(zip(map(source.splits["train"].name_of, range(20)), source.splits["train"].labels, strict=True))
    assert source.classes[int(next(value for name, value in label.items() if name.endswith("/0.png")))] == "a"


def test_invisible_letters_and_zeros_behind_the_point_look_alike() -> None:
    for pair in (["cat", "cat\u200b"], ["\ufeffcat", "cat"], ["\u202ecat", "cat"], ["1", "1.0"], ["10", "10.00"]):
        assert look_alikes(pair) == [pair]
    assert not look_alikes(["1.5", "1", "2", "v1.0", "v1.01", "1.0.1"])


def test_images_whose_group_is_no_number_are_alone() -> None:
    groups = Groups.of([float("nan"), None, " ", 3.0, 3, "3", 2.5])
    assert groups.numbers.tolist() == [-1, -1, -1, 0, 0, 0, 1] and list(groups.names) == ["3", "2.5"]


def test_a_fold_without_images_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a", "b", count=5)
    with pytest.raises(UserError, match=r"data\.fold=9: no image is in this fold, of 8; take fewer folds"):
        folder(tmp_path, folds=10, fold=9)
    with pytest.raises(UserError, match="all images are in this fold, of 10 in 1 group,"):
        folder(tmp_path, folds=2, group=r"\.(png)")


def test_a_list_of_class_names_is_cut_at_line_breaks_alone(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("a\u2028b\r\n\nc\x85d\x0ce\n".encode())
    labels = LabelReader("label")
    for number in "10":
        labels.take(number)
    names, found = _classes([tmp_path / "classes.txt"], labels, text_limit(1), "x", False)
    assert names == ("a\u2028b", "c\x85d\x0ce") and found.tolist() == [1, 0]
