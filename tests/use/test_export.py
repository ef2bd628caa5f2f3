"""`finetune export`: what the other library makes of the folder, alone in a fresh process, is what the run learned."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import ROOT, go, small

import finetune
from finetune.__main__ import main
from finetune.config import Family, HeadKind, Pool
from finetune.core.metrics.intervals import wilson
from finetune.core.preprocess import Preprocess
from finetune.data.images.transforms import fit_square
from finetune.data.loading.batches import in_channels, normalise
from finetune.models.upstream import glyphs
from finetune.models.upstream.transformers_tables import CLIP, sources
from finetune.system.errors import UserError
from finetune.system.files import write_json
from finetune.system.ours import FolderKind, claim, temporary_of
from finetune.use.exporting import checking, export
from finetune.use.exporting.formats import pillow_steps
from finetune.use.exporting.fresh import main as run_program
from finetune.use.exporting.onnx_images import preparing
from finetune.use.exporting.place import made_at
from finetune.use.loading import read_learned


@pytest.fixture(scope="module")
def vit_run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partly frozen run of the bundled ViT with averaged weights, another resize and class names of any kind."""
    folder = tmp_path_factory.mktemp("vit")
    conf = small(stripes, optim__fix_layer=2, train__ema=0.5)
    conf.model.family, conf.model.name, conf.model.head = Family.vit, "glyph_vit", HeadKind.random
    conf.data.resize, conf.data.eval_resize, conf.model.in_channels = "shortest", 37, 1
    conf.model.pool = Pool.mean
    go(conf, folder)
    return folder


@pytest.fixture(scope="module")
def striped_vit(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the bundled ViT."""
    conf = small(stripes)
    conf.model.family, conf.model.name, conf.model.head = Family.vit, "glyph_vit", HeadKind.random
    go(conf, folder := tmp_path_factory.mktemp("striped_vit"))
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of a folder runs in this process, which has imported the libraries already."""

    def run(folder: Path, work: Path) -> None:
        here = Path.cwd()
        monkeypatch.setattr("finetune.use.exporting.fresh.FORBIDDEN", "nothing")
        try:
            run_program(folder, work)
        finally:
            os.chdir(here)
            sys.path.remove(str(work.resolve()))
            sys.modules.pop("program", None)

    monkeypatch.setattr(checking, "_run", run)


def test_a_full_disk_names_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    """As ONNX's own writer raises it, without the name of a file."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/new'"), made_at(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def photographs(folder: Path, number: int = 3) -> Path:
    """Images of 300 x 200 pixels with edges and slopes."""
    folder.mkdir()
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    for index in range(number):
        waves = [np.sin(x / (7 + 3 * k + index)) * np.cos(y / (5 + 2 * k)) for k in range(3)]
        pixels = np.stack([127 + 90 * wave + 30 * ((x + y * k) % 50 > 25) for k, wave in enumerate(waves)], axis=-1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def same_scores(one: Path, other: Path) -> bool:
    images = [np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)]
    first, second = finetune.load(one), finetune.load(other)
    assert first.classes == second.classes and first.threshold == second.threshold
    assert first.preprocess == second.preprocess
    return torch.equal(first.embed(images, layer="head"), second.embed(images, layer="head"))


def test_timm_alone_gives_the_scores_of_the_run(vit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(vit_run), "timm"]) == 0
    said, folder = capsys.readouterr().out, vit_run / "export" / "timm"
    assert "images of validation" in said and "0 predictions changed" in said
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["timm"]
    assert same_scores(vit_run, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(finetune.load(vit_run).classes)
    assert config["model_type"] == "timm_wrapper" and "num_classes" not in config["model_args"]  # for transformers
    text = "".join(path.read_text() for path in (folder / "README.md", folder / "config.json"))
    text += (folder / "model.safetensors").read_bytes()[:5000].decode("utf-8", "replace")
    assert str(vit_run.parent) not in text and "/tmp" not in text
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    assert main(["export", str(vit_run), "timm"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert before == sorted((path.name, path.read_bytes()) for path in folder.iterdir())


@pytest.mark.usefixtures("in_process")
def test_what_differs_is_refused_and_named(
    vit_run: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(folder / "in")
    words = ["export", str(vit_run), "timm", "--images", "in", "--out"]
    assert main([*words, "good"]) == 0
    learned = read_learned(vit_run)

    def changed(learned_too: object, place: Path) -> object:
        written = export.timm_folder.write(learned, place)
        config = json.loads((place / "config.json").read_text())
        config["pretrained_cfg"]["crop_pct"] = 0.9
        write_json(place / "config.json", config)
        return written

    monkeypatch.setitem(export.FORMATS, "timm", export.Format(changed))
    capsys.readouterr()
    assert main([*words, "bad"]) == 1
    assert "its preprocessing differs" in capsys.readouterr().err and not Path("bad").exists()
    assert main([*words, "bad", "--allow-different"]) == 0
    assert "differs from the run in its preprocessing" in Path("bad/README.md").read_text()

    def heavier(learned_too: object, place: Path) -> object:
        with torch.no_grad():
            learned.built.model.net.get_parameter("head.bias").add_(0.01)
        return export.timm_folder.write(learned, place)

    monkeypatch.setitem(export.FORMATS, "timm", export.Format(heavier))
    assert main([*words, "worse"]) == 1
    assert "scores of the same pixels differ by 1" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["bad", "good", "in"]


@pytest.mark.usefixtures("in_process")
def test_borders_that_timm_fills_with_colour_are_refused(
    stripes: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = small(stripes)
    conf.model.family, conf.model.name, conf.model.head = Family.vit, "glyph_vit", HeadKind.random
    conf.data.resize = "pad"
    go(conf, folder / "run")
    photographs(folder / "in")
    assert main(["export", "run", "timm", "--images", "in"]) == 1
    assert "timm fills the borders of an image with its mean colour" in capsys.readouterr().err
    assert not (folder / "run" / "export").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("several", [False, True])
def test_open_clip_alone_gives_the_scores_of_the_run(
    several: bool, striped_run: Path, labelled_run: tuple[Path, Path], folder: Path
) -> None:
    run = labelled_run[0] if several else striped_run
    photographs(folder / "in")
    assert main(["export", str(run), "open_clip", "--out", "out", "--images", "in"]) == 0
    assert same_scores(run, folder / "out")
    before, after = (load_file(path) for path in (glyphs.FOLDER / f"{glyphs.CLIP}.safetensors", out_weights(folder)))
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in before.items() if "visual" not in name)
    # What the README says of texts.
    model, _, _ = open_clip.create_model_and_transforms("local-dir:out")
    tokenizer = open_clip.SimpleTokenizer("out/glyph_bpe.txt.gz", context_length=24)
    assert model.encode_text(tokenizer(["a 3"])).shape == (1, 64)
    assert "open_clip has no place for a classifier" in (folder / "out" / "README.md").read_text()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("is_clip", [False, True])
def test_transformers_alone_gives_the_scores_of_the_run(
    is_clip: bool, vit_run: Path, striped_run: Path, folder: Path
) -> None:
    pytest.importorskip("transformers")
    photographs(folder / "in")
    run = striped_run if is_clip else vit_run
    assert main(["export", str(run), "transformers", "--out", "out", "--images", "in"]) == 0
    assert is_clip or same_scores(run, folder / "out")


def test_the_tensors_of_a_clip_are_taken_apart_as_they_are_put_together(striped_run: Path, folder: Path) -> None:
    learned = read_learned(striped_run)
    net = learned.built.model.net
    export.transformers_folder.write(learned, folder)
    theirs = load_file(folder / "model.safetensors")
    ours = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("visual.")}
    known = sources(ours, CLIP)
    assert known.keys() == ours.keys() and {name for each in known.values() for name in each.names} == theirs.keys()
    for name, source in known.items():
        assert torch.equal(source.make(*(theirs[each] for each in source.names)), ours[name])
    assert "vision_model.encoder.layers.5.self_attn.k_proj.bias" in theirs
    config = json.loads((folder / "config.json").read_text())
    expected = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 8}
    assert config.items() >= expected.items() and config["projection_dim"] == 64
    with pytest.raises(UserError, match="a CLIP exported to transformers"):
        finetune.load(folder)


@pytest.mark.usefixtures("in_process")
def test_a_model_without_training_is_exported(folder: Path) -> None:
    photographs(folder / "in")
    assert main(["export", "model=clip", "open_clip", "--classes", "3, 7", "--out", "out", "--images", "in"]) == 0
    ours, theirs = finetune.load("model=clip", classes=["3", "7"]), finetune.load("out")
    assert theirs.classes == ("3", "7")
    images = [Image.open(folder / "in" / "0.png")]
    assert torch.equal(ours.embed(images, layer="head"), theirs.embed(images, layer="head"))
    assert "trained away" not in (folder / "out" / "README.md").read_text()


def out_weights(folder: Path) -> Path:
    return folder / "out" / "open_clip_model.safetensors"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__pool": "mean", "model__head": "random"}, "cannot hold model.pool=mean"),
        ({"model__pretrained": "none"}, "a text tower that was never trained"),
        ({"model__in_channels": 1}, "cannot hold model.in_channels=1"),
        ({"model__pretrained": "start.safetensors"}, "needs the text tower of the weights"),
        ({"data__resize": "shortest", "data__eval_resize": 40}, "32 pixels out of a shorter side of 40"),
    ],
)
def test_what_open_clip_cannot_hold(
    changes: dict[str, object], message: str, stripes: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = folder / "start.safetensors"
    start.write_bytes((glyphs.FOLDER / f"{glyphs.CLIP}.safetensors").read_bytes())
    changes = {key: str(start) if value == start.name else value for key, value in changes.items()}
    conf = small(stripes, **changes)
    conf.train.epochs = 1
    go(conf, folder / "run")
    photographs(folder / "in")
    start.unlink()
    assert main(["export", "run", "open_clip", "--images", "in"]) == 1
    assert message in capsys.readouterr().err and not (folder / "run" / "export").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("words", [["pt2"], ["onnx"], ["onnx", "--with-preprocess"], ["openvino"]], ids=" ".join)
def test_programs_give_the_scores_of_the_run_and_name_no_place(
    words: list[str], vit_run: Path, labelled_run: tuple[Path, Path], folder: Path
) -> None:
    pytest.importorskip({"pt2": "torch", "onnx": "onnxscript"}.get(words[0], words[0]))
    run = labelled_run[0] if words[0] in ("pt2", "openvino") else vit_run
    photographs(folder / "in")
    assert main(["export", str(run), *words, "--out", "out", "--images", "in"]) == 0
    files = sorted(path for path in (folder / "out").iterdir() if path.name != "README.md")
    assert not any(place in file.read_bytes() for file in files for place in (str(ROOT).encode(), b"site-packages"))
    file = files[-1]
    predictor, texts = finetune.load(run), {"classes": "", "threshold": "null", "preprocess": ""}
    if words == ["pt2"]:
        torch.export.load(file, extra_files=texts)
    elif words == ["openvino"]:
        network = sys.modules["openvino"].Core().read_model(file)
        texts = {key: network.get_rt_info(["finetune", key]).astype(str) for key in texts}
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
        texts |= session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(texts["classes"])) == predictor.classes
    assert json.loads(texts["threshold"]) == predictor.threshold
    assert json.loads(texts["preprocess"]) == predictor.preprocess.as_dict()


@pytest.mark.usefixtures("in_process")
def test_int8_is_judged_by_its_accuracy(striped_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime.quantization")
    pytest.importorskip("onnxscript")
    assert main(["export", str(striped_run), "int8", "--out", "out"]) == 0
    said = capsys.readouterr().out
    accuracy = json.loads((striped_run / "result.json").read_text())["val/top1"]
    assert f"of validation: accuracy {accuracy:.4f} before rounding" in said
    size = (striped_run / "checkpoints" / "best.safetensors").stat().st_size
    assert (folder / "out" / "model.onnx").stat().st_size < size / 2.5


@pytest.mark.usefixtures("in_process")
def test_rounding_that_costs_too_much_accuracy_is_refused(
    striped_vit: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(place: Path, images: torch.Tensor) -> tuple[str, ...]:
        assert images.shape[1:] == (3, 32, 32)
        path = place / "model.safetensors"
        tensors = load_file(path)
        tensors["head.weight"] *= factor
        tensors["head.bias"] *= factor
        save_file(tensors, path)
        return ("It rounds.",)

    monkeypatch.setitem(export.FORMATS, "int8", export.Format(export.timm_folder.write, quantise=coarse))
    factor = 1.01  # other scores, the same predictions
    assert main(["export", str(striped_vit), "int8", "--out", "good"]) == 0
    assert "0 predictions changed" in capsys.readouterr().out
    factor = -1.0  # the least probable class for every image
    photographs(folder / "in")
    words = ["export", str(striped_vit), "int8", "--images", "in", "--out", "bad"]
    assert main(words) == 1
    assert "rounding costs too much accuracy" in capsys.readouterr().err and not Path("bad").exists()
    assert main([*words, "--allow-different"]) == 0
    assert "own predictions count as right: accuracy 1.0000 before" in capsys.readouterr().out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_the_graph_and_pillow_prepare_images_as_validation_does(
    resize: str, channels: int, interpolation: str, folder: Path
) -> None:
    numbers = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)) if channels == 3 else ((0.4,) * 3, (0.2,) * 3)
    preprocess = Preprocess(48, *numbers, interpolation, resize, 48 / 55 if resize == "crop" else 1.0, channels)
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    graph = onnx.parser.parse_model(preparing(preprocess, ir=10, opset=20))
    onnx.checker.check_model(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    lines = pillow_steps(preprocess)
    names: dict[str, Any] = {"np": np, "Image": Image}
    exec(f"def prepare(image):\n{lines}    return pixels.transpose(2, 0, 1)\n", names)
    mean, std = torch.tensor(numbers)[:, :, None, None]
    for shape in ((200, 300), (300, 201), (8, 8), (48, 48), (31, 47), (20, 400), (55, 90)):
        image = np.random.default_rng(shape[0]).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
        image[: shape[0] // 2] = np.asarray(Image.fromarray(image[:1, :1]).resize((shape[1], shape[0] // 2)))
        fitted = fit_square(torch.from_numpy(image).permute(2, 0, 1), preprocess)[None]
        wanted = in_channels(normalise(fitted, mean, std), channels).numpy()
        found = session.run(None, {"images": np.stack([image, image])})[0]
        for other in (found[:1], found[1:], names["prepare"](Image.fromarray(image))[None]):
            levels = np.abs(other - wanted) * std.numpy()[:channels] * 255
            assert levels.max() <= checking.MOST_LEVELS and levels.mean() <= checking.MEAN_LEVEL, shape


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    vit_run: Path, striped_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("x")
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "lone.safetensors").write_bytes((vit_run / "checkpoints" / "best.safetensors").read_bytes())
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text("seed: 0\n")
    (folder / "elsewhere" / "checkpoints").mkdir(parents=True)
    (folder / "elsewhere" / "checkpoints" / "best.safetensors").symlink_to(folder / "lone.safetensors")
    (folder / "elsewhere" / "config.yaml").write_text("data:\n  root: ${oc.env:DATA}\n")
    run = str(vit_run)
    for words, message in (
        ([run, "tim"], "no such format (did you mean 'timm'?)"),
        ([run, "timm", "--out", "full"], "full is there already"),
        ([run, "timm", "--out", "link"], "link is there already"),
        ([run, "timm", "--out", "no/where"], "folder no does not exist"),
        ([run, "timm", "--out", "new", "--images", "nothing"], "nothing"),
        (["lone.safetensors", "timm"], "say where with --out DIR"),
        (["lone.safetensors", "timm", "--out", "new"], "give some with --images PATH"),
        (["model=clip", "onnx", "--classes", "3,7"], "a model without training has no folder for exports"),
        (["model=clip", "onnx", "--classes", "3,7", "--out", "new"], "give some with --images PATH"),
        ([run], "FORMAT is missing"),
        ([run, "timm", "onnx"], "expected one format"),
        ([run, "timm", "--with-preprocess"], "use onnx"),
        (["elsewhere", "timm"], "or give images to compare on with --images PATH"),
        (["empty", "timm"], "is no run directory"),
        (["begun", "timm"], "no epoch of this run is finished"),
        (["absent", "timm"], "no such file or folder"),
        ([str(striped_run), "timm"], "which timm cannot hold"),
    ):
        before = sorted(str(path) for path in folder.rglob("*"))
        assert main(["export", *words]) in (1, 2), words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (words, said)
        assert before == sorted(str(path) for path in folder.rglob("*")), words


def test_a_missing_package_is_named_with_its_extra(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export.Format(export.timm_folder.write, packages=("no_such_package",), extra="onnx")
    monkeypatch.setitem(export.FORMATS, "onnx", found)
    assert main(["export", "run", "onnx"]) == 1
    said = capsys.readouterr().err
    assert "onnx needs the package no_such_package: pip install 'finetune[onnx]'" in said and said.count("\n") == 1


@pytest.mark.usefixtures("in_process")
def test_what_a_kill_left_is_swept_and_what_is_not_ours_stays(vit_run: Path, folder: Path) -> None:
    photographs(folder / "in", 2)
    killed, foreign = temporary_of(folder / "out"), folder / f".out.{'0' * 16}-1.tmp"
    killed.mkdir()
    claim(killed, FolderKind.export)
    (killed / "model.safetensors").write_bytes(b"half")
    foreign.mkdir()
    (folder / "out").mkdir()
    assert main(["export", str(vit_run), "timm", "--out", "out", "--images", "in"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [foreign.name, "in", "out"]


def test_the_interval_of_a_share() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 50)[1] == pytest.approx(1.0) and wilson(0.0, 50)[0] == 0.0
