"""The processors that this process may use, and work in a thread on each."""

import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def cores() -> int:
    """Processors that this process may use; a cluster job often gets a few of the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name as Linux gives it; elsewhere its architecture, such as `arm64`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def map_in_threads(work: Callable[[_Given], _Made], items: Iterable[_Given]) -> Iterator[_Made]:
    """`map(work, items)` with a thread for each core; at most two items a thread are taken ahead of the results."""
    threads, items = min(16, cores()), iter(items)
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(work, item) for item in islice(items, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in islice(items, 1))
