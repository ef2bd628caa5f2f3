"""The format `timm`: `model.safetensors` and `config.json`, which `timm.create_model("local-dir:...")` loads."""

import math
from pathlib import Path
from typing import Any

import torch

from finetune.config import Library, Pool
from finetune.core.preprocess import Preprocess
from finetune.models.build import library_of
from finetune.models.heads.head import TowerWithHead
from finetune.models.upstream import glyphs
from finetune.runs.weights import write_weights
from finetune.system.errors import UserError
from finetune.system.files import write_json
from finetune.system.reading import parse_json
from finetune.use.exporting.formats import Written, completed, metadata_of
from finetune.use.loading import Learned

# The bundled ViT has no name in timm. This one is of the same class, and all its sizes can be said anew.
GENERAL = "vit_tiny_patch16_224"
CROP_MODES = {"crop": "center", "squash": "squash", "pad": "border"}

PROGRAM = """\
import timm
import torch
from PIL import Image, ImageOps

FOLDER = "."  # where this file lies
model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
classes = model.pretrained_cfg["label_names"]


def prepare(image):
    return transform(image.convert("RGB"))


def scores(batch):
    with torch.inference_mode():
        return model(batch)
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the folder.

    Raises:
        UserError: timm has no such network.
    """
    notes = write_files(learned, folder)
    return Written(completed(PROGRAM, learned), notes)


def write_files(learned: Learned, folder: Path) -> tuple[str, ...]:
    """Write weights and configuration, which transformers reads too; what they cannot hold, a sentence each.

    Raises:
        UserError: timm has no such network.
    """
    import timm
    from timm.models._hub import save_config_for_hf

    net, conf = learned.built.model.net, learned.conf
    if library_of(conf) != Library.timm or isinstance(net, TowerWithHead):
        if library_of(conf) == Library.open_clip:
            problem = "an image tower of open_clip under a classifier of its own, which timm cannot hold"
            raise UserError(f"{conf.name} is {problem}; export it to open_clip, onnx or pt2")
        raise UserError(f"timm builds no {conf.name} with a classifier of this kind; export it to onnx or pt2")
    name, args = _constructor(learned)
    with torch.device("meta"):
        twin: Any = timm.create_model(name, num_classes=len(learned.classes), **args)
    tensors, own = net.state_dict(), twin.state_dict()
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: own[name].shape for name in own}:
        raise UserError(f"timm builds another network as {name} than this run trained; export it to onnx or pt2")
    write_weights(folder / "model.safetensors", tensors, metadata_of(learned))
    preprocess = learned.built.preprocess
    images = _images(preprocess)
    about: dict[str, Any] = {"label_names": list(learned.classes), "pretrained_cfg": {"license": None, "tag": ""}}
    about["is_multilabel"], about["threshold"] = learned.threshold is not None, learned.threshold
    about |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    if learned.threshold is not None:  # so that transformers takes the sigmoid of each score
        about["problem_type"] = "multi_label_classification"
    save_config_for_hf(twin, str(folder / "config.json"), about, args, images)
    config = parse_json((folder / "config.json").read_bytes(), dict[str, Any])
    config.get("model_args", {}).pop("num_classes", None)  # timm knows it, and transformers would give it twice
    write_json(folder / "config.json", config)
    return _notes(preprocess)


def _constructor(learned: Learned) -> tuple[str, dict[str, Any]]:
    """Timm's name of the network, and the arguments with which timm builds it."""
    import timm

    conf, changes = learned.conf, learned.built.changes
    name: str = conf.name
    args: dict[str, Any] = {}
    if name == glyphs.VIT:
        bundle = glyphs.read_bundle(glyphs.VIT).config["args"]
        name, args = GENERAL, {key: value for key, value in bundle.items() if key != "num_classes"}
    known = timm.get_pretrained_cfg(name)
    if conf.image_size and (known is None or known.fixed_input_size):  # as the run built it
        args["img_size"] = conf.image_size
    if conf.in_channels != 3:
        args["in_chans"] = conf.in_channels
    if conf.pool == Pool.mean:
        args["global_pool"] = "avg"
    if "activation" in changes:
        args["act_layer"] = changes["activation"]
    return name, args


def _images(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing in timm's words."""
    fraction = preprocess.size / preprocess.shorter_side if preprocess.resize == "crop" else 1.0
    while math.floor(preprocess.size / fraction) < preprocess.shorter_side and preprocess.resize == "crop":
        fraction = math.nextafter(fraction, 0)  # timm rounds down the pixels that it computes from the fraction
    channels = preprocess.channels
    return {
        "input_size": (channels, preprocess.size, preprocess.size),
        "mean": preprocess.mean[:channels],
        "std": preprocess.std[:channels],
        "interpolation": preprocess.interpolation,
        "crop_pct": fraction,
        "crop_mode": CROP_MODES[preprocess.resize],
    }


def _notes(preprocess: Preprocess) -> tuple[str, ...]:
    if preprocess.resize == "pad":
        return ("timm fills the borders of an image with its mean colour, and the run filled them with black.",)
    return ()
