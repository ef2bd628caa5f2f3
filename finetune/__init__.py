"""Fine-tune CLIP and ViT with every learning rate accounted for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config import SchedulerConf
    from finetune.core.sched import create_scheduler
    from finetune.models.param_groups import param_groups_lrd

__version__ = "0.1.0"
__all__ = ["SchedulerConf", "create_scheduler", "param_groups_lrd"]

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
