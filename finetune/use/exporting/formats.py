"""What a format is: what it refuses, which files it writes, and the program with which its library runs them."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune.core.preprocess import Preprocess
from finetune.models.upstream.weight_files import is_path
from finetune.runs.weights import weights_metadata
from finetune.use.loading import Learned

UNNAMED = "/weights.safetensors"  # in the place of a path on the machine of the run


@dataclass(frozen=True)
class Written:
    """What a format has written."""

    # A program for the folder that defines `classes`; `prepare(image)`, from an image of Pillow to what the network
    # reads; `scores(batch)`, the logits; and `classify(path)`, the probability of each class. It imports no finetune.
    # A network that reads images as they are has `pixels(batch)` too: what it makes of them before its first layer.
    program: str
    notes: tuple[str, ...] = ()  # what the format cannot hold, a sentence each


@dataclass(frozen=True)
class Format:
    """A format that a model can be exported to."""

    write: Callable[[Learned, Path], Written]  # into a new folder; a UserError where it cannot hold the model
    write_whole: Callable[[Learned, Path], Written] | None = None  # the same, with the preprocessing in the network
    # Makes the written network smaller and less exact, by prepared images; what to know of it, a sentence each.
    quantise: Callable[[Path, Tensor], tuple[str, ...]] | None = None
    packages: tuple[str, ...] = ()  # that writing or checking needs, beside those that finetune needs anyway
    extra: str = ""  # of finetune, which brings them


def metadata_of(learned: Learned) -> dict[str, str]:
    """The metadata with which `finetune.load` takes an exported file for one of a run; no path of the run's machine."""
    conf = dataclasses.replace(learned.conf, pretrained_key=None)
    if is_path(conf.pretrained):
        conf = dataclasses.replace(conf, pretrained=UNNAMED)
    is_multilabel = learned.threshold is not None
    settings = dataclasses.asdict(conf)
    texts = weights_metadata(learned.classes, learned.built.preprocess, settings, is_multilabel=is_multilabel)
    if learned.built.changes:
        texts["changes"] = json.dumps(learned.built.changes)
    return texts | ({"threshold": repr(learned.threshold)} if is_multilabel else {})


CLASSIFY = """\


def classify(path):
    batch = prepare(ImageOps.exif_transpose(Image.open(path)))[None]
    return dict(zip(classes, PROBABILITIES[0].tolist()))
"""


def completed(program: str, learned: Learned) -> str:
    """A program with torch and its end, with what depends on the model: probabilities of scores, and grey images."""
    program += CLASSIFY
    to_probabilities = "softmax(dim=1)" if learned.threshold is None else "sigmoid()"
    program = program.replace("PROBABILITIES", f"scores(batch).{to_probabilities}")
    if learned.built.preprocess.channels == 1:
        weighted = "return 0.299 * pixels[:1] + 0.587 * pixels[1:2] + 0.114 * pixels[2:]"  # as the run does
        return re.sub(r"return (\w+\(image.convert\(\"RGB\"\)\).*)", rf"pixels = \1\n    {weighted}", program)
    return program


def pillow_steps(preprocess: Preprocess) -> str:
    """The lines of a program that make of `image` what the network reads, with Pillow and NumPy: `pixels`."""
    size, channels = preprocess.size, preprocess.channels
    resample = f"Image.Resampling.{preprocess.interpolation.partition('-')[0].upper()}"
    mean, std = ([float(value) for value in each[:channels]] for each in (preprocess.mean, preprocess.std))
    steps = {
        "squash": [f"image = image.resize(({size}, {size}), {resample})"],
        "crop": [
            "short = min(image.size)",
            f"image = image.resize([{preprocess.shorter_side} * side // short for side in image.size], {resample})",
            f"left, top = (round((side - {size}) / 2) for side in image.size)",
            f"image = image.crop((left, top, left + {size}, top + {size}))",
        ],
        "pad": [
            "longest = max(image.size)",
            f"image = image.resize([max(1, round({size} * side / longest)) for side in image.size], {resample})",
            f'square = Image.new("RGB", ({size}, {size}))',
            f"square.paste(image, (({size} - image.width) // 2, ({size} - image.height) // 2))",
            "image = square",
        ],
    }[preprocess.resize]
    lines = [
        'image = image.convert("RGB")',
        *steps,
        "pixels = np.asarray(image, dtype=np.float32) / 255",
        *(["pixels = (pixels @ np.float32([0.299, 0.587, 0.114]))[:, :, None]"] if channels == 1 else []),
        f"pixels = (pixels - np.float32({mean})) / np.float32({std})",
    ]
    return "".join(f"    {line}\n" for line in lines)
