"""What `bench.py` asks of the machine: seconds, memory, bf16, and how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_task import Task, our_model

from finetune.core.device import cpu_has_bf16, environment

STATUS = Path("/proc/self/status")


def has_bf16(device: str) -> bool:
    """Whether bf16 is fast here; elsewhere torch only imitates it, on old GPUs too."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()


@torch.inference_mode()
def matmul_peak(task: Task, dtype: torch.dtype) -> float:
    """FLOP/s of the four products of a block on a whole batch, each at its best of several calls."""
    model, preprocess = our_model(task, load=False, device="meta")
    net: Any = model.net
    width, hidden = net.embed_dim, net.blocks[0].mlp.fc1.out_features
    shape = net.patch_embed(torch.empty(1, 3, preprocess.size, preprocess.size, device="meta")).shape
    tokens = task.batch_size * (shape[1] + net.num_prefix_tokens)
    flop = seconds = 0.0
    for narrow, wide in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        left = torch.randn(tokens, narrow, device=task.device, dtype=dtype)
        right = torch.randn(wide, narrow, device=task.device, dtype=dtype)
        seconds += min(timed(lambda left=left, right=right: F.linear(left, right), task.device) for _ in range(20))  # type: ignore[misc]
        flop += 2.0 * tokens * narrow * wide
    return flop / seconds


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU the mean of ten, which it takes one after the other without a wait."""
    times = 1 if device == "cpu" else 10
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """MiB at the highest point within the block, and above its start; empty where that cannot be told.

    On a GPU what torch allocated. On Linux the memory of this process, without its workers', whose high-water mark is
    set back at the start; what earlier arms left behind (libraries, arenas) is in the peak and not in the rise.
    """
    found: dict[str, float] = {}
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        yield found
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
        found["rise"] = found["peak"] - before
        return
    if not STATUS.exists():
        yield found
        return
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        yield found
        return
    before = _status("VmRSS")
    yield found
    found["peak"] = _status("VmHWM")
    found["rise"] = found["peak"] - before


def _status(field: str) -> float:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def core_seconds() -> float:
    """Of this process and of the workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def describe(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    found = environment(device)
    half = "bf16 in hardware" if has_bf16("cpu") else "no bf16"
    threads = f"{torch.get_num_threads()} threads on {platform.machine()}"
    return f"{threads} ({found['processor']}, {half}), torch {torch.__version__}"
