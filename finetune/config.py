"""The whole configuration on one page: a dataclass a component, its defaults, ranges and meaning.

Standard library only, so that a typing mistake is answered before torch is imported. The schema owns every default;
the yaml files under `conf/` hold choices. `validate` finds every problem at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar


class Choice(str, Enum):
    """A word out of a closed list. Members equal their plain string, so `conf.mode == "linear"` holds."""

    def __str__(self) -> str:
        return str(self.value)


class Precision(Choice):
    """What the forward and backward passes compute in; the weights that the optimizer updates are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Family(Choice):
    """Which kind of model `model.name` is looked up as."""

    clip = "clip"
    vit = "vit"


class HeadKind(Choice):
    """How the classifier starts."""

    auto = "auto"
    zeroshot = "zeroshot"
    random = "random"


class SourceKind(Choice):
    """Where images and labels come from."""

    digits = "digits"
    folder = "folder"


class Recipe(Choice):
    """Named augmentation recipes."""

    none = "none"
    light = "light"


class Mode(Choice):
    """Shape of the rate curve over one cycle, as a function of progress t in [0, 1]."""

    linear = "linear"
    cosine = "cosine"
    cosine_pi = "cosine_pi"


class Interval(Choice):
    """How often the scheduler steps, and so the unit of `cycle` and `warmup`."""

    epoch = "epoch"
    step = "step"


class PastCycle(Choice):
    """What the rate does after the cycle has ended."""

    mirror = "mirror"
    restart = "restart"
    hold = "hold"


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with its meaning and its range, which `validate` holds and `--help` shows.

    Args:
        default: The value where nothing else is said; a list is copied for each instance.
        help: One line with the unit and what the default means.
        above: The value must be greater than this.
        at_least: The value must be this or greater.
        below: The value must be less than this.
        at_most: The value must be this or less.
    """
    metadata = {"help": help, "above": above, "at_least": at_least, "below": below, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConf:
    """Which pretrained model, and which classifier on top of it."""

    family: Family = setting(Family.clip, "clip: an open_clip image tower; vit: a timm Vision Transformer")
    name: str = setting(
        "glyph_clip", "architecture, as open_clip or timm names it; glyph_clip and glyph_vit are bundled"
    )
    pretrained: str = setting(
        "bundled", "weights: bundled, none (random), an open_clip or timm tag, a hub id or a path"
    )
    image_size: int = setting(0, "pixels a side that the model sees; 0: the size of its weights", at_least=0)
    head: HeadKind = setting(
        HeadKind.auto, "classifier: zeroshot (from class names), random; auto: zeroshot where there is a text tower"
    )
    templates: list[str] = setting(
        ["{}", "a photo of a {}.", "a photo of the {}."], "prompts of the zero-shot head; {} is the class name"
    )
    drop_path: float = setting(
        0.0, "probability of dropping a residual branch in the last block, rising linearly (ViT)", at_least=0, below=1
    )
    head_dropout: float = setting(0.0, "dropout on the features ahead of the classifier", at_least=0, below=1)


@dataclass
class DataConf:
    """Images, labels, their splits, and how they are fed."""

    source: SourceKind = setting(
        SourceKind.digits, "digits: bundled handwriting; folder: one folder a class under data.root"
    )
    root: str | None = setting(None, "folder that holds the images (source=folder)")
    val_fraction: float = setting(0.1, "share of each class kept for validation", above=0, below=1)
    test_fraction: float = setting(0.3, "share of each class kept for the final test", above=0, below=1)
    split_seed: int = setting(
        0, "seed of the split, apart from `seed`: every run is compared on the same images", at_least=0
    )
    batch_size: int = setting(64, "images a micro-batch", at_least=1)
    workers: int = setting(
        0, "loader processes; 0: load in the training process. Changes nothing but speed", at_least=0
    )


@dataclass
class OptimConf:
    """AdamW with layer-wise rate decay and a frozen prefix."""

    lr: float = setting(1e-3, "peak rate of the head, absolute", above=0)
    layer_decay: float = setting(
        0.75, "each layer further from the output learns at this times the rate of the one above", above=0, at_most=1
    )
    fix_layer: int = setting(
        -1,
        "layers with id <= this are frozen; -1: none, 0: the stem, L: all blocks, L+1: all but the head",
        at_least=-1,
    )
    weight_decay: float = setting(
        0.05, "AdamW's decoupled decay on matrices; never on biases, norms, tokens, positions", at_least=0
    )
    no_weight_decay: list[str] = setting([], "globs of parameter names that are not decayed either")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "AdamW's running-mean coefficients of gradient and squared gradient"
    )
    eps: float = setting(1e-8, "AdamW's denominator floor", above=0)


@dataclass
class SchedulerConf:
    """The factor on every group's rate over time. Plain strings serve for enums: `SchedulerConf(mode="cosine_pi")`."""

    mode: Mode = setting(Mode.linear, "linear: 1 - t; cosine: cos(pi/2 t); cosine_pi: (1 + cos(pi t)) / 2, t in [0, 1]")
    cycle: int = setting(0, "length of the curve in units of `interval`; 0: the whole run", at_least=0)
    scale_min: float = setting(
        0.0, "floor of the factor: r becomes r * (1 - scale_min) + scale_min", at_least=0, at_most=1
    )
    interval: Interval = setting(
        Interval.epoch, "epoch: step once after train and validate; step: once an optimizer step"
    )
    warmup: int = setting(0, "units ahead of the curve in which the factor rises as (t + 1) / (warmup + 1)", at_least=0)
    past_cycle: PastCycle = setting(
        PastCycle.mirror, "past the cycle: mirror (back up), restart (from the top) or hold (at the floor)"
    )


@dataclass
class AugmentConf:
    """What happens to a training image before the model sees it."""

    recipe: Recipe = setting(Recipe.light, "none: resize only; light: a small random rotation, shift and zoom")
    degrees: float = setting(10.0, "light: largest rotation either way, in degrees", at_least=0, at_most=180)
    translate: float = setting(0.08, "light: largest shift either way, as a share of the side", at_least=0, below=1)
    zoom: float = setting(0.1, "light: largest change of size either way, as a share", at_least=0, below=1)
    flip: float = setting(
        0.0, "light: probability of a left-right mirror image; leave 0 for digits and letters", at_least=0, at_most=1
    )
    views: int = setting(0, "0: a fresh view of each image every epoch; K: K views, recycled", at_least=0)


@dataclass
class TrainConf:
    """The epoch loop."""

    epochs: int = setting(15, "passes over the training images", at_least=1)
    accumulate: int = setting(1, "micro-batches that make one optimizer step", at_least=1)
    clip_grad: float = setting(1.0, "largest global gradient norm; 0: no clipping", at_least=0)
    label_smoothing: float = setting(0.0, "share of each label spread over all classes", at_least=0, below=1)
    monitor: str = setting(
        "val/top1", "the validation metric that picks the best epoch; a name ending in loss is minimised"
    )
    patience: int = setting(0, "stop after this many epochs without a better monitor; 0: never", at_least=0)
    save_every_steps: int = setting(
        0, "save within an epoch each so many optimizer steps; 0: at the end of epochs only", at_least=0
    )


@dataclass
class Conf:
    """One run."""

    seed: int = setting(0, "of everything random but the split", at_least=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Precision = setting(Precision.auto, "auto: bf16 where the GPU has it, else fp32")
    deterministic: bool = setting(False, "on CUDA: only kernels that give the same bits every time (slower)")
    resume: str | None = setting(None, "a run directory to continue, or `latest`")
    model: ModelConf = field(default_factory=ModelConf)
    data: DataConf = field(default_factory=DataConf)
    optim: OptimConf = field(default_factory=OptimConf)
    sched: SchedulerConf = field(default_factory=SchedulerConf)
    augment: AugmentConf = field(default_factory=AugmentConf)
    train: TrainConf = field(default_factory=TrainConf)


C = TypeVar("C", bound=Choice)

# What validation measures, and so what `train.monitor` can name.
MONITORS = ("val/top1", "val/top5", "val/loss")


def as_dict(conf: object) -> dict[str, Any]:
    """A configuration in plain types, as `config.yaml` in a run directory holds it: enums as words, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.value if isinstance(value, Enum) else value

    return {key: plain(value) for key, value in dataclasses.asdict(conf).items()}  # type: ignore[call-overload]


def nearest(word: str, words: Iterable[str]) -> str:
    """The valid word most like the one that was typed, as ` (did you mean 'x'?)`, or nothing where none is close."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def choose(kind: type[C], word: str, key: str) -> C:
    """The member of `kind` that `word` names.

    Raises:
        ValueError: The word is not in the list; says which are and which is nearest.
    """
    words = [member.value for member in kind]
    if word not in words:
        raise ValueError(f"{key}={word}: expected one of {', '.join(words)}{nearest(str(word), words)}")
    return kind(word)


def settings(conf: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every leaf of a configuration as (dotted key, value, field)."""
    for item in dataclasses.fields(conf):  # type: ignore[arg-type]
        value = getattr(conf, item.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def _range_problem(key: str, value: Any, metadata: Any) -> str | None:
    """Why `value` lies outside the range of its field, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    bounds = [
        ("above", "greater than", operator.gt),
        ("at_least", "at least", operator.ge),
        ("below", "less than", operator.lt),
        ("at_most", "at most", operator.le),
    ]
    wanted = [(words, metadata[name], holds) for name, words, holds in bounds if metadata.get(name) is not None]
    if math.isfinite(value) and all(holds(value, bound) for _, bound, holds in wanted):
        return None
    ranges = " and ".join(f"{words} {bound:g}" for words, bound, _ in wanted) or "a finite number"
    return f"{key}={value}: must be {ranges} ({metadata['help']})"


def validate(conf: Conf, unread: Collection[str] = ()) -> list[str]:
    """Every problem that the configuration alone can show, one line each; an empty list where there is none.

    What only the model or the files can tell (`fix_layer` beyond the depth, a missing folder) is found later.

    Args:
        conf: The whole configuration.
        unread: Groups (`data`, `sched`, ...) of which some value could not be read: rules that weigh their settings
            against each other are left out, so that one mistake is not reported twice.
    """
    problems = [p for key, value, item in settings(conf) if (p := _range_problem(key, value, item.metadata))]
    problems += _word_problems(conf)
    rules = [(("data",), _source_problems), (("augment",), _augment_problems), (("sched", "train"), _schedule_problems)]
    for groups, rule in rules:
        if not any(group in unread for group in groups):
            problems += rule(conf)
    return problems


def _word_problems(conf: Conf) -> list[str]:
    """What is wrong with a setting by itself, beyond its range."""
    problems = []
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", conf.device):
        words = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        problems.append(f"device={conf.device}: expected auto, cpu, cuda, cuda:N or mps{nearest(conf.device, words)}")
    for template in conf.model.templates:
        if template.count("{}") != 1 or re.sub(r"\{\}", "", template).count("{"):
            problems.append(f"model.templates: {template!r} must hold {{}} once, where the class name goes")
    if not conf.model.templates:
        problems.append("model.templates is empty: give at least one prompt, such as 'a photo of a {}.'")
    if not all(0 <= beta < 1 for beta in conf.optim.betas):
        problems.append(f"optim.betas={list(conf.optim.betas)}: each must be at least 0 and less than 1")
    if not conf.train.monitor.startswith("val/"):
        problems.append(
            f"train.monitor={conf.train.monitor}: must be a validation metric, such as val/top1 or val/loss"
        )
    return problems


def _source_problems(conf: Conf) -> list[str]:
    data = conf.data
    problems = []
    if data.source == SourceKind.digits and data.root is not None:
        problems.append(
            f"data.root={data.root} would be ignored: data=digits is bundled; use data=folder for your own images"
        )
    if data.source == SourceKind.folder and not data.root:
        problems.append("data=folder needs data.root=PATH, the folder that holds one folder of images a class")
    if data.val_fraction + data.test_fraction >= 1:
        problems.append(
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to learn:"
            " their sum must be less than 1"
        )
    return problems


def _augment_problems(conf: Conf) -> list[str]:
    augment = conf.augment
    problems = []
    if augment.recipe == Recipe.none:
        fresh = AugmentConf()
        for name in ("degrees", "translate", "zoom", "flip", "views"):
            if getattr(augment, name) != getattr(fresh, name):
                problems.append(
                    f"augment.{name}={getattr(augment, name)} would be ignored: augment=none changes no image"
                )
    return problems


def _schedule_problems(conf: Conf) -> list[str]:
    sched = conf.sched
    # In units of steps the length of the run depends on the data; create_scheduler checks it again there.
    length = sched.cycle or (conf.train.epochs if sched.interval == Interval.epoch else 0)
    if length and sched.warmup >= length:
        return [f"sched.warmup={sched.warmup}: must be less than the length of the curve, {length} {sched.interval}s"]
    return []
