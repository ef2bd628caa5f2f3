"""`finetune predict`: tables of every format, continued after a kill, and images sorted into folders."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.__main__ import main
from finetune.system.locks import file_lock
from finetune.use import record, writing
from finetune.use.sorting import safe_name


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link in a folder."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in found}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_table_has_every_readable_image_and_a_list_the_others(
    striped_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(striped_run), "in", "--out", "x.csv", "--top-k", "2", "--batch-size", "7"]) == 1
    found, wanted = rows(Path("x.csv")), finetune.load(striped_run)
    assert list(found[0]) == ["path", "label", "probability", "label_2", "probability_2"] and len(found) == 30
    for row in found:
        (expected,) = wanted.predict(row["path"], top_k=2)
        assert (row["label"], row["label_2"]) == expected.labels
        assert float(row["probability_2"]) == pytest.approx(expected.probabilities[1], abs=1e-5)
    assert {row["path"] for row in rows(Path("x.csv.unreadable.csv"))} == {"in/cut.png", "in/deep/bad.jpg"}
    assert "2 images could not be read" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"in", "x.csv", "x.csv.unreadable.csv"}
    before = tree(Path())
    assert main(["predict", str(striped_run), "in", "--out", "x.csv", "--top-k", "2"]) == 1
    assert "is there already" in capsys.readouterr().err and tree(Path()) == before
    assert main(["predict", str(striped_run), "in", "--out", "x.csv", "--overwrite", "--on-error", "skip"]) == 0
    assert list(rows(Path("x.csv"))[0]) == ["path", "label", "probability"]


class KilledError(Exception):
    """Stands for a kill: nothing in the program catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """Let the `number`-th write of any kind fail; the returned function puts all as it was."""
    calls = 0

    def counted(name: str) -> None:
        real = getattr(record, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise KilledError
            return real(*args, **kwargs)

        monkeypatch.setattr(record, name, wrapper)

    for name in ("write_json", "open_own", "write_atomic"):
        counted(name)
    return monkeypatch.undo


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_an_output_that_was_killed_at_any_write_ends_as_an_unbroken_one(
    name: str, striped_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    words = ["predict", str(striped_run), "in", "--batch-size", "4"]
    monkeypatch.setattr(writing, "BLOCK", 8)
    Path("whole").mkdir()
    assert main([*words, "--out", f"whole/{name}"]) == 1
    wanted = {path: data for path, data in tree(Path("whole")).items() if ".finetune" not in path}
    for number in range(1, 100):
        place = Path(f"killed{number}")
        place.mkdir()
        with monkeypatch.context() as patch:
            undo = killed_at(patch, number)
            code = main([*words, "--out", f"{place}/{name}"])
            undo()
        monkeypatch.setattr(writing, "BLOCK", 8)
        if code == 1 and "finetune is at fault: KilledError" not in capsys.readouterr().err:
            break
        stopped = [path for path in place.rglob("*") if path.is_file()]
        for path in stopped:  # a write that was torn by the kill
            if path.name in (name, f"{name}.unreadable.csv"):
                path.write_bytes(path.read_bytes() + b"torn")
        assert main([*words, "--out", f"{place}/{name}"]) == 1
        found = {path: data for path, data in tree(place).items() if ".finetune" not in path}
        assert found == wanted, number
        assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert number > 8


def test_only_the_same_command_goes_on_and_only_with_what_was_written(
    striped_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "BLOCK", 8)
    words = ["predict", str(striped_run), "in", "--out", "x.csv", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        killed_at(patch, 9)
        main(words)
    before = tree(Path())
    for others in (["--top-k", "2"], ["--tta", "flip"], ["--reject", "0.9"]):
        assert main([*words, *others]) == 1
        assert "was begun with other images, another model or other options" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save("in/more.png")
    assert main(words) == 1
    assert "was begun with other images" in capsys.readouterr().err
    Path("in/more.png").unlink()
    assert tree(Path()) == before
    text = Path("x.csv").read_bytes()
    Path("x.csv").write_bytes(text.replace(b"in/", b"on/", 1))
    assert main(words) == 1
    assert "is not what was written there" in capsys.readouterr().err
    Path("x.csv").write_bytes(text)
    Path(".x.csv.finetune.json").write_text("{")
    assert main(words) == 1
    assert "--overwrite to begin anew" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 1 and len(rows(Path("x.csv"))) == 30


@pytest.mark.parametrize("make", ["file", "link", "folder", "hard link"])
def test_nothing_of_anybody_else_is_written_into(make: str, striped_run: Path, pictures: Path) -> None:
    Path("mine.csv").write_text("mine")
    out = Path("x.csv")
    {
        "file": lambda: out.write_text("mine"),
        "link": lambda: out.symlink_to("mine.csv"),
        "folder": lambda: out.mkdir(),
        "hard link": lambda: out.hardlink_to("mine.csv"),
    }[make]()
    before = tree(Path())
    assert main(["predict", str(striped_run), "in", "--out", "x.csv"]) == 1
    assert tree(Path()) == before
    main(["predict", str(striped_run), "in", "--out", "x.csv", "--overwrite"])
    assert Path("mine.csv").read_text() == "mine"
    assert make not in ("link", "folder") or tree(Path()) == before


def test_stop_ends_at_the_first_damaged_image_and_keeps_what_was_done(
    striped_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(striped_run), "in", "--out", "x.jsonl", "--batch-size", "2"]
    assert main([*words, "--on-error", "stop"]) == 1
    assert "in/cut.png" in capsys.readouterr().err
    done = Path("x.jsonl").read_text()
    assert Path(".x.jsonl.finetune.json").exists() and 0 < done.count("\n") < 30
    assert main([*words, "--on-error", "skip"]) == 0
    assert Path("x.jsonl").read_text().startswith(done) and "are done already" in capsys.readouterr().out
    assert [set(json.loads(line)) for line in Path("x.jsonl").read_text().splitlines()] == [
        {"path", "label", "probability"}
    ] * 30


def test_files_folders_patterns_tables_shards_and_the_standard_input(
    striped_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in/cut.png").unlink(), Path("in/deep/bad.jpg").unlink()
    os.symlink("..", "in/deep/up")  # a loop
    Path("in/table.csv").write_text("file,x\ndeep/1.png,2\n3.png,4\n")
    with tarfile.open("s.tar", "w") as tar:
        for name in ("in/0.png", "in/notes.txt", "in/deep/1.png"):
            tar.add(name)
    for places, wanted in (
        (["in/0.png"], ["in/0.png"]),
        (["in/1*.png", "in/0.png"], ["in/12.png", "in/15.png", "in/18.png", "in/0.png"]),
        (["in/table.csv", "--path-column", "file"], ["in/deep/1.png", "in/3.png"]),
        (["s.tar", "in/0.png"], ["s.tar/in/0.png", "s.tar/in/deep/1.png", "in/0.png"]),
        (["in/**/1.png"], ["in/deep/1.png"]),
    ):
        Path("x.csv").unlink(missing_ok=True)
        assert main(["predict", str(striped_run), *places, "--out", "x.csv"]) == 0
        assert [row["path"] for row in rows(Path("x.csv"))] == wanted
    assert main(["predict", str(striped_run), "in", "--out", "all.csv"]) == 0 and len(rows(Path("all.csv"))) == 30
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/0.png\n\nin/deep/1.png\r\n")))
    assert main(["predict", str(striped_run), "-"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["in/0.png", "in/deep/1.png"]
    for places, message in (
        (["nowhere"], "no such file or folder"),
        (["in/*.gif"], "no file has a name like that"),
        (["in/table.csv"], "no column path"),
        (["in/notes.txt"], "could not be read"),
        (["-", "in"], "so give no others"),
        ([], "PATH is missing"),
    ):
        assert main(["predict", str(striped_run), *places]) in (1, 2)
        assert message in capsys.readouterr().err


def test_sorting_makes_links_or_copies_and_again_changes_nothing(
    striped_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in/deep/0.png").write_bytes(Path("in/0.png").read_bytes())  # a second image of one name, in the same class
    for folder, more in (("links", []), ("copies", ["--copy"])):
        words = ["predict", str(striped_run), "in", "--sort-into", folder, "--on-error", "skip", *more]
        assert main(words) == 0
        first = {path: data for path, data in tree(Path(folder)).items() if path != ".finetune.json"}
        assert len(first) == (31 if folder == "links" else 30)  # two equal copies of one name are one
        assert main(words) == 0
        assert {path: data for path, data in tree(Path(folder)).items() if path != ".finetune.json"} == first
    for row in finetune.load(striped_run).predict(["in/0.png", "in/deep/1.png"]):
        assert Path(f"links/{row.label}/{Path(row.path).name}").resolve() == Path(row.path).resolve()
    assert main(["predict", str(striped_run), "in", "--sort-into", "sure", "--reject", "1"]) == 1
    assert [path.name for path in Path("sure").iterdir() if path.is_dir()] == ["unknown"]
    Path("theirs").mkdir(), Path("theirs/file").write_text("x")
    for folder, message in (("theirs", "is not empty"), ("in/sorted", "where images are sought")):
        assert main(["predict", str(striped_run), "in", "--sort-into", folder]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in Path("theirs").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../../x", "\x1b[31m", ".hidden", "é" * 200, "a\\b", "x\u202e"])
def test_no_name_of_a_class_leads_out_of_its_folder(name: str) -> None:
    safe = safe_name(name)
    assert safe and safe.isprintable() and not safe.startswith(".") and not set(safe) & set("/\\")
    assert len(safe.encode()) < 255 and safe != safe_name(f"{name}!")


def test_cells_are_no_formulas_and_names_of_any_bytes_survive(striped_run: Path, pictures: Path) -> None:
    odd = [b"=1+1.png", b"@x.png", b"\xff.png", b"a\nb.png", b"-2.png"]
    Path("odd").mkdir()
    for name in odd:
        (Path("odd") / os.fsdecode(name)).write_bytes(Path("in/0.png").read_bytes())
    os.chdir("odd")
    assert main(["predict", str(striped_run), "--out", "../x.csv", "--", *map(os.fsdecode, odd)]) == 0
    cells = [row["path"] for row in rows(Path("../x.csv"))]
    assert cells == ["'=1+1.png", "'@x.png", "\\udcff.png", "a\\x0ab.png", "'-2.png"]
    assert main(["predict", str(striped_run), ".", "--out", "../x.jsonl"]) == 0
    names = {json.loads(line)["path"] for line in Path("../x.jsonl").read_text().splitlines()}
    assert names == {f"./{os.fsdecode(name)}" for name in odd}


def test_a_model_without_training_and_flags_that_cannot_be_used(
    pictures: Path, striped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "model=clip", "in/0.png", "--classes", "3, 7", "--top-k", "9", "--out", "x.csv"]
    assert main(words) == 0
    (row,) = rows(Path("x.csv"))
    assert {row["label"], row["label_2"]} == {"3", "7"}
    for words, message in (
        (["predict", str(striped_run), "in", "--out", "x.txt"], "expected a name that ends in .csv"),
        (["predict", str(striped_run), "in", "--out", "no/x.csv"], "does not exist"),
        (["predict", str(striped_run), "in", "--top-k", "0"], "of 1 or more"),
        (["predict", str(striped_run), "in", "--copy"], "goes with --sort-into"),
        (["predict", str(striped_run), "in", "--tpo-k", "2"], "unrecognized arguments"),
        (["predict", "in", "in"], "is no run directory"),
        (["predict"], "RUN is missing"),
        (["predict", "in", "--classes", "a,b"], "RUN is missing"),
    ):
        assert main(words) in (1, 2), words
        assert message in capsys.readouterr().err
    assert not Path("no").exists()


def test_parquet_has_numbered_parts_that_read_as_one_table(striped_run: Path, pictures: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["predict", str(striped_run), "in", "--out", "x.parquet", "--on-error", "skip"]) == 0
    found = parquet.read_table("x.parquet").to_pydict()
    assert list(found) == ["path", "label", "probability"] and len(found["path"]) == 30
    before = tree(Path())
    assert main(["predict", str(striped_run), "in", "--out", "x.parquet"]) == 1 and tree(Path()) == before
    Path("y.parquet").mkdir(), Path("y.parquet/theirs").write_text("x")
    for more in ([], ["--overwrite"]):
        assert main(["predict", str(striped_run), "in", "--out", "y.parquet", *more]) == 1
    assert tree(Path("y.parquet")) == {"theirs": b"x"}
    assert np.isfinite(found["probability"]).all()


def test_several_labels_have_a_column_for_each_class(
    labelled_run: tuple[Path, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = labelled_run
    assert main(["predict", str(run), str(table), "--out", "x.csv"]) == 0
    assert main(["predict", str(run), str(table), "--out", "x.jsonl"]) == 0
    predictor = finetune.load(run)
    found, lines = rows(Path("x.csv")), [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    assert list(found[0]) == ["path", "labels", *(f"p:{name}" for name in predictor.classes)] and "=odd" in str(lines)
    for row, line, wanted in zip(found, lines, predictor.predict(table), strict=True):
        assert line["labels"] == list(wanted.labels)
        assert row["labels"].replace("'=", "=") == ";".join(wanted.labels)
        for name in predictor.classes:
            assert float(row[f"p:{name}"]) == line[f"p:{name}"] == pytest.approx(wanted.scores[name], abs=1e-5)
    assert main(["predict", str(run), str(table), "--sort-into", "sorted"]) == 0
    none = sum(not line["labels"] for line in lines)
    unknown = len(list(Path("sorted/unknown").iterdir())) if none else 0
    assert bool(none) == bool(unknown)
    for flags in (["--top-k", "2"], ["--reject", "0.5"]):
        assert main(["predict", str(run), str(table), *flags]) == 1
        assert "would be ignored: this model gives several labels" in capsys.readouterr().err


def test_two_processes_do_not_write_one_output_and_no_input_is_replaced(
    striped_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_lock(Path(".x.csv.finetune.lock")):
        assert main(["predict", str(striped_run), "in", "--out", "x.csv"]) == 1
    assert "is being written by another process" in capsys.readouterr().err and not Path("x.csv").exists()
    Path("t.csv").write_text("path\nin/0.png\n")
    assert main(["predict", str(striped_run), "t.csv", "--out", "./t.csv", "--overwrite"]) == 2
    assert Path("t.csv").read_text() == "path\nin/0.png\n"
    assert main(["predict", str(striped_run), "t.csv", "--out", "x.csv"]) == 0
