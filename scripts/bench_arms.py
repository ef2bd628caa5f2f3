"""The loops that `bench.py` compares: a plain one, the same with every flag turned right, and this project's run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from bench_task import Task, first_model, freeze_and_group, linear, loaders, our_model
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.app import training
from finetune.app.run import run
from finetune.core.loop import FiniteGuard
from finetune.core.optim import build_optimizer
from finetune.prefix.sweep_memory import shared_between_runs
from finetune.runs.history import OF_THE_CLOCK, History
from finetune.system.memory import hand_back_freed_memory


@dataclass
class Outcome:
    """What an arm leaves: the mean loss of every training step, and the file with its final weights.

    Ours also what its history says of the speed of the last epoch.
    """

    losses: list[float]
    checkpoint: Path
    last_epoch: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flags:
    """How the arms run, beside the task.

    Attributes:
        folder: For checkpoints; an empty one every time.
        workers: Of the loops that are not ours; ours measures its own number.
        same_pixels: The other arms decode and resize with this project's code, for parity.
        compiled: The tuned loop runs `torch.compile`d.
    """

    folder: Path
    workers: int = 0
    same_pixels: bool = False
    compiled: bool = False


def plain(task: Task, flags: Flags) -> Outcome:
    """What people write: fp32, AdamW as it comes, one group a parameter, the loss read at every step."""
    net = first_model(task)
    groups = freeze_and_group(net, task, merged=False)
    optimizer = torch.optim.AdamW(groups, lr=task.lr)
    scheduler = linear(optimizer, task.epochs)
    train, val = loaders(task, workers=flags.workers, same_pixels=flags.same_pixels, pin=False)
    losses = []
    for epoch in range(task.epochs):
        net.train()
        train.sampler.epoch = epoch  # type: ignore[attr-defined]
        for images, labels in train:
            images, labels = images.to(task.device), labels.to(task.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        net.eval()
        total = correct = 0.0
        with torch.no_grad():
            for images, labels in val:
                images, labels = images.to(task.device), labels.to(task.device)
                logits = net(images)
                total += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += (logits.argmax(1) == labels).sum().item()
        scheduler.step()
    path = flags.folder / "last.pt"
    torch.save(net.state_dict(), path)
    return Outcome(losses, path)


def tuned(task: Task, flags: Flags) -> Outcome:
    """The same loop with every flag turned right: autocast, fused AdamW, groups merged, no wait for the device."""
    device = torch.device(task.device)
    on_gpu = device.type == "cuda"
    net = first_model(task)
    optimizer = torch.optim.AdamW(freeze_and_group(net, task, merged=True), lr=task.lr, fused=True)
    scheduler = linear(optimizer, task.epochs)
    train, val = loaders(task, workers=flags.workers, same_pixels=flags.same_pixels, pin=on_gpu)
    forward: Any = torch.compile(net) if flags.compiled else net
    losses: list[Tensor] = []
    for epoch in range(task.epochs):
        net.train()
        train.sampler.epoch = epoch  # type: ignore[attr-defined]
        for images, labels in train:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with half(task):
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        net.eval()
        total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        with torch.inference_mode():
            for images, labels in val:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with half(task):
                    logits = forward(images)
                total += F.cross_entropy(logits.float(), labels, reduction="sum")
                correct += (logits.argmax(1) == labels).sum()
        scheduler.step()
        (total + correct).item()
    path = flags.folder / "last.pt"
    torch.save(net.state_dict(), path)
    return Outcome(torch.stack(losses).tolist(), path)


def ours(task: Task, flags: Flags) -> Outcome:
    """`python -m finetune`, from the composition of its command line on, in this process and with a cold cache."""
    run_dir = flags.folder / "run"
    run_dir.mkdir()
    with _cold_caches(), _recorded() as losses, _allocator_handed_back():
        run(task.conf(), run_dir, task.overrides(), quiet=True)
    row = History(run_dir / "history.jsonl").rows()[-1]
    speed = {name: row[name] for name in OF_THE_CLOCK if name in row}
    return Outcome(torch.stack(losses).tolist(), run_dir / "checkpoints" / "last.safetensors", speed)


def sweep_of(arm: Any, decays: tuple[float, ...]) -> Any:
    """An arm that runs once for every `layer_decay`; ours with one cache for all of them, as in a sweep."""

    def all_of_them(task: Task, flags: Flags) -> Outcome:
        losses: list[float] = []
        with _cold_caches(), shared_between_runs():
            for number, decay in enumerate(decays):
                folder = flags.folder / str(number)
                folder.mkdir()
                outcome = arm(replace(task, layer_decay=decay), replace(flags, folder=folder))
                losses += outcome.losses
        return Outcome(losses, outcome.checkpoint)

    return all_of_them


def optimizers(task: Task) -> list[dict[str, Any]]:
    """AdamW over the same parameters with the same gradients: torch's default loop, fused, and this project's own.

    Ours is what a run builds, stepped as a run steps it: by the guard, whose mask the kernels read. The norm of the
    gradients, by which a run sets that mask, is no part of the step.
    """
    model, _ = our_model(task, load=False, device=task.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3

    def arm(way: str, loop: str, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> dict[str, Any]:
        name = f"{way}, {len(optimizer.param_groups)} groups"
        return {"name": name, "loop": loop, "precision": "fp32", "optimizer": optimizer, "step": step, "seconds": []}

    made = []
    for way, loop, fused, merged in (
        ("torch's default", "plain", None, False),
        ("torch's default", "plain", None, True),
        ("fused", "tuned", True, False),
    ):
        groups = freeze_and_group(model.net, task, merged=merged)
        optimizer = torch.optim.AdamW(groups, lr=task.lr, fused=fused)
        made.append(arm(way, loop, optimizer, optimizer.step))
    own = build_optimizer(model, task.conf().optim)
    guard = FiniteGuard(model, torch.device(task.device))
    return [*made, arm("ours", "ours", own, lambda: guard.step(own))]


def half(task: Task) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass."""
    if task.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(task.device).type, dtype=torch.bfloat16)


@contextlib.contextmanager
def _cold_caches() -> Iterator[None]:
    """Nothing is remembered of runs before this one; a second call within the first changes nothing."""
    if "BENCH_CACHE" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache, BENCH_CACHE=cache):
        yield


@contextlib.contextmanager
def _allocator_handed_back() -> Iterator[None]:
    """What our run settles of glibc's allocator is its own doing: the other arms go on with what glibc grows to."""
    try:
        yield
    finally:
        hand_back_freed_memory()


@contextlib.contextmanager
def _recorded() -> Iterator[list[Tensor]]:
    """The mean loss of every training step of our run, by a criterion that also writes down what it gives."""
    losses: list[Tensor] = []
    fit = training.fit

    def recording(state: Any, *args: Any, **kwargs: Any) -> bool:
        criterion = state.criterion

        def recorded(*given: Any) -> Tensor:
            values = criterion(*given)
            losses.append(values.detach().mean())
            return values

        state.criterion = recorded
        return fit(state, *args, **kwargs)

    with mock.patch.object(training, "fit", recording):
        yield losses


@torch.inference_mode()
def final_logits(task: Task, outcome: Outcome) -> Tensor:
    """Logits (images, classes) of the validation images under the final weights, fp32, from the same pixels always."""
    state = (
        load_file(outcome.checkpoint)
        if outcome.checkpoint.suffix == ".safetensors"
        else torch.load(outcome.checkpoint, map_location="cpu")
    )
    net: nn.Module = first_model(task)
    net.load_state_dict(state)
    net.eval()
    _, val = loaders(task, workers=0, same_pixels=True, pin=False)
    return torch.cat([net(images.to(task.device)).cpu() for images, _ in val])
