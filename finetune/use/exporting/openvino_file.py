"""The format `openvino`: `model.xml` and `model.bin`, for OpenVINO, which is fast on what Intel makes."""

import sys
from pathlib import Path
from typing import Any

from finetune.system.errors import UserError
from finetune.system.files import sync_file
from finetune.use.exporting.formats import Written, pillow_steps
from finetune.use.exporting.onnx_file import probabilities_of
from finetune.use.exporting.pt2_file import UNFIT, described, traced
from finetune.use.loading import Learned

FILE = "model.xml"  # the weights lie beside it in `model.bin`
TEXTS = "finetune"  # the texts of a model stand under this name in its `rt_info`

PROGRAM = """\
import json

import numpy as np
import openvino
from PIL import Image, ImageOps

FOLDER = "."  # where this file lies
network = openvino.Core().read_model(f"{FOLDER}/model.xml")
classes = json.loads(network.get_rt_info(["finetune", "classes"]).astype(str))
# Without the hint some processors compute in bfloat16, which is faster and gives slightly other scores.
session = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def prepare(image):
STEPS    return pixels.transpose(2, 0, 1)


def scores(batch):
    return session(batch)["scores"]


def classify(path):
    values = scores(prepare(ImageOps.exif_transpose(Image.open(path)))[None])[0]
    PROBABILITIES
    return dict(zip(classes, values.tolist()))
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the network, which reads prepared images, with its texts in `rt_info`.

    Raises:
        UserError: OpenVINO cannot hold it.
    """
    # OpenVINO reports to its makers that it was imported, unless this package of its is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    program, images = traced(learned), learned.built.preprocess
    try:
        model: Any = openvino.convert_model(program)
        model.inputs[0].get_tensor().set_names({"pixels"})
        model.outputs[0].get_tensor().set_names({"scores"})
        model.reshape([-1, images.channels, images.size, images.size])
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"OpenVINO cannot hold {learned.conf.name} ({reason}); use onnx or pt2") from error
    for key, text in described(learned).items():
        model.set_rt_info(text, [TEXTS, key])
    openvino.save_model(model, str(folder / FILE), compress_to_fp16=False)
    for path in folder.glob("model.*"):
        sync_file(path)
    text = PROGRAM.replace("STEPS", pillow_steps(images)).replace("PROBABILITIES", probabilities_of(learned))
    return Written(text, ("OpenVINO tells its makers when it is imported. `opt_in_out --opt_out` ends that.",))
