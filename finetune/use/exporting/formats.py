"""What a format is: what it refuses, which files it writes, and the program with which its library runs them."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.models.upstream.weight_files import is_path
from finetune.runs.weights import weights_metadata
from finetune.use.loading import Learned

UNNAMED = "/weights.safetensors"  # in the place of a path on the machine of the run


@dataclass(frozen=True)
class Written:
    """What a format has written."""

    # A program for the folder that defines `prepare(image)`, from an image of Pillow in RGB to what the network reads,
    # `scores(batch)`, the logits, and `classify(path)`, the probability of each class. It imports no finetune.
    program: str
    notes: tuple[str, ...] = ()  # what the format cannot hold, a sentence each


@dataclass(frozen=True)
class Format:
    """A format that a model can be exported to."""

    write: Callable[[Learned, Path], Written]  # into an empty folder; a UserError where it cannot hold the model
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


def completed(program: str, learned: Learned) -> str:
    """A program with torch, with what depends on the model: how scores become probabilities, and Pillow's mode."""
    to_probabilities = "softmax(dim=1)" if learned.threshold is None else "sigmoid()"
    mode = "L" if learned.built.preprocess.channels == 1 else "RGB"
    return program.replace("PROBABILITIES", f"scores(batch).{to_probabilities}").replace("MODE", mode)
