"""Fine-tune CLIP and ViT with every learning rate accounted for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune.config import SchedulerConf
    from finetune.core.sched import create_scheduler
    from finetune.models.param_groups import param_groups_lrd
    from finetune.use.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["SchedulerConf", "create_scheduler", "load", "param_groups_lrd"]

_HOMES = {
    "SchedulerConf": "finetune.config",
    "create_scheduler": "finetune.core.sched",
    "param_groups_lrd": "finetune.models.param_groups",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import finetune` must not cost the import of torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")


def load(
    source: "str | Path", *, device: str = "auto", precision: str = "auto", classes: "Sequence[str] | None" = None
) -> "Predictor":
    """The model of a run, ready to predict; see `finetune.use.loading.load`. Torch is imported by this call."""
    loading = importlib.import_module("finetune.use.loading")
    predictor: Predictor = loading.load(source, device=device, precision=precision, classes=classes)
    return predictor
