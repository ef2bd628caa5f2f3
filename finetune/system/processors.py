"""How many processors this process may use."""

from __future__ import annotations

import os
import sys


def cores() -> int:
    """Those that the scheduler gives to this process, where it tells; a cluster job has a few of many."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
