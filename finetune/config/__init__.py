"""Every setting of a run: its name, default, range and meaning.

One file a section (model, data, optim, sched, augment, prefix, train), put together in `conf.py`, which also finds
settings that do not go together. `words/` turns what a person typed into a `Conf`; Hydra lives there alone. This room
imports the room `system` only, and outside `words/` the standard library only. Read `conf.py` first.
"""

from __future__ import annotations

from finetune.config.augment import AugmentConf as AugmentConf
from finetune.config.augment import Policy as Policy
from finetune.config.augment import Recipe as Recipe
from finetune.config.conf import Conf as Conf
from finetune.config.conf import Family as Family
from finetune.config.conf import HeadKind as HeadKind
from finetune.config.conf import Interval as Interval
from finetune.config.conf import Library as Library
from finetune.config.conf import Mode as Mode
from finetune.config.conf import ModelConf as ModelConf
from finetune.config.conf import PastCycle as PastCycle
from finetune.config.conf import Pool as Pool
from finetune.config.conf import Precision as Precision
from finetune.config.conf import SchedulerConf as SchedulerConf
from finetune.config.conf import TemplateSet as TemplateSet
from finetune.config.conf import as_dict as as_dict
from finetune.config.conf import settings as settings
from finetune.config.conf import validate as validate
from finetune.config.data import Balance as Balance
from finetune.config.data import CacheKind as CacheKind
from finetune.config.data import DataConf as DataConf
from finetune.config.data import OnError as OnError
from finetune.config.data import SourceKind as SourceKind
from finetune.config.fields import Choice as Choice
from finetune.config.fields import choose as choose
from finetune.config.fields import nearest as nearest
from finetune.config.fields import setting as setting
from finetune.config.optim import LayerRule as LayerRule
from finetune.config.optim import OptimConf as OptimConf
from finetune.config.optim import OptimizerKind as OptimizerKind
from finetune.config.prefix import PrefixCache as PrefixCache
from finetune.config.prefix import PrefixConf as PrefixConf
from finetune.config.prefix import PrefixDtype as PrefixDtype
from finetune.config.train import LABEL_METRICS as LABEL_METRICS
from finetune.config.train import MULTILABEL_METRICS as MULTILABEL_METRICS
from finetune.config.train import ClassTokenOnly as ClassTokenOnly
from finetune.config.train import CompileMode as CompileMode
from finetune.config.train import Loss as Loss
from finetune.config.train import OnNonfinite as OnNonfinite
from finetune.config.train import TrainConf as TrainConf
from finetune.config.train import measured_metrics as measured_metrics
from finetune.config.train import train_problems as train_problems
