"""The format `pt2`: `model.pt2`, a program of torch.export, which torch alone runs."""

import json
from pathlib import Path
from typing import Any

import torch

from finetune.runs.weights import write_whole
from finetune.system.errors import UserError
from finetune.use.exporting.formats import Written, completed, metadata_of, pillow_steps
from finetune.use.loading import Learned

FILE = "model.pt2"
# What torch.export raises on a network that it cannot follow.
UNFIT = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)

PROGRAM = """\
import json

import numpy as np
import torch
from PIL import Image, ImageOps

FOLDER = "."  # where this file lies
texts = {"classes": ""}
model = torch.export.load(f"{FOLDER}/model.pt2", extra_files=texts).module()
classes = json.loads(texts["classes"])


def prepare(image):
STEPS    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def scores(batch):
    with torch.inference_mode():
        return model(batch)
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the folder.

    Raises:
        UserError: torch.export cannot follow the network.
    """
    program, texts = traced(learned), described(learned)
    write_whole(folder / FILE, lambda temporary: _save(program, temporary, texts))
    text = completed(PROGRAM.replace("STEPS", pillow_steps(learned.built.preprocess)), learned)
    return Written(
        text, ("Load `.pt2` files of people whom you trust only: torch reads parts of such a file as pickles.",)
    )


def _save(program: Any, path: Path, texts: dict[str, str]) -> None:
    with path.open("wb") as file:  # torch wants names to end in .pt2
        torch.export.save(program, file, extra_files=texts)


def traced(learned: Learned) -> Any:
    """The network as an exported program, for batches of any size; no place of this machine is in it.

    Raises:
        UserError: torch.export cannot follow the network.
    """
    net, images = learned.built.model.net, learned.built.preprocess
    example = torch.zeros(2, images.channels, images.size, images.size)
    try:
        with torch.no_grad():
            dynamic = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(net, (example,), dynamic_shapes=dynamic, strict=False)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"torch.export cannot follow {learned.conf.name} ({reason})") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def described(learned: Learned) -> dict[str, str]:
    """Names of classes, preprocessing and threshold as texts of JSON, as the metadata of a file have them."""
    several = learned.threshold is not None
    known = {"is_multilabel": json.dumps(several)} | ({"threshold": repr(learned.threshold)} if several else {})
    return known | {key: text for key, text in metadata_of(learned).items() if key in ("classes", "preprocess")}
