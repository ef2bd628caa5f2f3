"""Computes a stored step again that was not finite, to find the layer and the image of the first NaN or infinity."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from finetune.app.build import Run, build_run
from finetune.config import Conf
from finetune.core.freezing import set_up_layers
from finetune.core.layers import LayeredModel
from finetune.runs import bad_batch
from finetune.runs.finished import LAST_WEIGHTS, compare_with_result
from finetune.runs.records import read_result
from finetune.runs.weights import read_weights
from finetune.system.terminal import counted, printable


def replay(conf: Conf, run_dir: Path, step: int | None = None) -> tuple[list[str], bool]:
    """Run a stored step forward and backward again, with the weights in `checkpoints/last.safetensors`.

    If the run stopped at the step, these are the weights from before it. If it skipped the step, they are the weights
    of the last epoch that was saved. Without a `step` it is the first one stored. Returns the findings, a line each,
    and whether the loss or a gradient was not finite again.

    Raises:
        FileNotFoundError: The step is not stored, or the weights are gone.
        UserError: A file is damaged.
    """
    step, window = bad_batch.load(run_dir, step)
    if (run_dir / "result.json").exists():  # a run that was killed had no time to write checksums into it
        compare_with_result(run_dir, LAST_WEIGHTS, read_result(run_dir / "result.json"))
    with tempfile.TemporaryDirectory() as scratch:  # for the list of unreadable images, so that the run's own stays
        run = build_run(conf, Path(scratch), is_begun=True)
    set_up_layers(run.model, conf.optim, train=conf.train)
    run.model.net.load_state_dict(read_weights(run_dir / LAST_WEIGHTS)[0])
    lines, is_bad = _compute(run, window)
    return [f"step {step}: {counted(sum(len(images) for images, _ in window), 'image')}", *lines], is_bad


def _compute(run: Run, window: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[str], bool]:
    model, criterion = run.model.train(), run.criterion()
    lines: list[str] = []
    is_bad = False
    for number, (images, targets) in enumerate(window):
        images, targets = images.to(run.device), targets.to(run.device)
        lines += [f"micro-batch {number}, {line}" for line in _first_bad_layer(model, images, run.autocast())]
        with run.autocast():
            logits = model(images)
        losses = criterion(logits, targets, run.conf.train.label_smoothing)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        is_bad |= bool(bad)
        loss = f"not finite for images {bad}" if bad else f"{losses.mean():.4g}"
        lines.append(f"micro-batch {number}, loss: {loss}")
    for name, parameter in model.net.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            lines.append(f"gradient of {printable(name)}: not finite")
            is_bad = True
    return (lines if is_bad else [*lines, "loss and gradients are finite this time"]), is_bad


@torch.no_grad()
def _first_bad_layer(model: LayeredModel, images: Tensor, autocast: AbstractContextManager[object]) -> list[str]:
    """A line that names the images, or the first layer, whose values are not finite; no line if all are finite."""
    if not torch.isfinite(images).all():
        return ["the images themselves hold values that are not finite"]
    for index, layer in enumerate(model.layers if model.is_chain else []):
        with autocast:
            values = model(images, stop=index + 1)
        if isinstance(values, Tensor) and not torch.isfinite(values).all():
            return [f"first values that are not finite: out of {layer.name}"]
    return []
