"""Fine-tune CLIP and ViT with every learning rate accounted for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config import SchedulerConf
    from finetune.lrd import param_groups_lrd
    from finetune.sched import create_scheduler

__version__ = "0.1.0"
__all__ = ["SchedulerConf", "create_scheduler", "param_groups_lrd"]

_HOMES = {
    "SchedulerConf": "finetune.config",
    "create_scheduler": "finetune.sched",
    "param_groups_lrd": "finetune.lrd",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import finetune` must not cost the import of torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")
