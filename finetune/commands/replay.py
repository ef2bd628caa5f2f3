"""A step that was not finite, seen again: which layer, and which image, gave the first NaN or infinity.

finetune replay outputs/<date>/<time> --step 12
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.app.build import Run, build_run
from finetune.config.words.saved import read_conf
from finetune.runs import bad_batch
from finetune.runs.weights import read_weights
from finetune.system.log import say
from finetune.system.terminal import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 where the step is bad again, 1 where it is not or nothing can be replayed."""
    parser = argparse.ArgumentParser(prog="finetune replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run directory that holds bad_batch/")
    parser.add_argument("--step", type=int, help="which step; left out: the first one stored")
    given = parser.parse_args(argv)
    lines, is_bad = replay(given.run_dir, given.step)
    say("\n".join(lines))
    return 0 if is_bad else 1


def replay(run_dir: Path, step: int | None = None) -> tuple[list[str], bool]:
    """Compute the stored step again, forward and backward, with the weights in `checkpoints/last.safetensors`.

    Of a run that stopped at the step these are the weights from before it; of one that skipped it, those of the latest
    end of an epoch.

    Returns:
        What was seen, a line each; whether loss or gradient were not finite again.

    Raises:
        FileNotFoundError: Nothing is stored, or the weights are gone.
        ValueError: A file is damaged.
    """
    folder = run_dir / bad_batch.FOLDER
    if step is None:
        steps = sorted(int(path.stem.partition("_")[2]) for path in folder.glob("step_*.pt"))
        if not steps:
            raise FileNotFoundError(f"{run_dir} has no stored batch: no step of it was not finite")
        step = steps[0]
    window = bad_batch.load(folder / f"step_{step}.pt")
    with tempfile.TemporaryDirectory() as scratch:  # lists of unreadable images are no business of the run's folder
        run = build_run(read_conf(run_dir), Path(scratch))
    run.model.net.load_state_dict(read_weights(run_dir / "checkpoints" / "last.safetensors")[0])
    return _compute(run, step, window)


def _compute(run: Run, step: int, window: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[str], bool]:
    model, lines = run.model.train(), [f"step {step}: {sum(len(images) for images, _ in window)} images"]
    criterion, is_bad = run.criterion(), False
    for number, (images, targets) in enumerate(window):
        images, targets = images.to(run.device), targets.to(run.device)
        lines += [f"micro-batch {number}, {line}" for line in _first_bad_layer(run, images)]
        with run.autocast():
            logits = model(images)
        losses = criterion(logits, targets, run.conf.train.label_smoothing)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        is_bad |= bool(bad)
        shown = f"not finite for images {bad}" if bad else f"{losses.mean():.4g}"
        lines.append(f"micro-batch {number}, loss: {shown}")
    for name, parameter in model.net.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            lines.append(f"gradient of {printable(name)}: not finite")
            is_bad = True
    if not is_bad:
        lines.append("loss and gradients are finite this time")
    return lines, is_bad


@torch.no_grad()
def _first_bad_layer(run: Run, images: Tensor) -> list[str]:
    """The input, or the first layer, whose values are not finite."""
    if not torch.isfinite(images).all():
        return ["the images themselves hold values that are not finite"]
    found: list[str] = []
    if not run.model.is_chain:
        return found
    for index, layer in enumerate(run.model.layers):
        with run.autocast():
            values = run.model(images, stop=index + 1)
        if isinstance(values, Tensor) and not torch.isfinite(values).all():
            return [f"first values that are not finite: out of {layer.name}"]
    return found
