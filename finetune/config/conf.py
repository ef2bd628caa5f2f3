"""The whole configuration on one page: a dataclass a component, its defaults, ranges and meaning.

Standard library only, so that a typing mistake is answered before torch is imported. The schema owns every default;
the yaml files under `conf/` hold choices. `validate` finds every problem at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from finetune.config.augment import AugmentConf as AugmentConf
from finetune.config.augment import Policy as Policy
from finetune.config.augment import Recipe as Recipe
from finetune.config.augment import augment_problems
from finetune.config.data import Balance as Balance
from finetune.config.data import CacheKind as CacheKind
from finetune.config.data import DataConf as DataConf
from finetune.config.data import OnError as OnError
from finetune.config.data import SourceKind as SourceKind
from finetune.config.data import data_problems, device_cache_problems
from finetune.config.fields import Choice as Choice
from finetune.config.fields import choose as choose
from finetune.config.fields import nearest as nearest
from finetune.config.fields import setting as setting
from finetune.config.optim import LayerRule as LayerRule
from finetune.config.optim import OptimConf as OptimConf
from finetune.config.optim import OptimizerKind as OptimizerKind
from finetune.config.optim import optim_problems
from finetune.config.prefix import PrefixCache as PrefixCache
from finetune.config.prefix import PrefixConf as PrefixConf
from finetune.config.prefix import PrefixDtype as PrefixDtype
from finetune.config.prefix import prefix_problems
from finetune.config.train import LABEL_METRICS as LABEL_METRICS
from finetune.config.train import MULTILABEL_METRICS as MULTILABEL_METRICS
from finetune.config.train import ClassTokenOnly as ClassTokenOnly
from finetune.config.train import CompileMode as CompileMode
from finetune.config.train import Loss as Loss
from finetune.config.train import OnNonfinite as OnNonfinite
from finetune.config.train import TrainConf as TrainConf
from finetune.config.train import measured_metrics as measured_metrics
from finetune.config.train import train_problems as train_problems


class Precision(Choice):
    """What the forward and backward passes compute in; the weights that the optimizer updates are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
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
    linear_probe = "linear_probe"
    random = "random"
    keep = "keep"


class Library(Choice):
    """Whose model `model.name` is, where several libraries know the name."""

    auto = "auto"
    open_clip = "open_clip"
    timm = "timm"
    torchvision = "torchvision"


class TemplateSet(Choice):
    """Prompts that `model.templates` may call by name."""

    default = "default"
    simple = "simple"
    imagenet = "imagenet"


class Pool(Choice):
    """What the classifier sees of the tokens behind the last block."""

    auto = "auto"
    mean = "mean"


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


@dataclass
class ModelConf:
    """Which pretrained model, and which classifier on top of it."""

    family: Family = setting(Family.clip, "clip: an open_clip image tower; vit: a timm or torchvision network")
    name: str = setting(
        "glyph_clip", "architecture, as open_clip or timm names it; glyph_clip and glyph_vit are bundled"
    )
    pretrained: str = setting(
        "bundled", "weights: bundled, none (random), an open_clip or timm tag, a hub id or a path"
    )
    library: Library = setting(
        Library.auto, "open_clip, timm or torchvision, for a name that several know; auto: the one that knows it"
    )
    image_size: int = setting(0, "pixels a side that the model sees; 0: the size of its weights", at_least=0)
    head: HeadKind = setting(
        HeadKind.auto,
        "classifier: zeroshot (from class names), linear_probe (fitted on frozen features), random, keep (the"
        " checkpoint's own); auto: zeroshot where there is a text tower",
    )
    templates: list[str] = setting(
        ["default"], "prompts of the zero-shot head, {} is the class name; or sets: default, simple (7), imagenet (80)"
    )
    class_names: str | None = setting(
        None,
        "text file for the zero-shot head: a name a line in class order, or CLASS<tab>NAME; null: the classes' own",
    )
    drop_path: float = setting(
        0.0, "probability of dropping a residual branch in the last block, rising linearly (ViT)", at_least=0, below=1
    )
    head_dropout: float = setting(0.0, "dropout on the features ahead of the classifier", at_least=0, below=1)
    head_scale: float = setting(
        1.0, "head=random: its first values times this; MAE, BEiT and FT-CLIP start at 0.001", above=0, at_most=1
    )
    head_bias: bool = setting(
        False, "zero-shot head: an offset for each class, learned too; always there where images have several labels"
    )
    pool: Pool = setting(
        Pool.auto, "auto: as the weights were trained; mean: the mean of all patches under a new norm (CLIP and ViT)"
    )


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
    warmup_epochs: float = setting(
        0.0, "interval=step: the same warmup in epochs, which need not be whole; 0: as `warmup` says", at_least=0
    )
    past_cycle: PastCycle = setting(
        PastCycle.mirror, "past the cycle: mirror (back up), restart (from the top) or hold (at the floor)"
    )


@dataclass
class Conf:
    """One run."""

    seed: int = setting(0, "of everything random but the split", at_least=0, at_most=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Precision = setting(
        Precision.auto, "auto: bf16 where GPU or CPU has it and it pays, else fp32; tf32: fp32 by TF32 products"
    )
    deterministic: bool = setting(False, "on CUDA: only kernels that give the same bits every time (slower)")
    resume: str | None = setting(None, "a run directory to continue, or `latest`")
    resume_force: bool = setting(False, "with resume: go on although settings differ that change what comes out")
    model: ModelConf = field(default_factory=ModelConf)
    data: DataConf = field(default_factory=DataConf)
    optim: OptimConf = field(default_factory=OptimConf)
    sched: SchedulerConf = field(default_factory=SchedulerConf)
    augment: AugmentConf = field(default_factory=AugmentConf)
    prefix: PrefixConf = field(default_factory=PrefixConf)
    train: TrainConf = field(default_factory=TrainConf)


def as_dict(conf: object) -> dict[str, Any]:
    """A configuration in plain types, as `config.yaml` in a run directory holds it: enums as words, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.value if isinstance(value, Enum) else value

    return {key: plain(value) for key, value in dataclasses.asdict(conf).items()}  # type: ignore[call-overload]


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
    rules = [
        (("data",), _source_problems),
        (("optim",), lambda conf: optim_problems(conf.optim)),
        (("augment",), lambda conf: augment_problems(conf.augment)),
        (("data", "augment"), lambda conf: device_cache_problems(conf.data, conf.augment.recipe)),
        (("train",), lambda conf: train_problems(conf.train)),
        (("prefix", "optim"), lambda conf: prefix_problems(conf.prefix, conf.optim.fix_layer)),
        (("sched", "train"), _schedule_problems),
    ]
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
    named = [word.value for word in TemplateSet]
    for template in conf.model.templates:
        if template in named:
            continue
        if template.count("{}") != 1 or re.sub(r"\{\}", "", template).count("{"):
            sets = f"{', '.join(named)}{nearest(template, named)}"
            problems.append(
                f"model.templates: {template!r} must hold {{}} once, where the class name goes, or be one of {sets}"
            )
    problems += _head_problems(conf.model)
    if not conf.model.templates:
        problems.append("model.templates is empty: give at least one prompt, such as 'a photo of a {}.'")
    if conf.resume_force and conf.resume is None:
        problems.append("resume_force=True would be ignored: it goes with resume=PATH, or resume=latest")
    return problems


def _head_problems(model: ModelConf) -> list[str]:
    """Settings of the head that do not go together."""
    problems = []
    if model.pool == Pool.mean and model.head in (HeadKind.zeroshot, HeadKind.keep):
        problems.append(
            f"model.head={model.head} needs the pooling of the weights: use model.head=random or model.pool=auto"
        )
    if model.head_bias and (model.family != Family.clip or model.head not in (HeadKind.auto, HeadKind.zeroshot)):
        problems.append("model.head_bias=true would be ignored: every other head than the zero-shot one has offsets")
    is_zeroshot = model.family == Family.clip and model.head == HeadKind.auto and model.pool == Pool.auto
    if model.class_names is not None and not is_zeroshot and model.head != HeadKind.zeroshot:
        problems.append(f"model.class_names={model.class_names} would be ignored: only a zero-shot head reads names")
    if model.head_scale != 1 and (is_zeroshot or model.head not in (HeadKind.auto, HeadKind.random)):
        kind = HeadKind.zeroshot if is_zeroshot else model.head
        problems.append(
            f"model.head_scale={model.head_scale:g} is for a random head, and this one is {kind}: add model.head=random"
        )
    return problems


def _source_problems(conf: Conf) -> list[str]:
    return data_problems(conf.data)


def _schedule_problems(conf: Conf) -> list[str]:
    sched = conf.sched
    # In units of steps the length of the run depends on the data; create_scheduler checks it again there.
    length = sched.cycle or (conf.train.epochs if sched.interval == Interval.epoch else 0)
    if sched.warmup_epochs and sched.interval == Interval.epoch:
        return [
            f"sched.warmup_epochs={sched.warmup_epochs:g}: with sched.interval=epoch say sched.warmup, in whole epochs;"
            " or use sched.interval=step"
        ]
    if sched.warmup_epochs and sched.warmup:
        return [
            f"sched.warmup={sched.warmup} and sched.warmup_epochs={sched.warmup_epochs:g} say the same: leave one out"
        ]
    if sched.warmup_epochs >= conf.train.epochs and not sched.cycle:
        return [
            f"sched.warmup_epochs={sched.warmup_epochs:g}: must be less than the run, train.epochs={conf.train.epochs}"
        ]
    if length > 0 and sched.warmup >= length:
        return [f"sched.warmup={sched.warmup}: must be less than the length of the curve, {length} {sched.interval}s"]
    return []
