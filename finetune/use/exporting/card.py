"""`README.md` of an exported folder: how it is loaded, and a model card with data, recipe, metrics and classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import finetune
from finetune.core.metrics.intervals import wilson
from finetune.system.files import json_text
from finetune.system.terminal import printable
from finetune.use.exporting.checking import Checked
from finetune.use.exporting.formats import Written
from finetune.use.loading import Learned

SHOWN = 200  # classes that the card lists
LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "transformers": "transformers", "onnx": "onnx", "int8": "onnx"}
PACKAGES = {"open_clip": "open_clip_torch", "pt2": "torch", "onnx": "onnxruntime", "int8": "onnxruntime"}
RESIZES = {
    "crop": "shorter side to {shorter} pixels, then the {size} x {size} pixels in the middle",
    "squash": "both sides to {size} pixels",
    "pad": "longer side to {size} pixels, then black borders",
}


@dataclass(frozen=True)
class About:
    """What is known of a run beyond its weights: lines of a card by their names. Empty for a weights file alone."""

    data: Mapping[str, object] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # such as `test/top1`
    images: Mapping[str, int] = field(default_factory=dict)  # in each split


def card(name: str, learned: Learned, written: Written, about: About, checked: Checked | None) -> str:
    """The text. `name` is that of the format; `checked` is None before the check, which runs the program in it.

    No name or text of the run stands in front of the program: only what this package wrote is run.
    """
    package = PACKAGES.get(name, name)
    parts = [
        *("---", "license: unknown  # FILL IN", *_library(name), "pipeline_tag: image-classification", "---", ""),
        *("# An image classifier", "", "## How to load it", ""),
        f"With {package} {version(package)}, or newer. `classify(path)` gives the probability of each class.",
        *("", "```python", written.program.rstrip("\n"), "```", ""),
        *[f"* {printable(note)}" for note in written.notes],
        *("", "## Model", "", *_model_lines(name, learned)),
        *("", "## Preprocessing", "", *_preprocess_lines(learned)),
        *_section("Data", about.data),
        *_section("Recipe", about.recipe),
        *_metric_lines(about),
    ]
    if checked is not None:
        parts += ["", "## Compared with the run", "", f"{checked}."]
        if checked.differs:
            parts += [f"**This folder differs from the run in its {checked.differs}.**"]
    parts += ["", "## Classes", "", *_class_lines(learned)]
    parts += ["", "## License", "", "* Of these weights: FILL IN", "* Of the weights that the run began with: FILL IN"]
    parts += ["* Of the images: FILL IN", "* What the model is for, and what it is not for: FILL IN", ""]
    return "\n".join(parts)


def _library(name: str) -> list[str]:
    return [f"library_name: {LIBRARIES[name]}"] if name in LIBRARIES else []


def _model_lines(name: str, learned: Learned) -> list[str]:
    conf = learned.conf
    lines = [f"* architecture: {printable(conf.name)}", f"* format: {name}, by finetune {finetune.__version__}"]
    count = sum(parameter.numel() for parameter in learned.built.model.net.parameters())
    lines.append(f"* parameters: {count:,}")
    if learned.threshold is not None:
        lines.append(f"* an image may have several labels: those whose probability is at least {learned.threshold!r}")
    return lines


def _preprocess_lines(learned: Learned) -> list[str]:
    images = learned.built.preprocess
    resize = RESIZES[images.resize].format(shorter=images.shorter_side, size=images.size)
    kind = "RGB" if images.channels == 3 else "grey"
    mean, std = ([float(value) for value in each[: images.channels]] for each in (images.mean, images.std))
    return [
        f"* {kind}; turned upright by its EXIF tag; transparency on white",
        f"* {resize}; {images.interpolation}, antialiased, rounded to 8 bits",
        f"* divided by 255, minus {mean}, divided by {std}",
    ]


def _section(title: str, lines: Mapping[str, object]) -> list[str]:
    if not lines:
        return []
    return ["", f"## {title}", "", *(f"* {name}: {printable(str(value))}" for name, value in lines.items())]


def _metric_lines(about: About) -> list[str]:
    if not about.metrics:
        return []
    lines = ["", "## Metrics", "", "| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in about.metrics.items():
        images = about.images.get(name.partition("/")[0], 0)
        interval = "{:.4f} to {:.4f}".format(*wilson(value, images)) if name.endswith("/top1") and images else ""
        lines.append(f"| {printable(name)} | {value:.4f} | {interval} |")
    return lines


def _class_lines(learned: Learned) -> list[str]:
    names = [json_text(name) for name in learned.classes]
    more = [f"... and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return ["In the order of the scores:", "", "```text", *names[:SHOWN], *more, "```"]
