"""Loader processes: how many keep the device busy, and how they start and treat signals."""

import contextlib
import math
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.system.errors import UserError
from finetune.system.limits import in_bytes
from finetune.system.memory import hand_back_freed_memory
from finetune.system.processors import cores
from finetune.system.signals import STOPPING

MEASURED_S = 0.3  # how long `seconds_per_call` measures
DEVICE_RATE = 4000.0  # images a second that a fast device takes with a small model; it would not wait for more
SHARED = "/dev/shm"  # where Linux keeps the memory that processes share
BATCHES = 2  # that each process makes ahead of the training
MORE_SHARED = "data.workers=0 needs none; in Docker, --shm-size=8g gives more"
MIN_SHARE = 0.25  # of one core: below it a process of its own costs more than it gives


def pick_workers(cost_s: float, device: torch.device) -> int:
    """The number of loader processes for images that take `cost_s` seconds of one core each.

    On the CPU the model uses all cores itself: a few processes take what it leaves at the ends of its operations.
    """
    if device.type == "cpu":
        return 0 if cost_s < 1e-3 else min(2, cores() // 4)
    needed = cost_s * DEVICE_RATE
    return 0 if needed < MIN_SHARE else min(math.ceil(needed), cores(), 16)


def seconds_per_call(call: Callable[[int], object], count: int) -> float:
    """Mean seconds of `call(0)`, `call(1)`, ...: `count` calls (1 or more), or as many as take `MEASURED_S` seconds."""
    began = time.perf_counter()
    for number in range(count):
        call(number)
        seconds = time.perf_counter() - began
        if seconds > MEASURED_S:
            break
    return seconds / (number + 1)


def build_data_loader(dataset: Dataset[Any], keys: Sampler[Any], workers: int, device: torch.device) -> DataLoader[Any]:
    """A DataLoader whose items are `dataset[key]` for each of `keys`; its processes start with its first iterator."""
    return DataLoader(
        dataset,
        batch_size=None,  # a key asks for a whole batch already
        sampler=keys,
        num_workers=workers,
        prefetch_factor=BATCHES if workers else None,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        # DataLoader draws a seed for its workers, by default out of the training process's generator.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        # Stated because process pools that run sweeps (loky) put a context of their own in its place.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def why_not_shared(workers: int, batch_bytes: int) -> str | None:
    """Why `workers` processes cannot hand over batches of `batch_bytes` bytes; None where they can.

    Batches go through memory that processes share. Containers give little of it, 64 MiB by default in Docker.
    """
    if sys.platform != "linux" or not workers:
        return None
    try:
        multiprocessing.Lock()  # queues between processes use such locks, which lie there, too
        free = shutil.disk_usage(SHARED).free
    except OSError as error:
        return f"loader processes need shared memory, and {SHARED} cannot be used ({error.strerror or error})"
    needed = (BATCHES * workers + 1) * batch_bytes
    if needed <= free:
        return None
    who = "1 loader process needs" if workers == 1 else f"{workers:,} loader processes need"
    return f"{who} {in_bytes(needed)} of shared memory, {in_bytes(free)} are free in {SHARED}"


@contextlib.contextmanager
def worker_ends() -> Iterator[None]:
    """Turn torch's error about a loader process that the system ended into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a loader process was ended from outside, most likely because memory ran out:"
            " lower data.workers (0: no processes) or data.batch_size"
        ) from error


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Ignore stop signals, which the training process answers: it saves and then ends its workers.

    A terminal or a scheduler signals the whole group of processes, and a run whose workers die first could not save.
    Freed memory goes back to the system: else each worker would go on using the memory of the largest image.
    """
    hand_back_freed_memory()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block stop signals while workers start; the training process gets them right after.

    A worker inherits the blocked signals, so none reaches it between its start and `_start_worker`.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
