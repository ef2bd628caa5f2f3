"""The image tower of a CLIP as transformers loads it (`CLIPVisionModelWithProjection`), with the classifier beside it.

transformers' own CLIP with a classifier, `CLIPForImageClassification`, reads the mean of the patches and not the
projected class token, so it is another network.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.preprocess import Preprocess
from finetune.models.heads.head import TowerWithHead
from finetune.models.upstream.layouts import same
from finetune.models.upstream.tables import joined, transposed
from finetune.models.upstream.transformers_config import activation_of
from finetune.models.upstream.transformers_tables import CLIP, sources
from finetune.runs.weights import write_weights
from finetune.system.errors import UserError
from finetune.system.files import write_json
from finetune.use.exporting.formats import Written, completed, metadata_of
from finetune.use.loading import Learned

CLASSIFIER = "classifier.safetensors"
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
# How a tensor of ours is taken apart again: the inverse of how it is made of `count` tensors of transformers.
APART: dict[Callable[..., Tensor], Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    same: lambda tensor, count: (tensor,),
    joined: lambda tensor, count: tensor.chunk(count),
    transposed: lambda tensor, count: (tensor.T,),
}

PROGRAM = """\
import json

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

FOLDER = "."  # where this file lies
model = CLIPVisionModelWithProjection.from_pretrained(FOLDER).eval()
processor = CLIPImageProcessor.from_pretrained(FOLDER)
with safe_open(f"{FOLDER}/classifier.safetensors", "pt") as file:
    classes = json.loads(file.metadata()["classes"])
    weight, bias = file.get_tensor("head.weight"), BIAS


def prepare(image):
    return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def scores(batch):
    with torch.inference_mode():
        features = FEATURES
        return features @ weight.T + bias
"""


def write(learned: Learned, net: TowerWithHead, folder: Path) -> Written:
    """Write the folder.

    Raises:
        UserError: transformers has no such tower.
    """
    tower = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("visual.")}
    taken: dict[str, Tensor] = {}
    known = sources(tower, CLIP)
    for name in tower.keys() & known.keys():
        source = known[name]
        parts = APART[source.make](tower[name], len(source.names))
        assert torch.equal(source.make(*parts), tower[name]), f"{name} is taken apart wrongly"
        taken |= {theirs: part.contiguous() for theirs, part in zip(source.names, parts, strict=True)}
    if other := sorted(tower.keys() - known.keys()) or [name for name in ("visual.proj",) if name not in tower]:
        problem = f"transformers' CLIP has no image tower like {learned.conf.name} (such as its {other[0]})"
        raise UserError(f"{problem}; export it to open_clip, onnx or pt2")
    write_weights(folder / "model.safetensors", taken, {"format": "pt"})
    head = {name: tensor for name, tensor in net.state_dict().items() if name not in tower}
    write_weights(folder / CLASSIFIER, head, metadata_of(learned))
    write_json(folder / "config.json", _config(net.visual, learned.built.preprocess))
    write_json(folder / "preprocessor_config.json", _images(learned.built.preprocess))
    features = "model(pixel_values=batch).image_embeds"
    if net.head.normalize:
        features = f"torch.nn.functional.normalize({features}, dim=-1)"
    bias = 'file.get_tensor("head.bias")' if net.head.bias is not None else "0"
    program = PROGRAM.replace("FEATURES", features).replace("BIAS", bias)
    note = (
        "transformers has no class for a CLIP with this classifier: `CLIPForImageClassification` reads the mean of the"
        " patches. It is in `classifier.safetensors`: a row of `head.weight` a class."
    )
    return Written(completed(program, learned), (note,))


def _config(visual: nn.Module, preprocess: Preprocess) -> dict[str, Any]:
    """The tower in transformers' words."""
    tower: Any = visual
    block = tower.transformer.resblocks[0]
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": tower.conv1.weight.shape[0],
        "patch_size": tower.conv1.weight.shape[-1],
        "num_channels": tower.conv1.weight.shape[1],
        "image_size": preprocess.size,
        "intermediate_size": block.mlp.c_fc.weight.shape[0],
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "projection_dim": tower.proj.shape[1],
        "hidden_act": ACTIVATIONS.get(activation_of(block.mlp.gelu), "gelu"),
        "layer_norm_eps": block.ln_1.eps,
    }


def _images(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessing in transformers' words."""
    square = {"height": preprocess.size, "width": preprocess.size}
    is_crop = preprocess.resize == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.shorter_side} if is_crop else square,
        "resample": RESAMPLING[preprocess.interpolation.partition("-")[0]],
        "do_center_crop": is_crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
