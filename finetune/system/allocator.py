"""What glibc does with memory that is freed: kept for the next step of a training, or handed back to the system.

Every step on a CPU frees what the next one asks for again: activations and gradients. glibc gives pieces that large
back at once, and the system must then clear each page anew: 3 % of a ViT-B/32's step on one thread, and more of it on
several, since one of them clears for all. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Pieces from here on (caches, files) are handed back in any case.
KEPT_BYTES = 2**28
# As far as glibc goes by itself, once pieces so large were freed: twice that may lie free at the top. Older versions
# take no higher threshold for pieces.
OWN_BYTES = 2**25
MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees: about what was needed once, until it ends."""
    _set(KEPT_BYTES, MOST)


def hand_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: what is free goes back now, and what will be as far as glibc goes by itself."""
    libc = _set(OWN_BYTES, 2 * OWN_BYTES)
    if libc is not None:
        libc.malloc_trim(0)


def _set(piece: int, top: int) -> ctypes.CDLL | None:
    """Both thresholds, bytes; glibc itself, or None where it is another library."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    # Setting either ends glibc's own adaptation of both, so both are set, whatever this version takes.
    if not libc.mallopt(M_MMAP_THRESHOLD, piece):
        libc.mallopt(M_MMAP_THRESHOLD, OWN_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, top)
    return libc
