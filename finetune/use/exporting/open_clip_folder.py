"""The format `open_clip`: both towers of a CLIP as open_clip loads them, and the classifier in a file beside them."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune.config import Library, Pool
from finetune.core.preprocess import Preprocess
from finetune.models.build import library_of
from finetune.models.heads.head import TowerWithHead
from finetune.models.upstream import clip_source, from_open_clip, glyphs
from finetune.models.upstream.clip_source import HUB_CONFIG, ClipSource
from finetune.runs.weights import write_weights
from finetune.system.errors import UserError
from finetune.system.files import write_atomic, write_json
from finetune.use.exporting.formats import Written, completed, metadata_of
from finetune.use.loading import EXPORTED, Learned

CLASSIFIER, WEIGHTS = EXPORTED["open_clip"]
VOCABULARY = "glyph_bpe.txt.gz"  # of the bundled CLIP
RESIZES = {"crop": "shortest", "squash": "squash", "pad": "longest"}

PROGRAM = """\
import json

import open_clip
import torch
from PIL import Image, ImageOps
from safetensors import safe_open

FOLDER = "."  # where this file lies
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
model.eval()
with safe_open(f"{FOLDER}/classifier.safetensors", "pt") as file:
    classes = json.loads(file.metadata()["classes"])
    weight, bias = file.get_tensor("head.weight"), BIAS


def prepare(image):
    return preprocess(image.convert("RGB"))


def scores(batch):
    with torch.inference_mode():
        features = FEATURES
        return features @ weight.T + bias
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the folder; the text tower comes from the weights that the run began with.

    Raises:
        UserError: open_clip has no such network, or those weights are not there.
    """
    net, conf = learned.built.model.net, learned.conf
    if library_of(conf) != Library.open_clip or not isinstance(net, TowerWithHead):
        raise UserError(f"{conf.name} is no image tower of open_clip; export it to timm, onnx or pt2")
    for word, is_so in {
        "model.pool=mean: it projects the features of every image tower": conf.pool == Pool.mean,
        f"model.in_channels={conf.in_channels}: its images have three channels": conf.in_channels != 3,
        "a text tower that was never trained (model.pretrained=none)": conf.pretrained == "none",
    }.items():
        if is_so:
            raise UserError(f"open_clip cannot hold {word}; export the run to onnx or pt2")
    source, clip = _whole_clip(learned)
    own = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("visual.")}
    towers = {**clip.state_dict(), **own}
    if {name: tensor.shape for name, tensor in towers.items()} != {
        name: tensor.shape for name, tensor in clip.state_dict().items()
    }:
        raise UserError(f"open_clip builds another network as {conf.name} than this run trained; use onnx or pt2")
    write_weights(folder / WEIGHTS, towers, {"format": "pt"})
    head = {name: tensor for name, tensor in net.state_dict().items() if name not in own}
    write_weights(folder / CLASSIFIER, head, metadata_of(learned))
    preprocess = learned.built.preprocess
    write_json(folder / HUB_CONFIG, {"model_cfg": _model_cfg(source, learned), "preprocess_cfg": _images(preprocess)})
    if conf.name == glyphs.CLIP:
        write_atomic(folder / VOCABULARY, lambda temporary: shutil.copyfile(glyphs.FOLDER / VOCABULARY, temporary))
    is_trained = not all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in own.items())
    return Written(completed(_program(net), learned), _notes(learned, source, is_trained=is_trained))


def _whole_clip(learned: Learned) -> tuple[ClipSource, torch.nn.Module]:
    """Both towers, with the weights that the run began with."""
    conf = dataclasses.replace(learned.conf, drop_path=0.0)
    try:
        source = clip_source.locate(conf, load=True)
        return source, from_open_clip.read(conf, source, load=True, with_text=True).net
    except (UserError, FileNotFoundError) as error:
        problem = "an export to open_clip needs the text tower of the weights that the run began with"
        raise UserError(f"{problem} ({error}); put them back, or export to onnx or pt2") from error


def _model_cfg(source: ClipSource, learned: Learned) -> dict[str, Any]:
    """The configuration of both towers, with what differs from the one of this name."""
    cfg, changes = copy.deepcopy(source.model_cfg), learned.built.changes
    vision = cfg["vision_cfg"]
    vision["image_size"] = learned.built.preprocess.size
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if changes.get("activation") == "gelu_tanh":
        vision["act_kwargs"] = {"approximate": "tanh"}
    if changes.get("activation"):
        cfg["quick_gelu"] = changes["activation"] == "quick_gelu"
    if changes.get("norm_eps"):
        vision["norm_kwargs"] = {"eps": changes["norm_eps"]}
    return cfg


def _images(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing in open_clip's words; the size is the model's."""
    mean, std = list(preprocess.mean), list(preprocess.std)
    resize = RESIZES[preprocess.resize]
    return {"mean": mean, "std": std, "interpolation": preprocess.interpolation, "resize_mode": resize}


@torch.inference_mode()
def _program(net: TowerWithHead) -> str:
    """The program, with what the classifier does to features ahead of its product."""
    features = "model.encode_image(batch)"
    size = _size_of(net.visual)
    tokens = net.visual(torch.zeros(1, 3, size, size)).ndim
    if tokens > 2:
        features += ".mean(dim=1)" if tokens == 3 else ".mean(dim=(2, 3))"
    if net.head.normalize:
        features = f"torch.nn.functional.normalize({features}, dim=-1)"
    bias = 'file.get_tensor("head.bias")' if net.head.bias is not None else "0"
    return PROGRAM.replace("FEATURES", features).replace("BIAS", bias)


def _size_of(visual: torch.nn.Module) -> int:
    size: Any = vars(visual)["image_size"]
    return int(size if isinstance(size, int) else size[0])


def _notes(learned: Learned, source: ClipSource, *, is_trained: bool) -> tuple[str, ...]:
    """What the format cannot hold."""
    preprocess, weights = learned.built.preprocess, Path(source.label).name
    notes = [
        "open_clip has no place for a classifier. It is in `classifier.safetensors`: a row of `head.weight` a class.",
        f"The text tower is that of the weights with which the run began ({weights}), unchanged.",
    ]
    if is_trained:
        notes.append(
            "The image tower was trained away from the text tower, so texts fit images less well than before;"
            " the classifier is what was trained."
        )
    if learned.conf.name == glyphs.CLIP:
        length = source.model_cfg["text_cfg"]["context_length"]
        call = f'open_clip.SimpleTokenizer(f"{{FOLDER}}/{VOCABULARY}", context_length={length})'
        notes.append(f"Texts need this model's own vocabulary: `{call}`.")
    if preprocess.resize == "crop" and preprocess.shorter_side != preprocess.size:
        crop = f"{preprocess.size} pixels out of a shorter side of {preprocess.shorter_side}"
        notes.append(f"open_clip resizes the shorter side to the size that it crops, and the run cropped {crop}.")
    return tuple(notes)
