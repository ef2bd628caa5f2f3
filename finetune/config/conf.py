"""`Conf`, every setting of a run, and `find_problems`, which checks the ranges and the rules between settings.

Each section has a file of its own with its defaults, ranges, meanings and rules. The schema owns every default; the
yaml files under `conf/` hold choices. Standard library only, so that a typing mistake is answered at once.
"""

import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from finetune.config.augment import AugmentConf, augment_problems, mixing_problems
from finetune.config.data import DataConf, data_problems, device_cache_problems
from finetune.config.fields import BOUNDS, Choice, nearest, setting
from finetune.config.model import HeadKind, ModelConf, model_problems
from finetune.config.optim import OptimConf, optim_problems
from finetune.config.prefix import PrefixConf, prefix_problems
from finetune.config.sched import SchedulerConf, sched_problems
from finetune.config.train import TrainConf, train_problems


class Precision(Choice):
    """The number format of the forward and backward passes; the weights that the optimizer updates are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


# The settings that a run chooses by its images and weights where they are `auto`, as they are by default: app/rule.py.
RULED = ("train.epochs", "data.batch_size", "optim.lr", "optim.layer_decay", "sched.warmup")
AUTO = "auto"
CHOSEN = (*RULED, "model.head")  # whose own word `auto` leaves it to be chosen
SMALLEST = sys.float_info.min  # of a number other than 0: smaller ones lose digits, and their inverse is infinite
MAX_INT = 2**31 - 1  # of a whole number that has no bound of its own: nothing is counted in more


@dataclass
class Conf:
    """One run.

    Attributes:
        auto: Those of `RULED` that are still to be chosen; until then they have their defaults.
        chosen: The settings that the run has chosen, by dotted key; they have the numbers that it chose.
    """

    seed: int = setting(0, "seed of everything random but the split", ge=0, le=2**63 - 1)
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
    auto: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)

    @property
    def open(self) -> list[str]:
        """The settings that are still to be chosen."""
        return [*self.auto, *(["model.head"] if self.model.head == HeadKind.auto else [])]

    def choose(self, values: Mapping[str, Any]) -> "Conf":
        """A copy with values that the run has chosen, by dotted key; of the settings that are not `open`, none."""
        taken = {name: value for name, value in values.items() if name in self.open}
        conf = self.with_values(taken)
        conf.chosen = [name for name in CHOSEN if name in (*self.chosen, *taken)]
        return conf

    def with_values(self, values: Mapping[str, Any]) -> "Conf":
        """A copy with these values, by dotted key; none of them is left to be chosen."""
        conf = copy.deepcopy(self)
        for name, value in values.items():
            section, _, last = name.rpartition(".")
            setattr(getattr(conf, section) if section else conf, last, value)
        conf.auto = [name for name in self.auto if name not in values]
        return conf


def as_dict(conf: object) -> dict[str, Any]:
    """A configuration in plain types, as `config.yaml` in a run directory has it: enums as words, tuples as lists.

    What is still to be chosen is the word `auto`; what a run has chosen is named under `chosen`, if there is any.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(conf)))  # type: ignore[call-overload]
    if isinstance(conf, Conf):
        for name in plain.pop("auto"):
            section, _, last = name.partition(".")
            plain[section][last] = AUTO
        if not plain["chosen"]:
            del plain["chosen"]
    return plain


def leaves(conf: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every setting of a configuration as (dotted key, the section that it stands in, its field there)."""
    for item in dataclasses.fields(conf):  # type: ignore[arg-type]
        value = getattr(conf, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        elif item.metadata:  # without any, it is no setting
            yield f"{prefix}{item.name}", conf, item


# Settings that are places, by dotted key: a run that continues may find the same data or weights elsewhere.
PLACES: tuple[str, ...] = tuple(name for name, _, item in leaves(Conf()) if item.metadata["place"])


def range_in_words(metadata: Any) -> str:
    """`at least 0 and less than 1`; empty for a setting without a range."""
    return " and ".join(f"{words} {metadata[name]:g}" for name, (words, _) in BOUNDS.items() if name in metadata)


def _range_problem(key: str, value: Any, metadata: Any) -> str | None:
    """Why `value` lies outside the range of its setting, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and value > metadata.get("le", MAX_INT):
        return f"{key}={_short(value)}: must be at most {metadata.get('le', MAX_INT):,} ({metadata['help']})"
    if isinstance(value, float) and 0 < abs(value) < SMALLEST:
        return f"{key}={value}: must be 0, or {SMALLEST:.2g} or more away from it ({metadata['help']})"
    is_inside = all(holds(value, metadata[name]) for name, (_, holds) in BOUNDS.items() if name in metadata)
    if is_inside and math.isfinite(value):
        return None
    return f"{key}={_short(value)}: must be {range_in_words(metadata) or 'a finite number'} ({metadata['help']})"


def _short(value: float) -> str:
    """A number as it was given; a whole number of more than 20 digits in the form `1.0e+25`."""
    return f"{Decimal(value):.1e}" if isinstance(value, int) and abs(value) >= 10**20 else str(value)


def find_problems(conf: Conf, unread: Collection[str] = ()) -> list[str]:
    """Every problem that the configuration alone can show, one line each; an empty list where there is none.

    The model and the files can show more: a `fix_layer` beyond the depth, a missing folder. A run checks those. No rule
    between settings looks at the sections `unread`, of which some value could not be read, nor at a section with a
    setting outside its range, so that one mistake is not reported twice. A run checks again what it has chosen.
    """
    problems, unread = [], set(unread)
    batch_size = 0 if "data.batch_size" in conf.auto else conf.data.batch_size
    epochs = MAX_INT if "train.epochs" in conf.auto else conf.train.epochs  # as long as any schedule may want
    for key, section, item in leaves(conf):
        if problem := _range_problem(key, getattr(section, item.name), item.metadata):
            problems.append(problem)
            unread.add(key.partition(".")[0])
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", conf.device):
        words = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        problems.append(f"device={conf.device}: expected auto, cpu, cuda, cuda:N or mps{nearest(conf.device, words)}")
    if conf.resume_force and conf.resume is None:
        problems.append("resume_force=true would be ignored: it goes with resume=PATH, or resume=latest")
    rules: list[tuple[tuple[str, ...], Callable[[], list[str]]]] = [
        (("model",), lambda: model_problems(conf.model)),
        (("data",), lambda: data_problems(conf.data)),
        (("optim",), lambda: optim_problems(conf.optim)),
        (("augment",), lambda: augment_problems(conf.augment)),
        (("data", "augment"), lambda: device_cache_problems(conf.data, conf.augment.recipe)),
        (("data", "augment"), lambda: mixing_problems(conf.augment, batch_size)),
        (("train",), lambda: train_problems(conf.train)),
        (("prefix", "optim"), lambda: prefix_problems(conf.prefix, conf.optim)),
        (("sched", "train"), lambda: sched_problems(conf.sched, epochs)),
    ]
    for sections, rule in rules:
        if unread.isdisjoint(sections):
            problems += rule()
    return problems
