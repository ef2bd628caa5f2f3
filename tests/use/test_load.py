"""`finetune.load`: what a run learned predicts as the run's own validation and test did, whatever it was built of."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import ROOT, go

import finetune
from finetune.config import Conf
from finetune.data import ImageError, open_source
from finetune.system.errors import UserError
from finetune.system.ours import FolderKind, claim
from finetune.system.reading import DamagedError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one epoch on the digits, each of another kind of model."""
    made = {}
    for name, changes in {
        "clip": {},
        "frozen": {"optim__fix_layer": 2, "train__ema": 0.5},
        "lpft": {"model__head": "linear_probe"},
        "pooled": {"model__head": "random", "model__pool": "mean"},
    }.items():
        conf = Conf()
        conf.train.epochs, conf.data.fraction = 1, 0.2
        for key, value in changes.items():
            part, _, setting = key.partition("__")
            setattr(getattr(conf, part), setting, value)
        made[name] = tmp_path_factory.mktemp(name)
        go(conf, made[name])
    return made


@pytest.mark.parametrize("name", ["clip", "frozen", "lpft", "pooled"])
def test_predictions_of_the_test_images_are_the_confusion_matrix_of_the_run(name: str, runs: dict[str, Path]) -> None:
    source = open_source(Conf().data)
    test = source.splits["test"]
    predictor = finetune.load(runs[name])
    assert predictor.classes == source.classes and predictor.preprocess.size == 32
    found = predictor.predict([test.load(index) for index in range(len(test))])
    matrix = np.zeros((10, 10), dtype=int)
    for label, prediction in zip(test.labels.tolist(), found, strict=True):
        matrix[label, source.classes.index(str(prediction.label))] += 1
    rows = list(csv.reader((runs[name] / "confusion.csv").read_text().splitlines()))
    assert matrix.tolist() == [[int(cell) for cell in row[1:]] for row in rows[1:]]
    top1 = json.loads((runs[name] / "result.json").read_text())["test/top1"]
    assert matrix.trace() / matrix.sum() == pytest.approx(top1, abs=1e-12)


def test_a_run_a_file_alone_and_every_kind_of_image_give_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    file = tmp_path / "in" / "deep" / "a.png"
    Image.fromarray(pixels).save(file)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((runs["clip"] / "checkpoints" / "best.safetensors").read_bytes())
    predictor, other = finetune.load(runs["clip"]), finetune.load(str(alone))
    (wanted,) = predictor.predict(file, top_k=3)
    assert wanted.path == str(file) and len(wanted.labels) == len(wanted.probabilities) == 3
    assert wanted.probabilities == tuple(sorted(wanted.probabilities, reverse=True)) and sum(wanted.probabilities) <= 1
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (
        file,
        str(file),
        tmp_path / "in",
        Image.fromarray(pixels),
        Image.open(file),
        pixels,
        tensor,
        [pixels],
    ):
        for model in (predictor, other):
            (found,) = model.predict(image, top_k=3)
            assert (found.labels, found.probabilities) == (wanted.labels, wanted.probabilities)
    whole = predictor.predict([file, pixels], top_k=99)
    assert len(whole[0].labels) == 10 and sum(whole[0].probabilities) == pytest.approx(1)


def test_features_of_every_layer(runs: dict[str, Path]) -> None:
    predictor = finetune.load(runs["clip"])
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    head, readout = (predictor.embed([image, image], layer=layer) for layer in ("head", "readout"))
    normal = torch.nn.functional.normalize(readout, dim=-1)
    assert torch.allclose(head, normal @ predictor.model.net.head.weight.T, atol=1e-5)
    assert predictor.embed(image).shape == (1, readout.shape[1])
    for layer in ("stem", "block.1", f"block.{predictor.model.num_blocks}"):
        assert predictor.embed(image, layer=layer).ndim == 2
    with pytest.raises(UserError, match=r"did you mean 'block.1'.*expected stem, block.1 to block"):
        predictor.embed(image, layer="blok.1")


def test_several_labels_come_from_the_threshold_in_the_file(labelled_run: tuple[Path, Path]) -> None:
    run, table = labelled_run
    predictor = finetune.load(run)
    with safe_open(run / "checkpoints" / "best.safetensors", "pt") as file:
        assert predictor.threshold == float(file.metadata()["threshold"])
    found = predictor.predict(table)
    assert [each.path for each in found] == [line.partition(",")[0] for line in table.read_text().splitlines()[1:]]
    for prediction in found:
        expected = {name for name, value in prediction.scores.items() if value >= predictor.threshold}
        assert set(prediction.labels) == expected and len(prediction.scores) == 5


def test_a_model_without_training_reads_the_names_of_the_classes() -> None:
    predictor = finetune.load("model=clip", classes=["3", "7"])
    assert predictor.classes == ("3", "7")
    digits = open_source(Conf().data).splits["test"]
    chosen = [index for index, label in enumerate(digits.labels.tolist()) if label in (3, 7)]
    found = predictor.predict([digits.load(index) for index in chosen])
    right = [each.label == str(int(digits.labels[index])) for each, index in zip(found, chosen, strict=True)]
    assert sum(right) / len(right) > 0.8
    with pytest.raises(UserError, match="reads no class names"):
        finetune.load("model=vit", classes=["3", "7"])
    with pytest.raises(UserError, match="two or more different names"):
        finetune.load("model=clip", classes=["3", "3"])


def test_what_is_no_run_is_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a run directory"):
        finetune.load(tmp_path / "nothing")
    (tmp_path / "checked").mkdir()
    claim(tmp_path / "checked", FolderKind.check)
    with pytest.raises(UserError, match="is what `finetune check` wrote, and no run directory"):
        finetune.load(tmp_path / "checked")
    with pytest.raises(UserError, match="is no run directory"):
        finetune.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="no epoch of this run is finished"):
        finetune.load(tmp_path)
    with pytest.raises(UserError, match="is no weights file of a run"):
        finetune.load(runs["clip"] / "config.yaml")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"no run of finetune wrote it; .* model.pretrained="):
        finetune.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="device=gpu"):
        finetune.load(runs["clip"], device="gpu")
    with pytest.raises(UserError, match=r"precision=half.*fp32"):
        finetune.load(runs["clip"], precision="half")
    predictor = finetune.load(runs["clip"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png"):
        predictor.predict(tmp_path / "bad.png")
    with pytest.raises(ImageError, match=r"image\[0\].*float64"):
        predictor.predict(np.zeros((4, 4, 3)))
    with pytest.raises(UserError, match="no images were given"):
        predictor.predict([])
    with pytest.raises(UserError, match="top_k=0"):
        predictor.predict(tmp_path, top_k=0)


def stranger(path: Path, run: Path, tensors: dict[str, torch.Tensor] | None = None, **texts: object) -> Path:
    """The weights of a run with other metadata, or other tensors, and without a checksum."""
    with safe_open(run / "checkpoints" / "best.safetensors", "pt") as file:
        known = {name: text for name, text in file.metadata().items() if name != "finetune_crc32"}
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    known |= {name: json.dumps(value) for name, value in texts.items()}
    save_file(own if tensors is None else tensors, path, metadata=known)
    return path


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"model": {"family": "vit", "name": "vit_giant_patch14_dinov2", "pretrained": "none"}}, "does not fit"),
        ({"model": {"family": "clip", "name": "ViT-bigG-14", "pretrained": "none"}}, "does not fit"),
        ({"model": {"image_size": 10**9}}, "image_size"),
        ({"model": {"name": 3}}, "its metadata 'model'"),
        ({"model": {"name": "../../etc"}}, "no such model"),
        ({"model": {"colour": "red"}}, "another version"),
        ({"classes": ["a", "b"]}, "does not fit"),
        ({"classes": []}, "its metadata 'classes'"),
        ({"classes": {"a": 1}}, "its metadata 'classes'"),
        ({"preprocess": {"size": 10**9, "mean": [0, 0, 0], "std": [1, 1, 1]}}, "pixels a side"),
        ({"preprocess": {"size": 48, "mean": [0, 0, 0], "std": [1, 1, 1]}}, "do not fit its model"),
        (
            {"preprocess": {"size": 32, "mean": [0] * 3, "std": [1] * 3, "crop_fraction": 1e-9}},
            "its metadata 'preprocess'",
        ),
        ({"preprocess": {"size": 32, "mean": [0] * 3, "std": [0] * 3}}, "its metadata 'preprocess'"),
        ({"preprocess": {"size": 32, "mean": [0] * 3, "std": [1] * 3, "channels": 1}}, "pixels a side|channels"),
        ({"changes": {"activation": ["x"]}}, "its metadata 'changes'"),
        ({"is_multilabel": "yes"}, "its metadata 'is_multilabel'"),
        ({"threshold": 7}, "threshold"),
    ],
)
def test_a_stranger_s_file_takes_no_memory_and_is_one_line(
    texts: dict[str, object], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    path = stranger(tmp_path / "theirs.safetensors", runs["clip"], **texts)
    with pytest.raises((UserError, DamagedError), match=message):
        finetune.load(path)


def test_numbers_of_another_type_or_none_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with safe_open(runs["clip"] / "checkpoints" / "best.safetensors", "pt") as file:
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    halved = {name: tensor.half() for name, tensor in own.items()}
    with pytest.raises(UserError, match="type F16, expected"):
        finetune.load(stranger(tmp_path / "half.safetensors", runs["clip"], halved))
    own["head.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        finetune.load(stranger(tmp_path / "nan.safetensors", runs["clip"], own))
    with pytest.raises(UserError, match="does not fit"):
        finetune.load(stranger(tmp_path / "more.safetensors", runs["clip"], {**own, "more": torch.zeros(2)}))
    path = runs["clip"] / "checkpoints" / "best.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(bytes(damaged))
    with pytest.raises(DamagedError, match="checksum differs"):
        finetune.load(tmp_path / "flipped.safetensors")


def test_loading_draws_no_random_number_of_the_caller_and_import_needs_no_torch(runs: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    finetune.load(runs["clip"])
    assert torch.equal(before, torch.get_rng_state())
    code = "import sys, finetune; finetune.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
