"""What a split promises: every image in one split, groups whole, given splits untouched, no dependence on the place."""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.config import Conf, DataConf, SourceKind, find_problems
from finetune.data import open_source
from finetune.data.cutting import cut, in_fold
from finetune.data.selection import shares_to_cut, split_up
from finetune.data.sources.digits import find_digits
from finetune.data.split import SPLITS, FoundImages, Source
from finetune.data.streams import ranks
from finetune.system.errors import UserError
from tests.data.test_sources import write_shard

# --- the cut of any images into any groups ---------------------------------------------------------------------------


@st.composite
def grouped_images(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks, strata and groups of up to 80 images."""
    count = draw(st.integers(1, 80))
    strata = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, draw(st.integers(0, 90))), min_size=count, max_size=count))
    order = ranks("split", draw(st.integers(0, 5)), [f"{i}.png" for i in range(count)])
    return order, np.array(strata, dtype=np.int64), np.array(groups, dtype=np.int64)


SHARES = st.sampled_from([{}, {"val": 0.1}, {"test": 0.5}, {"val": 0.1, "test": 0.3}, {"val": 0.45, "test": 0.45}])


@settings(max_examples=300, deadline=None)
@given(grouped_images(), SHARES)
def test_a_cut_gives_every_image_one_split_and_every_group_too(images: tuple, shares: dict[str, float]) -> None:
    order, strata, groups = images
    parts = cut(order, strata, shares=shares, groups=groups)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(order)))
    split_of = {row: name for name, rows in parts.items() for row in rows.tolist()}
    assert all(len({split_of[row] for row in np.flatnonzero(groups == group)}) == 1 for group in set(groups.tolist()))
    assert set(strata[parts["train"]].tolist()) == set(strata.tolist()), "every class stays in train"
    again = np.random.default_rng(0).permutation(len(order))  # the order in which images are listed changes nothing
    moved = cut(order[again], strata[again], shares=shares, groups=groups[again])
    assert {name: sorted(again[rows].tolist()) for name, rows in moved.items()} == {
        name: rows.tolist() for name, rows in parts.items()
    }


@settings(max_examples=200, deadline=None)
@given(grouped_images(), SHARES, st.integers(2, 5))
def test_images_that_are_alone_are_cut_as_without_groups(images: tuple, shares: dict[str, float], folds: int) -> None:
    order, strata, _ = images
    alone = np.arange(len(order))[::-1].copy()
    for groups in (alone, alone * 7 + 3):
        for name, rows in cut(order, strata, shares=shares, groups=groups).items():
            assert rows.tolist() == cut(order, strata, shares=shares)[name].tolist()
        for fold in range(folds):
            plain = in_fold(order, strata, folds=folds, fold=fold)
            assert (in_fold(order, strata, folds=folds, fold=fold, groups=groups) == plain).all()


@settings(max_examples=200, deadline=None)
@given(grouped_images(), st.integers(2, 5))
def test_folds_deal_out_every_image_once_and_no_group_twice(images: tuple, folds: int) -> None:
    order, strata, groups = images
    inside = np.stack([in_fold(order, strata, folds=folds, fold=fold, groups=groups) for fold in range(folds)])
    assert (inside.sum(0) == 1).all()
    fold_of = inside.argmax(0)
    assert all(len(set(fold_of[groups == group].tolist())) == 1 for group in set(groups.tolist()))


@pytest.mark.parametrize("size", [2, 5, 10, 40])
def test_classes_keep_their_shares_as_near_as_groups_allow(size: int) -> None:
    rng = np.random.default_rng(size)
    groups = np.repeat(np.arange(2000 // size), size)
    strata = np.where(rng.random(2000) < 0.2, 1, 0)  # groups of both classes, 1 in 5 of each
    order = ranks("split", 0, map(str, range(2000)))
    parts = cut(order, strata, shares={"val": 0.1, "test": 0.3}, groups=groups)
    for name, share in {"val": 0.1, "test": 0.3}.items():
        for stratum in (0, 1):
            total = int((strata == stratum).sum())
            assert abs((strata[parts[name]] == stratum).sum() - share * total) <= size
    folds = [in_fold(order, strata, folds=5, fold=fold, groups=groups) for fold in range(5)]
    for stratum in (0, 1):
        sizes = [int((strata[inside] == stratum).sum()) for inside in folds]
        assert max(sizes) - min(sizes) <= size


def test_an_added_group_moves_hardly_any_other() -> None:
    names = [f"{i:04}" for i in range(1000)]
    groups = np.arange(1000) // 3
    strata = np.arange(1000) // 3 % 2
    parts = cut(ranks("split", 0, names), strata, shares={"val": 0.1, "test": 0.1}, groups=groups)
    more = cut(
        ranks("split", 0, [*names, "x", "y", "z"]),
        np.append(strata, [0, 0, 0]),
        shares={"val": 0.1, "test": 0.1},
        groups=np.append(groups, [999, 999, 999]),
    )
    assert all(len(set(rows.tolist()) - set(more[name].tolist())) <= 9 for name, rows in parts.items())


# --- which splits are cut --------------------------------------------------------------------------------------------


@st.composite
def found_images(draw: st.DrawFn) -> FoundImages:
    """The digits with any given splits."""
    found = find_digits(DataConf())
    numbers = [0, *draw(st.lists(st.sampled_from([1, 2]), max_size=2))]
    chosen = torch.tensor(draw(st.lists(st.sampled_from(numbers), min_size=100, max_size=100)), dtype=torch.uint8)
    chosen[:50] = 0
    return FoundImages(**{**vars(found), "given": chosen.repeat(18)[: len(found.labels)]})


FRACTIONS = st.sampled_from([0.0, 0.1])


@settings(max_examples=40, deadline=None)
@given(found_images(), FRACTIONS, FRACTIONS)
def test_what_the_data_gives_stays_whole(found: FoundImages, val: float, test: float) -> None:
    source = split_up(found, DataConf(val_fraction=val, test_fraction=test))
    rows = {name: set(split.rows.tolist()) for name, split in source.splits.items()}
    assert sum(map(len, rows.values())) == len(set().union(*rows.values())) == len(found.labels)
    given_rows = {name: set(np.flatnonzero(found.given.numpy() == i).tolist()) for i, name in enumerate(SPLITS)}
    for name in ("val", "test"):
        if given_rows[name]:
            assert rows[name] == given_rows[name]
    if given_rows["val"]:
        assert rows["train"] == given_rows["train"] and rows["test"] == given_rows["test"]
    else:
        assert source.has("val") == (val > 0)
        assert source.has("test") == (test > 0 or bool(given_rows["test"]))
    assert source.counts == {"images": 1797, "classes": 10, **{name: len(rows[name]) for name in SPLITS}}
    assert all(f"{len(rows[name]):,} {name}" in source.description for name in SPLITS)


def test_a_share_that_would_be_ignored_is_refused() -> None:
    found = find_digits(DataConf())
    found.given[::7] = 1
    with pytest.raises(UserError, match=r"data\.test_fraction=0\.2 would be ignored: the data gives val, so train"):
        shares_to_cut(found, DataConf(test_fraction=0.2))
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.2 would be ignored: the data gives val"):
        shares_to_cut(found, DataConf(val_fraction=0.2))
    assert shares_to_cut(found, DataConf(val_fraction=0.0, test_fraction=0.0)) == {}
    with pytest.raises(UserError, match=r"data\.split_seed=3 would be ignored: data=digits is not cut"):
        split_up(found, DataConf(split_seed=3))
    assert split_up(found, DataConf(split_seed=3, folds=4)).has("val")


@pytest.mark.parametrize("count", range(3, 31))
def test_small_classes_give_an_image_to_each_split_and_keep_most(count: int) -> None:
    strata = np.zeros(count, dtype=np.int64)
    parts = cut(ranks("split", 0, map(str, range(count))), strata, shares={"val": 0.1, "test": 0.1})
    share = max(1, int(count * 0.1 + 0.5))
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": count - 2 * share,
        "val": share,
        "test": share,
    }


# --- sources: the place, groups and equal images ---------------------------------------------------------------------

KINDS = ["folder", "table", "webdataset", "hf"]
PATIENTS = 12


def write_data(root: Path, kind: str, *, splits: bool = False) -> DataConf:
    """Four pictures of each of 12 patients, in two classes; the fourth is a copy of the next patient's first one."""
    root.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, bytes] = {}
    for patient in range(PATIENTS):
        for i in range(4):
            shown = (patient, i) if i < 3 else ((patient + 1) % PATIENTS, 0)
            label = "ab"[patient % 2]
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (shown[0] * 20, shown[1] * 60, 0)).save(file, "PNG")
            split = f"{('train', 'test')[patient > 9]}/" if splits else ""
            pictures[f"{split}{label}/p{patient}-{i}.png"] = file.getvalue()
    conf = DataConf(source=SourceKind(kind), root=None if kind == "hf" else str(root))
    label_of = {name: name.split("/")[-2] for name in pictures}
    patient_of = {name: name.split("/")[-1].partition("-")[0] for name in pictures}
    if kind == "webdataset":
        for number in range(2):
            files: dict[str, bytes] = {}
            for name in list(pictures)[number::2]:
                about = {"label": label_of[name], "patient": patient_of[name]}
                files |= {name: pictures[name], name.replace(".png", ".json"): json.dumps(about).encode()}
            write_shard(root / f"{number}.tar", files)
        return conf
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    if kind == "table":
        rows = [f"{name},{label_of[name]},{patient_of[name]}" for name in pictures]
        (root / "t.csv").write_text("\n".join(["path,label,patient", *rows]) + "\n")
        conf.root, conf.table = None, str(root / "t.csv")
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        columns = {
            "image": [str(root / name) for name in pictures],
            "label": list(label_of.values()),
            "patient": list(patient_of.values()),
        }
        saved = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        saved.save_to_disk(str(root / "saved"))
        conf.name = str(root / "saved")
    return conf


def members(source: Source) -> dict[str, list[tuple[bytes, int]]]:
    """Bytes and label of each split's images."""
    return {
        name: [
            (split.store.read(row), int(label)) for row, label in zip(split.rows.tolist(), split.labels, strict=True)
        ]
        for name, split in source.splits.items()
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def spellings(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same place as a person may type it; each is used in a working directory of its own."""
    path = Path(place)
    yield place
    monkeypatch.chdir(path.parent)
    yield path.name
    yield f"./{path.name}"
    yield os.path.join("..", path.parent.name, path.name)
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(path)
    yield str(link)
    if path.is_dir():
        monkeypatch.chdir(path)
        yield "."


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_does_not_depend_on_the_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = write_data(tmp_path / "here" / "data", kind)
    key = {"table": "table", "hf": "name"}.get(kind, "root")
    expected = members(open_source(conf))
    place = getattr(conf, key)
    for spelling in spellings(place, tmp_path, monkeypatch):
        if kind == "table" and "link" in spelling:
            conf.root = os.path.dirname(place)  # paths count from the folder of the link otherwise
        setattr(conf, key, spelling)
        assert members(open_source(conf)) == expected, spelling
        conf.root = None if kind == "table" else conf.root
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere" / "deep")
    setattr(conf, key, place.replace(str(tmp_path / "here"), str(tmp_path / "elsewhere" / "deep")))
    assert members(open_source(conf)) == expected


def test_a_table_of_absolute_paths_is_split_as_one_of_relative_ones(tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", "table")
    expected = members(open_source(conf))
    table = tmp_path / "data" / "t.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{tmp_path}/data/{line}" for line in lines[1:])]) + "\n")
    assert members(open_source(conf)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_stay_together(kind: str, tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", kind)
    for changes in ({}, {"split_seed": 3}, {"val_fraction": 0.3}, {"folds": 3}, {"folds": 3, "fold": 2}):
        for name, value in changes.items():
            setattr(conf, name, value)
        source = open_source(conf)
        found = members(source)
        copies = [set(data for data, _ in found[name]) for name in SPLITS]
        assert not (copies[0] & copies[1] or copies[0] & copies[2] or copies[1] & copies[2])
        assert sum(map(len, found.values())) == 4 * PATIENTS
        assert "24 images of 12 groups that stay together" in source.description


def test_the_split_is_the_same_with_and_without_a_memory_of_earlier_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = write_data(tmp_path / "data", "folder")
    first = members(open_source(conf))
    assert list((tmp_path / "cache").rglob("*.npz"))
    opened: list[str] = []
    monkeypatch.setattr("finetune.data.sources.stores.read_file", lambda path, *_, **__: opened.append(path))
    again = open_source(conf)
    assert not opened, "equal images are remembered"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert members(again) == members(open_source(conf)) == first


def test_large_files_that_differ_at_the_end_are_read_at_the_end_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.data.sources.stores as stores

    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.bmp")  # all of one size
    shutil.copy(tmp_path / "data" / "a" / "0.bmp", tmp_path / "data" / "b" / "copy.bmp")
    whole: list[str] = []
    read = stores.read_file

    def counted(path: str, limit: int, *, last: int = 0) -> bytes:
        whole.extend([path] * (not last))
        return read(path, limit, last=last)

    monkeypatch.setattr(stores, "read_file", counted)
    source = open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))
    assert sorted(Path(path).name for path in whole) == ["0.bmp", "copy.bmp"]
    assert "2 images of 1 group that stay" in source.description


def test_given_splits_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (4, 4)).save(tmp_path / "data" / split / name / f"{i}.png")
    monkeypatch.setattr("finetune.data.sources.stores.read_file", lambda *_, **__: pytest.fail("read"))
    source = open_source(DataConf(source=SourceKind.folder, root=str(tmp_path / "data")))
    assert [len(split) for split in source.splits.values()] == [6, 6, 0]


def patients_of(source: Source, data: Path) -> dict[str, set[str]]:
    """The patients of each split, by the bytes of their own three pictures."""
    owner = {}
    for patient in range(PATIENTS):
        for i in range(3):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (patient * 20, i * 60, 0)).save(file, "PNG")
            owner[file.getvalue()] = f"p{patient}"
    return {name: {owner[data] for data, _ in found} for name, found in members(source).items()}


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        ("folder", r"/(p\d+)-"),
        ("table", r"/(p\d+)-"),
        ("table", "patient"),
        ("webdataset", "patient"),
        ("webdataset", r"/(p\d+)-"),
        ("hf", "patient"),
    ],
)
def test_groups_stay_together(kind: str, group: str, tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", kind)
    conf.group = group
    assert find_problems(Conf(data=conf)) == []
    source = open_source(conf)  # a copy ties each patient to the next one, so all images are one group
    assert source.counts["train"] == 4 * PATIENTS and not source.has("val") and not source.has("test")
    assert "there is no val: too few groups of images, which stay together, to cut it off" in source.warnings
    for path in (tmp_path / "data").rglob("*-3.png"):
        Image.new("RGB", (8, 8), (int(path.name[1:-6]) * 20, 180, 0)).save(path)
    if kind in ("webdataset", "hf"):
        return
    source = open_source(conf)
    names = {name: {split.name_of(i) for i in range(len(split))} for name, split in source.splits.items()}
    of_split = {name: Counter(Path(path).name.partition("-")[0] for path in found) for name, found in names.items()}
    assert all(count == 4 for counts in of_split.values() for count in counts.values())
    assert sum(len(counts) for counts in of_split.values()) == PATIENTS and all(of_split.values())


def test_groups_that_lie_in_several_given_splits_are_refused_by_name(tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", "folder", splits=True)
    conf.group = r"/(p\d+)-"
    for path in (tmp_path / "data").rglob("*-3.png"):
        path.unlink()
    source = open_source(conf)
    assert source.counts["test"] == 6 and source.has("val")
    shutil.copy(tmp_path / "data" / "train" / "a" / "p0-1.png", tmp_path / "data" / "test" / "a" / "p0-7.png")
    with pytest.raises(UserError, match=r"1 group in several splits: p0 \(train, test\); move each"):
        open_source(conf)


def test_images_without_a_group_are_alone_and_said(tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", "folder")
    conf.group = r"/(p1\d)-"
    source = open_source(conf)
    assert any("gives 40 of 48 images no group: each is alone" in line for line in source.warnings)
    conf.group = r"(patient)"
    with pytest.raises(UserError, match=r"gives no image a group; a name here is a/p0-0\.png"):
        open_source(conf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": SourceKind.folder, "root": "x", "group": "patient"}, "one pair of round brackets"),
        ({"source": SourceKind.folder, "root": "x", "group": "(a)(b)"}, "has 2 pairs of brackets"),
        ({"source": SourceKind.folder, "root": "x", "group": "(?:a)"}, "has 0 pairs of brackets"),
        ({"source": SourceKind.table, "table": "x", "group": "(a"}, "is no regular expression"),
        ({"source": SourceKind.table, "table": "x", "group": ""}, "expected a pattern"),
        ({"group": "(a)"}, "data.group=(a) would be ignored"),
    ],
)
def test_a_group_that_cannot_be_read_is_refused(changes: dict[str, object], words: str) -> None:
    problems = find_problems(Conf(data=DataConf(**changes)))  # type: ignore[arg-type]
    assert len(problems) == 1 and words in problems[0], problems


def test_a_class_of_one_group_is_trained_on_and_said(tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", "folder")
    (tmp_path / "data" / "c").mkdir()
    for i in range(9):
        Image.new("L", (5, 5), 77).save(tmp_path / "data" / "c" / f"{i}.png")
    source = open_source(conf)
    assert source.splits["train"].labels.bincount(minlength=3)[2] == 9
    assert "val has no image of 1 of 3 classes: c" in source.warnings


def test_columns_of_groups_that_are_missing_are_named(tmp_path: Path) -> None:
    conf = write_data(tmp_path / "data", "table")
    conf.group = "patients"
    with pytest.raises(UserError, match=r"no column patients.*did you mean 'patient'"):
        open_source(conf)


def test_the_advice_for_small_classes_beside_folds_is_no_setting_that_is_refused() -> None:
    found = find_digits(DataConf())
    labels = torch.cat([torch.arange(9).repeat(20), torch.tensor([9])])
    found = FoundImages(**{**vars(found), "labels": labels, "given": torch.zeros(181, dtype=torch.uint8),
                           "names": [str(number) for number in range(181)]})  # fmt: skip
    for conf in (DataConf(folds=2), DataConf(folds=2, test_fraction=0)):
        with pytest.raises(UserError, match=r"or cut less: .*data\.val_fraction=0 without data\.folds$"):
            split_up(found, conf)
    plain = DataConf(val_fraction=0, test_fraction=0)
    assert len(split_up(found, plain).splits["train"]) == 181  # the advice works
