"""Where data and weights lie is no setting: a run continues wherever their fingerprints match, and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_runs import assert_same_run
from test_edited import kill_at

from finetune.__main__ import main
from finetune.runs.history import History

WORDS = ("data=folder", "data.batch_size=8", "train.epochs=2")


@pytest.fixture(scope="module")
def straight(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert main([*WORDS, f"data.root={stripes}", f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def begun(stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in `tmp_path/home` with the relative root `images`, killed in its second epoch."""
    shutil.copytree(stripes, tmp_path / "home" / "images")
    monkeypatch.chdir(tmp_path / "home")
    with monkeypatch.context() as patch:
        kill_at(8, patch)
        assert main([*WORDS, "data.root=images", "hydra.run.dir=run"]) == 1
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "run"


def result(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "result.json").read_text())
    return found


def test_a_relative_place_is_kept_absolute_and_found_from_elsewhere(begun: Path, straight: Path) -> None:
    assert yaml.safe_load((begun / "config.yaml").read_text())["data"]["root"] == str(begun.parent / "images")
    assert main([f"resume={begun}"]) == 0
    assert result(begun)["promise"] == "bitwise"
    assert_same_run(straight, begun)


@pytest.mark.parametrize("is_same_command", [False, True])
def test_data_that_moved_goes_on_to_the_bit(begun: Path, straight: Path, tmp_path: Path, is_same_command: bool) -> None:
    (begun.parent / "images").rename(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    words = [*WORDS, f"hydra.run.dir={begun}"] if is_same_command else [f"resume={begun}"]
    assert main([*words, "data.root=home/../link/"]) == 0
    assert result(begun)["promise"] == "bitwise"
    assert yaml.safe_load((begun / "config.yaml").read_text())["data"]["root"] == str(tmp_path / "link")
    assert_same_run(straight, begun)


def change_name(root: Path) -> None:
    (root / "flat" / "0.png").rename(root / "flat" / "zero.png")


def change_size(root: Path) -> None:
    Image.new("RGB", (32, 32)).save(root / "flat" / "0.png")


def change_bytes(root: Path) -> None:
    for path in root.rglob("*.png"):  # one byte of each file, in its checksums
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("change", [change_name, change_size, change_bytes])
def test_other_images_at_the_new_place_are_refused(
    begun: Path, tmp_path: Path, change: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun.parent / "images").rename(tmp_path / "other")
    change(tmp_path / "other")  # type: ignore[operator]
    assert main([f"resume={begun}", "data.root=other"]) == 1
    said = capsys.readouterr().err
    assert "images are not those that the run began with" in said and f"-> {tmp_path / 'other'}" in said
    if change is not change_bytes:
        assert main([f"resume={begun}", "data.root=other", "resume_force=true"]) == 0
        assert result(begun)["promise"] == "none"


def test_a_run_with_a_batch_that_was_chosen_goes_on(
    stripes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`config.yaml` has a number for the word `auto`, which nobody may type."""
    words = [f"data.root={stripes}", "data=folder", "train.epochs=3", "data.batch_size=fit", "hydra.run.dir=run"]
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        assert main(words) == 1
    assert main(["resume=run"]) == 0
    assert "data.batch_size=fit" in result(folder / "run")["overrides"]  # type: ignore[operator]
    assert main(["resume=run", "data.batch_size=8"]) == 1
    assert "data.batch_size: fit -> 8" in capsys.readouterr().err


@pytest.mark.parametrize("is_same_command", [False, True])
def test_a_finished_run_is_no_answer_for_other_images(
    straight: Path, stripes: Path, tmp_path: Path, is_same_command: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.copytree(stripes, tmp_path / "same")
    change_size(Path(shutil.copytree(stripes, tmp_path / "others")))
    words = [*WORDS, f"hydra.run.dir={run}"] if is_same_command else [f"resume={run}"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.log"}
    assert main([*words, f"data.root={tmp_path / 'others'}"]) == 1
    assert "images are not those that the run began with" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert main([*words, f"data.root={tmp_path / 'same'}"]) == 0
    assert result(run)["promise"] == "bitwise"
    assert_same_run(straight, run)
    words.append(f"data.root={tmp_path / 'same'}")
    assert main(words) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*words, f"data.cache_dir={tmp_path / 'cache'}"]) == 0 and "nothing to do" in capsys.readouterr().out


def test_weights_that_moved(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(begun / "checkpoints" / "last.safetensors", tmp_path / "a.safetensors")
    words = [*WORDS, f"data.root={begun.parent / 'images'}", "model.head=random", "hydra.run.dir=tuned"]
    with monkeypatch.context() as patch:
        kill_at(8, patch)
        assert main([*words, "model.pretrained=a.safetensors"]) == 1
    os.rename("a.safetensors", "b.safetensors")
    shutil.copy(begun / "checkpoints" / "best.safetensors", tmp_path / "c.safetensors")
    data = bytearray(Path("b.safetensors").read_bytes())
    data[-1] ^= 1
    Path("d.safetensors").write_bytes(data)
    capsys.readouterr()
    assert main(["resume=tuned", "model.pretrained=none"]) == 1
    assert "model.pretrained: " in capsys.readouterr().err
    assert main(["resume=tuned", "model.pretrained=d.safetensors"]) == 1
    capsys.readouterr()
    assert main(["resume=tuned", "model.pretrained=b.safetensors"]) == 0
    assert result(tmp_path / "tuned")["promise"] == "bitwise"


def test_a_sweeps_jobs_find_the_same_place_also_from_their_own_folders(
    stripes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stripes, folder / "images")
    words = [*WORDS[:2], "train.epochs=1", "data.root=images", "seed=0,1", "hydra.job.chdir=true"]
    assert main(["-m", *words, "hydra.sweep.dir=sweep"]) == 0
    for job in ("0", "1"):
        config = yaml.safe_load((folder / "sweep" / job / "config.yaml").read_text())
        assert config["data"]["root"] == str(folder / "images")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_a_folder_that_is_moved_while_a_run_works_in_it_is_told_and_another_in_its_place_stays_as_it_is(
    begun: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_exchanged: bool,
) -> None:
    other, moved, append = tmp_path / "other", tmp_path / "moved", History.append
    shutil.copytree(straight, other)
    (other / ".lock").touch()
    before = everything(other)

    def move_first(self: History, row: dict[str, object]) -> None:
        if begun.exists() and not moved.exists():
            begun.rename(moved)
            if is_exchanged:
                other.rename(begun)
        append(self, row)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(History, "append", move_first)
        assert main([f"resume={begun}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {begun} {'was moved' if is_exchanged else 'is gone'}" in line
    if is_exchanged:
        assert everything(begun) == before
    else:
        assert not begun.exists()
    assert main([f"resume={moved}"]) == 0
    assert_same_run(straight, moved)
