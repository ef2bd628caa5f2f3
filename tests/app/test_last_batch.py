"""A last training batch of one image under BatchNorm is refused before training, and only where it would fail."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main

MODEL = ["model=vit", "model.name=resnet10t", "model.pretrained=none", "model.image_size=32", "model.library=timm"]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten training images in two classes, and four to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path


def run(folder: Path, *words: str) -> int:
    data = ["data=folder", f"data.root={folder / 'data'}", "data.workers=0", "device=cpu", "train.epochs=1"]
    return main([*MODEL, *data, f"hydra.run.dir={folder / 'run'}", *words])


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["data.batch_size=9"], "data.batch_size=9: the last batch of an epoch of 10 images has one image"),
        (["data.batch_size=9"], "use data.batch_size=10 or data.drop_last=true"),
        (["data.batch_size=3"], "use data.batch_size=4 or data.drop_last=true"),
        (["data.batch_size=3", "train.accumulate=4"], "use data.batch_size=4"),
        (
            ["data.batch_size=1"],
            "each batch has one image, and BatchNorm of resnet10t needs two; use data.batch_size=2",
        ),
        (["data.batch_size=8", "data.epoch_images=17"], "epoch of 17 images"),
        (["data.batch_size=9", "augment.repeats=4"], ""),
    ],
)
def test_it_is_foreseen(words: list[str], advice: str, ten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(ten, *words)
    error = capsys.readouterr().err
    if not advice:
        assert code == 0, error
        return
    assert code == 1 and advice in error and "Traceback" not in error
    assert "drop_last" not in error or "accumulate=4" not in " ".join(words)
    assert not list(ten.glob("run/**/*.safetensors"))


@pytest.mark.parametrize(
    "words",
    [
        ["data.batch_size=9", "data.drop_last=true"],
        ["data.batch_size=9", "model.image_size=64"],  # the last stage has four positions
        ["data.batch_size=9", "optim.fix_layer=5"],  # all norms are frozen, in eval mode
        ["data.batch_size=5"],
    ],
)
def test_whatever_can_be_trained_is_trained(words: list[str], ten: Path) -> None:
    assert run(ten, *words) == 0
