"""`finetune export RUN FORMAT`: a run as a folder that another library loads, checked on images by that library."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands.flags import command_parser
from finetune.commands.predict import add_source, take_source
from finetune.config.words.saved import read_conf
from finetune.runs.records import read_result
from finetune.system.errors import ConfigError, UserError
from finetune.system.log import say
from finetune.system.terminal import printable

if TYPE_CHECKING:
    from finetune.config import Conf
    from finetune.use.exporting.card import About
    from finetune.use.exporting.checking import Images

EPILOG = """\
RUN is a run directory or its best.safetensors. With --classes it is settings of a model that reads class names:
  finetune export model=clip_b16 --classes cat,dog onnx --out DIR --images PATH
FORMAT is one of:
  timm          model.safetensors and config.json, for timm.create_model("local-dir:DIR", pretrained=True)
  open_clip     both towers of a CLIP, for open_clip.create_model_and_transforms("local-dir:DIR"); the classifier beside
  int8          model.onnx with 8-bit integers: a quarter of the size; judged by its accuracy, not by equal scores
  onnx          model.onnx, for onnxruntime and others
  openvino      model.xml and model.bin, for OpenVINO
  pt2           model.pt2, for torch.export.load
  transformers  model.safetensors and config.json, for AutoModelForImageClassification.from_pretrained("DIR");
                of a CLIP its image tower (CLIPVisionModelWithProjection), with the classifier beside
The folder is loaded in a fresh process by that library alone, and its scores of validation images are compared with the
run's. Above a difference of 1e-4 nothing is written."""


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code."""
    given = _parse(words)
    from finetune.use.exporting.export import export, format_of
    from finetune.use.exporting.place import check_free, default_place
    from finetune.use.loading import read_learned

    format_of(given.format)
    source = None if given.classes is not None else Path(given.source).expanduser()
    if given.out is None and (source is None or (source.exists() and not source.is_dir())):
        what = "a model without training" if source is None else f"{printable(given.source)} is a file, which"
        raise UserError(f"{what} has no folder for exports: say where with --out DIR")
    if given.out is not None:
        check_free(given.out)
    learned = read_learned(given.source, given.classes)
    place = given.out or default_place(Path(given.source).expanduser(), given.format)
    conf = _conf(source, has_images=bool(given.images))
    checked = export(
        learned,
        given.format,
        place,
        lambda: _images(given.images, conf, source),
        about=_about(source, conf),
        with_preprocess=given.with_preprocess,
        allow_different=given.allow_different,
    )
    say(f"{checked}\n{printable(str(place))}: {given.format}")
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    usage, text = "RUN FORMAT [--out DIR] [FLAG ...]", "Export a run to another library."
    parser = command_parser("export", usage, text, EPILOG)
    add_source(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder; default: RUN/export/FORMAT")
    parser.add_argument("--images", action="append", metavar="PATH", help="compare on these, as `finetune predict`")
    parser.add_argument(
        "--with-preprocess", action="store_true", help="onnx: resize, crop and normalise in the network"
    )
    parser.add_argument("--allow-different", action="store_true", help="keep an export whose scores are others")
    given = parser.parse_intermixed_args(list(words))
    formats = take_source(parser, given)
    if len(formats) != 1:
        found = f"{len(formats)} words stand behind RUN" if formats else "FORMAT is missing"
        parser.error(f"{found}: expected one format, such as onnx; --help lists them")
    (given.format,) = formats
    return given


def _conf(source: Path | None, *, has_images: bool) -> Conf | None:
    """The settings of a run; None where there are none, or where they cannot be read and only the card needs them."""
    if source is None or not os.path.lexists(source / "config.yaml"):
        return None
    try:
        return read_conf(source)
    except ConfigError as error:
        if has_images:
            return None
        raise UserError(f"{'; '.join(error.problems)}; or give images to compare on with --images PATH") from error


def _images(paths: Sequence[str] | None, conf: Conf | None, source: Path | None) -> Images:
    """The images of the comparison."""
    from finetune.data import open_source
    from finetune.data.sources.unlabelled import find_images
    from finetune.use.exporting.checking import Images

    if paths:
        split = find_images(paths)
        return Images(split, "those given", False, split)
    mend = "give some with --images PATH"
    if conf is None:
        what = "a model without training" if source is None else printable(str(source))
        problem = f"{what} does not say where its images are, and an export is compared on images"
        raise UserError(f"{problem}: {mend}")
    try:
        splits = open_source(conf.data).splits
    except (UserError, OSError) as error:
        raise UserError(
            f"the images of the run cannot be had, and an export is compared on images ({error}); {mend}"
        ) from error
    name = next((name for name in ("val", "test", "train") if len(splits[name])), None)
    if name is None:
        raise UserError(f"the run has no images: {mend}")
    where = {"val": "validation", "test": "the test split", "train": "training"}[name]
    return Images(splits[name], where, True, splits["train"] if len(splits["train"]) else splits[name])


def _about(source: Path | None, conf: Conf | None) -> About:
    """What a card says of a run."""
    from finetune.use.exporting.card import About

    if source is None:
        return About(recipe={"classifier": "made of the class names by the text tower, without any training"})
    if conf is None:
        return About()
    result: dict[str, Any] = read_result(source / "result.json") if (source / "result.json").exists() else {}
    counts = result.get("data")
    counts = counts if isinstance(counts, dict) else {}
    images = {name: count for name, count in counts.items() if isinstance(count, int)}
    places = (conf.data.root, conf.data.table)
    names = [os.path.basename(place.rstrip("/")) for place in places if place and "://" not in place]
    data = {"source": " ".join([conf.data.source, *names]), **images}
    weights = conf.model.pretrained
    is_hub = weights.startswith(("hf-hub:", "hf_hub:"))
    recipe = {
        "started from": f"{conf.model.name}, weights {weights if is_hub else os.path.basename(weights.rstrip('/'))}",
        "classifier": conf.model.head,
        "frozen layers": f"up to {conf.optim.fix_layer}" if conf.optim.fix_layer >= 0 else "none",
        "optimizer": f"{conf.optim.name}, peak rate {conf.optim.lr:g}, layer decay {conf.optim.layer_decay:g}",
        "schedule": conf.sched.mode,
        "epochs": f"{conf.train.epochs}, of which epoch {result.get('best_epoch', '?')} is this one",
        "images a step": f"{conf.data.batch_size} x {conf.train.accumulate}",
        "augmentation": conf.augment.recipe,
        "averaged weights": f"train.ema={conf.train.ema:g}" if conf.train.ema else "none",
    }
    metrics = {key: value for key, value in result.items() if "/" in key and isinstance(value, float)}
    return About(data, recipe, metrics, images)
