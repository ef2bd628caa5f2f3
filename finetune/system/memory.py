"""Memory of this process: how much may be taken, and whether freed pieces go back to the system.

Every step on a CPU frees what the next step asks for again: activations and gradients. glibc gives pieces that large
back to the system at once, and the system must then clear each page anew. That costs 3 % of a ViT-B/32's step on one
thread, and more on several, since one thread clears for all. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Bytes from which on a piece goes back in any case: caches, files.
RETURNED_BYTES = 2**28
# glibc's own highest threshold, which it reaches after it has freed a piece of this size. Older versions accept no
# higher one. Twice as much may lie free at the top of the heap.
DEFAULT_BYTES = 2**25
MOST = 2**31 - 1


def free_memory() -> int | None:
    """Bytes that may be taken without swapping, by machine and container; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    known = [number for number in (_free_in_machine(), _free_in_container()) if number is not None]
    return min(known, default=None)


def _free_in_machine() -> int | None:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _free_in_container() -> int | None:
    """Bytes that a memory limit (cgroup v2) leaves; file pages that can be dropped count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(pages.get("inactive_file", 0)))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, until `hand_back_freed_memory` or its end."""
    _set_thresholds(RETURNED_BYTES, MOST)


def hand_back_freed_memory() -> None:
    """Return free memory to the system now, and set glibc's own thresholds again."""
    libc = _set_thresholds(DEFAULT_BYTES, 2 * DEFAULT_BYTES)
    if libc is not None:
        libc.malloc_trim(0)


def _set_thresholds(piece: int, top: int) -> ctypes.CDLL | None:
    """Set from how many bytes on a piece, and the heap's free top, go back; returns glibc, None for another library."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    # Setting either threshold ends glibc's own adaptation of both, so both are set, whatever this version accepts.
    if not libc.mallopt(M_MMAP_THRESHOLD, piece):
        libc.mallopt(M_MMAP_THRESHOLD, DEFAULT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, top)
    return libc
