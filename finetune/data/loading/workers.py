"""Loader processes: how many keep the device busy, and how they start and treat signals."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune.system.memory import hand_back_freed_memory
from finetune.system.processors import cores
from finetune.system.signals import STOPPING

MEASURED_S = 0.3  # how long `seconds_per_call` measures
DEVICE_RATE = 4000.0  # images a second that a fast device takes with a small model; it would not wait for more
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
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        # DataLoader draws a seed for its workers, by default out of the training process's generator.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        # Stated because process pools that run sweeps (loky) put a context of their own in its place.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


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
