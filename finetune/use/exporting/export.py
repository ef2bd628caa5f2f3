"""Exports a model: writes it in a format of another library, proves it there, and only then puts it in its place."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

from finetune.config import nearest
from finetune.core.device import pick_device
from finetune.system.errors import UserError
from finetune.system.files import write_text
from finetune.use.exporting import (
    int8_file,
    onnx_file,
    open_clip_folder,
    openvino_file,
    pt2_file,
    timm_folder,
    transformers_folder,
)
from finetune.use.exporting.card import About, card
from finetune.use.exporting.checking import Checked, Images, check, prepared
from finetune.use.exporting.formats import Format
from finetune.use.exporting.place import made_at
from finetune.use.loading import Learned, predictor_of

ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "timm": Format(timm_folder.write),
    "open_clip": Format(open_clip_folder.write),
    "onnx": Format(onnx_file.write, onnx_file.write_whole, packages=ONNX, extra="onnx"),
    "int8": Format(onnx_file.write, quantise=int8_file.quantise, packages=ONNX, extra="onnx"),
    "openvino": Format(openvino_file.write, packages=("openvino",), extra="openvino"),
    "pt2": Format(pt2_file.write),
    "transformers": Format(transformers_folder.write, packages=("transformers",), extra="transformers"),
}
EXAMPLES = 128  # images of training on which a format that rounds measures ranges
README = "README.md"


def format_of(name: str) -> Format:
    """The format that is called `name`.

    Raises:
        UserError: There is none, or a package that it needs is missing.
    """
    if name not in FORMATS:
        raise UserError(f"{name}: no such format{nearest(name, FORMATS)}; expected one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if missing := [package for package in found.packages if importlib.util.find_spec(package) is None]:
        raise UserError(f"{name} needs the package {missing[0]}: pip install 'finetune[{found.extra}]'")
    return found


def export(
    learned: Learned,
    name: str,
    place: Path,
    images: Callable[[], Images],
    *,
    about: About,
    with_preprocess: bool = False,
    allow_different: bool = False,
) -> Checked:
    """Write `learned` in the format `name` to the new folder `place`; how far it is from the model.

    With `with_preprocess` the network resizes, crops and normalises images itself. `images` gives the images of the
    comparison. It is called once the format is known to hold the model.

    Raises:
        RefusedError: Something is at `place`.
        UserError: The format cannot hold the model, or gives other scores than the model, and not `allow_different`.
    """
    found = format_of(name)
    write = found.write_whole if with_preprocess else found.write
    if write is None:
        able = ", ".join(word for word, each in FORMATS.items() if each.write_whole)
        raise UserError(f"--with-preprocess: a network of {name} reads prepared images; leave it out, or use {able}")
    with made_at(place) as folder:
        learned.built.model.requires_grad_(False).eval()
        written = write(learned, folder)
        given = images()
        if found.quantise is not None:
            notes = found.quantise(folder, prepared(given.examples, learned.built.preprocess, EXAMPLES))
            written = dataclasses.replace(written, notes=(*notes, *written.notes))
        write_text(folder / README, card(name, learned, written, about, None))
        predictor = predictor_of(learned, name, pick_device("cpu"), "fp32")
        checked = check(folder, predictor, given, is_rounded=found.quantise is not None)
        if checked.differs and not allow_different:
            raise UserError(_difference(name, checked, written.notes))
        write_text(folder / README, card(name, learned, written, about, checked))
    return checked


def _difference(name: str, checked: Checked, notes: tuple[str, ...]) -> str:
    what = "its preprocessing differs from the run's"
    if checked.differs == "accuracy":
        what = "rounding costs too much accuracy"
    if checked.differs == "numbers":
        what = f"its scores of the same pixels differ by {checked.numbers:.1e}"
    why = f" {' '.join(notes)}" if notes else ""
    mend = "nothing was written; --allow-different exports it all the same"
    return f"the export to {name} is not the model of the run: {what}. {checked}.{why} So {mend}"
