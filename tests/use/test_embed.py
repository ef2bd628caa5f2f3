"""`finetune embed`: the features of any layer, in files that a kill cannot harm."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import KilledError, killed_at, tree

import finetune
from finetune.__main__ import main
from finetune.config import ModelConf
from finetune.models import build_model
from finetune.system.errors import UserError
from finetune.use import writing
from finetune.use.predictor import Predictor


def test_an_array_and_its_paths_continue_after_a_kill_at_any_write(
    striped_run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "BLOCK", 8)
    words = ["embed", str(striped_run), "in", "--batch-size", "4", "--on-error", "skip"]
    Path("whole").mkdir()
    assert main([*words, "--out", "whole/x.npy"]) == 0
    found = np.load("whole/x.npy", mmap_mode="r")
    paths = [row["path"] for row in csv.DictReader(Path("whole/x.npy.paths.csv").read_text().splitlines())]
    assert found.dtype == np.float32 and len(found) == len(paths) == 30
    wanted = finetune.load(striped_run).embed(paths)
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    for number in range(1, 100):
        place = Path(f"killed{number}")
        place.mkdir()
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            code = main([*words, "--out", f"{place}/x.npy"])
        monkeypatch.setattr(writing, "BLOCK", 8)
        if code == 0:
            break
        assert KilledError.__name__ in capsys.readouterr().err
        assert main([*words, "--out", f"{place}/x.npy"]) == 0
        assert tree(place) == tree(Path("whole")), number
    assert number > 8


def test_parquet_and_the_layers(
    striped_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["embed", str(striped_run), "in/0.png", "in/3.png"]
    assert main([*words, "--out", "x.parquet", "--layer", "block.2"]) == 0
    rows = parquet.read_table("x.parquet").to_pydict()
    wanted = finetune.load(striped_run).embed(["in/0.png", "in/3.png"], layer="block.2")
    assert rows["path"] == ["in/0.png", "in/3.png"] and np.allclose(rows["embedding"], wanted, atol=1e-4)
    for more, message in (
        (["--out", "y.npy", "--layer", "blok.2"], "did you mean 'block.2'"),
        (["--out", "y.csv"], "expected a name that ends in .npy or .parquet"),
        ([], "--out FILE is missing"),
    ):
        assert main([*words, *more]) in (1, 2)
        assert message in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"in", "x.parquet"}


def test_nothing_but_damaged_images_is_an_empty_array(striped_run: Path, pictures: Path) -> None:
    assert main(["embed", str(striped_run), "in/cut.png", "in/deep/bad.jpg", "--out", "x.npy"]) == 1
    assert np.load("x.npy").size == 0 and not Path(".x.npy.finetune.json").exists()


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_networks_that_run_only_whole_have_a_readout_too(name: str) -> None:
    conf = ModelConf(family="vit", name=name, pretrained="none", image_size=64)
    built = build_model(conf, ["a", "b"])
    model = built.model.eval()
    device = torch.device("cpu")
    predictor = Predictor(model, ("a", "b"), built.preprocess, device, torch.float32, None, name, "")
    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    head, readout = predictor.embed(image, layer="head"), predictor.embed(image)
    linear = model.net.get_submodule(next(n for n, m in model.net.named_modules() if type(m).__name__ == "Head"))
    assert torch.allclose(linear(readout), head, atol=1e-5)
    assert model.is_chain == (name == "resnet10t")
    if not model.is_chain:
        with pytest.raises(UserError, match="no plain chain"):
            predictor.embed(image, layer="stem")
