"""Memory of this process: how much it may take, and whether the pieces that it frees go back to the system.

Every step on a CPU frees activations and gradients of the same sizes as the next step needs. glibc gives such large
pieces back to the system at once, and the system must clear each page anew: 3 % of a ViT-B/32's step on one thread,
and more on several, since one thread clears for all. Other C libraries are left as they are.
"""

import ctypes
import platform
import sys
from pathlib import Path

if sys.platform != "win32":  # which has no limit of this kind
    import resource

CGROUP = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RETURNED_BYTES = 2**28  # larger pieces, such as caches and files, go back in any case
# The highest threshold that glibc sets by itself, and the highest that its older versions accept.
DEFAULT_BYTES = 2**25


def free_memory() -> int | None:
    """Bytes that this process can take without swapping; None where that is unknown.

    Machine, container and the limit of the process itself (`ulimit -v`) count.
    """
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limits = (_free_in_container(), _free_of_process())
    return min([*known, *(free for free in limits if free is not None)], default=None)


def _free_in_container() -> int | None:
    """Bytes that a memory limit (cgroup v2) leaves; file pages that can be dropped count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(pages.get("inactive_file", 0)))


def _free_of_process() -> int | None:
    """Bytes of addresses that a limit of this process leaves; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return max(0, limit - taken)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, until `hand_back_freed_memory` or its end."""
    _set_thresholds(RETURNED_BYTES, 2**31 - 1)


def hand_back_freed_memory() -> None:
    """Return free memory to the system now, and set glibc's usual thresholds again."""
    libc = _set_thresholds(DEFAULT_BYTES, 2 * DEFAULT_BYTES)
    if libc is not None:
        libc.malloc_trim(0)


def _set_thresholds(piece: int, top: int) -> ctypes.CDLL | None:
    """Set the bytes above which a piece, and the heap's free top, go back; returns glibc, or None elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    # Setting either threshold ends glibc's own adaptation of both, so both are set, whatever this version accepts.
    if not libc.mallopt(M_MMAP_THRESHOLD, piece):
        libc.mallopt(M_MMAP_THRESHOLD, DEFAULT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, top)
    return libc
