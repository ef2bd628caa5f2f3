"""Every setting of a run: its name, default, range and meaning.

One file a section (model, data, optim, sched, augment, prefix, train), put together in `conf.py`, which also finds
settings that do not go together. `words/` turns what a person typed into a `Conf`; Hydra lives there alone. This room
imports the room `system` only, and outside `words/` the standard library only. Read `conf.py` first.
"""

from finetune.config.augment import AugmentConf, Interpolation, Policy, Recipe, mixing_problems
from finetune.config.conf import PLACES, RULED, Conf, Precision, as_dict, find_problems
from finetune.config.data import Balance, CacheKind, DataConf, OnError, Resize, SourceKind
from finetune.config.environment import recorded
from finetune.config.fields import Choice, member_of, nearest, setting
from finetune.config.model import Family, HeadKind, Library, ModelConf, Pool, TemplateSet
from finetune.config.optim import OPTIMIZER_READERS, OPTIMIZERS, LayerRule, OptimConf
from finetune.config.prefix import PrefixCache, PrefixConf, PrefixDtype
from finetune.config.sched import Interval, Mode, PastCycle, SchedulerConf
from finetune.config.train import (
    LABEL_METRICS,
    MULTILABEL_METRICS,
    ClassTokenOnly,
    CompileMode,
    Loss,
    OnNonfinite,
    TrainConf,
    measured_metrics,
    train_problems,
    without_val_problems,
)  # fmt: skip

__all__ = [
    "LABEL_METRICS",
    "MULTILABEL_METRICS",
    "OPTIMIZERS",
    "OPTIMIZER_READERS",
    "PLACES",
    "RULED",
    "AugmentConf",
    "Balance",
    "CacheKind",
    "Choice",
    "ClassTokenOnly",
    "CompileMode",
    "Conf",
    "DataConf",
    "Family",
    "HeadKind",
    "Interpolation",
    "Interval",
    "LayerRule",
    "Library",
    "Loss",
    "Mode",
    "ModelConf",
    "OnError",
    "OnNonfinite",
    "OptimConf",
    "PastCycle",
    "Policy",
    "Pool",
    "Precision",
    "PrefixCache",
    "PrefixConf",
    "PrefixDtype",
    "Recipe",
    "Resize",
    "SchedulerConf",
    "SourceKind",
    "TemplateSet",
    "TrainConf",
    "as_dict",
    "find_problems",
    "measured_metrics",
    "member_of",
    "mixing_problems",
    "nearest",
    "recorded",
    "setting",
    "train_problems",
    "without_val_problems",
]  # fmt: skip
