"""How much memory may be taken."""

from __future__ import annotations

import sys
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that may be taken without swapping, by machine and container; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    known = [number for number in (_of_the_machine(), _of_the_container()) if number is not None]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    """What a memory limit (cgroup v2) leaves; file pages that can be dropped count as free."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        pages = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(pages.get("inactive_file", 0)))
