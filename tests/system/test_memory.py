"""Freed memory stays with the process, and goes back when that is asked for."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from finetune.system.memory import hand_back_freed_memory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # as a step does: large, soon free, asked for again; and two at once
        one, other = np.ones(30_000_000, np.float32), np.ones(3_000_000, np.float32)
        del one, other
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def pages():
    return int(open("/proc/self/statm").read().split()[1])

faults()
before = faults()
keep_freed_memory()
faults()
kept, resident = faults(), pages()
hand_back_freed_memory()
print(before, kept, resident - pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    """Counted are pages that the system had to clear."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, kept, handed_back = map(int, done.stdout.split())
    assert before > 10 * 30_000_000 * 4 / 2**21, "even huge pages are cleared one by one"
    assert kept < before / 20
    assert handed_back > 0.9 * 30_000_000 * 4 / resource.getpagesize()


LIMITED = """
import resource
from finetune.system.memory import free_memory
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, resource.RLIM_INFINITY))
print(free_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system says what is free")
def test_a_limit_of_the_process_counts() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert 2**25 < int(done.stdout) <= 2**26
