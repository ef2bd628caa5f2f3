"""The format `onnx`: `model.onnx`, for onnxruntime and others; resize, crop and normalisation are in it where asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.runs.weights import num_bytes
from finetune.system.errors import UserError
from finetune.system.files import sync_file
from finetune.use.exporting.formats import Written, pillow_steps
from finetune.use.exporting.onnx_images import preparing
from finetune.use.exporting.pt2_file import UNFIT, described, traced
from finetune.use.loading import Learned

FILE = "model.onnx"
OPSET = 20  # the first whose Gelu and Resize have all that is used; onnxruntime 1.17 knows it
MOST_BYTES = 2**30  # of weights in one file, since protobuf ends at 2 GiB; others lie in a second file

PROGRAM = """\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = "."  # where this file lies
session = onnxruntime.InferenceSession(f"{FOLDER}/model.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])


def prepare(image):
STEPS

def scores(batch):
    return session.run(["scores"], {"INPUT": batch})[0]
PIXELS

def classify(path):
    values = scores(prepare(ImageOps.exif_transpose(Image.open(path)))[None])[0]
    PROBABILITIES
    return dict(zip(classes, values.tolist()))
"""
SOFTMAX = "values = np.exp(values - values.max())\n    values = values / values.sum()"
SIGMOID = "values = 1 / (1 + np.exp(-values))"
PIXELS = """

def pixels(batch):
    return session.run(["pixels"], {"images": batch})[0]
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the network, which reads prepared images.

    Raises:
        UserError: It cannot be exported.
    """
    _save(_network(learned), learned, folder)
    steps = pillow_steps(learned.built.preprocess) + "    return pixels.transpose(2, 0, 1)\n"
    return Written(_program(learned, steps, "pixels"))


def write_whole(learned: Learned, folder: Path) -> Written:
    """Write the network with the preprocessing in it: it reads uint8 (batch, height, width, 3), of any size.

    Raises:
        UserError: It cannot be exported.
    """
    import onnx

    network = _network(learned)
    images = onnx.parser.parse_model(preparing(learned.built.preprocess, ir=network.ir_version, opset=OPSET))
    # Names between nodes are of the network alone, which may well call one `mean`.
    images = onnx.compose.add_prefix(images, "prepare_", rename_inputs=False, rename_outputs=False)
    whole = onnx.compose.merge_models(images, network, io_map=[("pixels", "pixels")], outputs=["scores", "pixels"])
    _save(whole, learned, folder)
    steps = '    return np.asarray(image.convert("RGB"))\n'
    return Written(
        _program(learned, steps, "images").replace("PIXELS\n", PIXELS),
        ("The network reads images as they are, uint8 (batch, height, width, 3), those of a batch of one size.",),
    )


def _program(learned: Learned, steps: str, name: str) -> str:
    program = PROGRAM.replace("STEPS\n", steps).replace("INPUT", name)
    program = program.replace("PROBABILITIES", probabilities_of(learned))
    return program if name == "images" else program.replace("PIXELS\n", "")


def probabilities_of(learned: Learned) -> str:
    """The lines of a program that make probabilities of `values`, the scores of an image, with NumPy."""
    return SOFTMAX if learned.threshold is None else SIGMOID


def _network(learned: Learned) -> Any:
    """The network as a model of ONNX for batches of any size, `pixels` to `scores`; no place of this machine is in it.

    Raises:
        UserError: It has an operation that ONNX lacks.
    """
    program = traced(learned)
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["scores"]}
    try:
        made: Any = torch.onnx.export(program, (), opset_version=OPSET, dynamo=True, verbose=False, **names)
        model = made.model_proto
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"ONNX cannot hold {learned.conf.name} ({reason})") from error
    for part in (*_graphs(model.graph), *model.functions):
        for each in (part, *part.node, *part.value_info):
            del each.metadata_props[:]
            each.doc_string = ""
    del model.graph.value_info[:]  # shapes of what is between, by other names of the batch
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and all that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _save(model: Any, learned: Learned, folder: Path) -> None:
    import onnx

    model.producer_name, model.doc_string = "finetune", ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, described(learned))
    is_large = num_bytes(learned.built.model.net.state_dict()) > MOST_BYTES
    onnx.save_model(model, str(folder / FILE), save_as_external_data=is_large, location=f"{FILE}.data")
    for path in folder.glob(f"{FILE}*"):
        sync_file(path)
