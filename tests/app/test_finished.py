"""The numbers of a finished run are compared with what it wrote before a report shows them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from small_runs import go, small

from finetune.__main__ import main
from finetune.runs.finished import CHECKSUMS, NAMES, check_finished
from finetune.system.reading import DamagedError


def test_a_changed_number_is_named_and_no_report_shows_it(
    tmp_path: Path, stripes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = go(small(stripes), folder)
    assert set(result[CHECKSUMS]) == set(NAMES)
    check_finished(folder)
    assert main(["report", str(folder)]) == 0
    for name, before, after in [
        ("result.json", '"test/top1": ', '"test/top1": 1'),
        ("history.jsonl", '"val/loss": ', '"val/loss": 1'),
        ("rates.json", '"x": [', '"x": [0, '),
        ("metrics.json", '"val"', '"vak"'),
        ("confusion.csv", "across,", "across,1"),
    ]:
        path = folder / name
        whole = path.read_text()
        assert before in whole
        path.write_text(whole.replace(before, after, 1))
        with pytest.raises(DamagedError, match=name):
            check_finished(folder)
        assert main(["report", str(folder)]) == 1
        assert f"{name} is damaged: it is not what the run wrote" in capsys.readouterr().err
        path.write_text(whole)


@pytest.mark.parametrize("gone", ["all", "history.jsonl", "checkpoints/best.safetensors"])
def test_a_run_is_not_finished_because_its_result_says_so(
    tmp_path: Path, stripes: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The entry of the checksums, or one of them, is removed by hand, perhaps to hide a changed number."""
    folder = tmp_path / "run"
    whole = go(small(stripes), folder)
    changed = json.loads((folder / "result.json").read_text())
    if gone == "all":
        del changed[CHECKSUMS]
    else:
        del changed[CHECKSUMS][gone]
    (folder / "result.json").write_text(json.dumps(changed))
    if gone == "all":  # as a result of an earlier version, which can be looked at and leaves no work out
        assert main(["report", str(folder)]) == 0
        capsys.readouterr()
    for words in ([f"resume={folder}"],) if gone == "all" else (["report", str(folder)], [f"resume={folder}"]):
        assert main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"has no checksum of {'result.json, history' if gone == 'all' else gone}" in line
        assert f"remove result.json and continue with resume={folder}" in line
    (folder / "result.json").unlink()
    assert main([f"resume={folder}"]) == 0  # which scores the test images again, and writes all of it
    again = json.loads((folder / "result.json").read_text())
    assert again["status"] == "finished" and again[CHECKSUMS]["checkpoints/best.safetensors"]
    assert again["test/top1"] == whole["test/top1"]


@pytest.fixture
def two(tmp_path: Path, stripes: Path) -> tuple[Path, Path]:
    """Two finished runs that differ in the seed alone; all epochs keep their weights."""
    folders = tmp_path / "one", tmp_path / "other"
    for seed, folder in enumerate(folders):
        go(small(stripes, seed=seed, train__keep=2), folder)
    return folders


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "epoch_0001.safetensors"])
def test_weights_of_another_run_are_not_taken_for_this_run_s(
    two: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = two
    (one / "checkpoints" / name).unlink()  # one file may have several names
    shutil.copy(other / "checkpoints" / name, one / "checkpoints" / name)
    for words in (["report", str(one)], [f"resume={one}"]):
        assert main(words) == 1, words
        assert f"{one / 'checkpoints' / name} is damaged: it is not what the run wrote" in capsys.readouterr().err
    more = main([f"resume={one}", "train.epochs=3"])
    if name == "best.safetensors":  # the epoch's own file is there, and makes it anew
        assert more == 0
    else:
        assert more == 1
        assert f"{name} does not hold the weights that this run saved there" in capsys.readouterr().err


def test_large_weights_may_be_removed_from_a_finished_run(two: tuple[Path, Path]) -> None:
    for path in (two[0] / "checkpoints").glob("*.safetensors"):
        path.unlink()
    assert main(["report", str(two[0])]) == 0 == main([f"resume={two[0]}"])


def test_what_a_clock_says_and_numbers_that_are_none_do_not_count(tmp_path: Path) -> None:
    from finetune.runs.finished import checksums

    one = checksums(tmp_path, {"status": "finished", "seconds": 1.0, "val/top1": math.nan})
    assert one == checksums(tmp_path, {"status": "finished", "seconds": 2.0, "val/top1": None})
    assert one != checksums(tmp_path, {"status": "finished", "seconds": 1.0, "val/top1": 0.5})
