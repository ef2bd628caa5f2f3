"""Compares an exported folder with the model it was made of: on real images, by the upstream library alone."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.data.images.transforms import fit_square
from finetune.data.loading.batches import in_channels, normalise
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.terminal import counted, printable
from finetune.use.predictor import Predictor

IMAGES = 64  # that are compared
MOST_BYTES = 2**28  # of their pixels, together
LIMIT = 1e-4  # largest difference of scores of equal pixels; where scores are above 1, that share of the largest one
# Pillow and torch round a resized pixel differently now and then: by 1 of 255, or by 2 where an edge overshoots, and in
# less than 1 % of the pixels. Another size, crop, interpolation or mean differs by more in one of these two numbers.
MOST_LEVELS, MEAN_LEVEL = 2.1, 0.05
BATCH = 16
SCRIPT = Path(__file__).with_name("fresh.py")


@dataclass(frozen=True)
class Checked:
    """How far an export is from its model."""

    images: int
    where: str  # the images come from
    numbers: float  # largest difference of the scores of equal pixels
    scores: float  # largest difference of scores, by the preprocessing of the upstream library
    probabilities: float  # likewise
    levels: float  # largest difference of prepared pixels, in levels of 255
    mean_level: float  # the mean of these differences
    changed: int  # images whose most probable class, or set of labels, is another
    differs: str  # what is above the limit: numbers, preprocessing, or empty

    def __str__(self) -> str:
        """In a sentence."""
        apart = f"scores of equal pixels differ by at most {self.numbers:.0e}; with its own preprocessing"
        apart += f" pixels by {self.levels:.0f} of 255 ({self.mean_level:.4f} on average), scores by {self.scores:.0e}"
        changed = f"probabilities by {self.probabilities:.0e}, and {counted(self.changed, 'prediction')} changed"
        return f"{counted(self.images, 'image')} of {self.where}: {apart}, {changed}"


def check(folder: Path, predictor: Predictor, split: Split, where: str) -> Checked:
    """Run the program in the folder's README in a fresh process, and compare its scores with those of `predictor`.

    Raises:
        ImageError: An image cannot be read.
        UserError: The program fails.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        ours = _store_images(split, predictor, work)
        (work / "program.py").write_text(_program_in(folder / "README.md"), encoding="utf-8")
        _run(folder, work)
        theirs, scores = (
            torch.from_numpy(np.load(work / f"{name}.npy", allow_pickle=False)) for name in ("pixels", "scores")
        )
    return _compared(predictor, ours, theirs, scores, where)


def _store_images(split: Split, predictor: Predictor, work: Path) -> Tensor:
    """Write images of the split, evenly spread, for the fresh process; what the network reads of them."""
    fitted, used = [], 0
    for number, index in enumerate(torch.linspace(0, len(split) - 1, min(IMAGES, len(split))).long().tolist()):
        image = split.load(index)
        used += image.numel()
        if used > MOST_BYTES and number:
            break
        np.save(work / f"{number}.npy", image.permute(1, 2, 0).contiguous().numpy())
        fitted.append(fit_square(image, predictor.preprocess))
    preprocess = predictor.preprocess
    mean, std = torch.tensor((preprocess.mean, preprocess.std), dtype=torch.float32)[:, :, None, None]
    return in_channels(normalise(torch.stack(fitted), mean, std), preprocess.channels)


def _program_in(readme: Path) -> str:
    """The program in the README that this package wrote a moment ago."""
    found = re.search(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{readme} has no program"
    return found[1]


def _run(folder: Path, work: Path) -> None:
    # Isolated: no PYTHONPATH, no user's packages, no current folder; nothing asks a network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", str(SCRIPT), str(folder), str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Warning)?: ", line)]
        reason = printable((lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1])[:500]
        raise UserError(f"the exported folder cannot be loaded by its own library: {reason}; nothing was written")


def _compared(predictor: Predictor, ours: Tensor, theirs: Tensor, scores: Tensor, where: str) -> Checked:
    """`ours` and `theirs` are pixels of the same images; `scores` are the upstream library's of its own pixels."""
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape[1:])}, expected {tuple(ours.shape[1:])}"
        raise UserError(f"the exported folder makes pixels {shapes}; nothing was written")
    wanted, same = _scores(predictor, ours), _scores(predictor, theirs)
    if scores.shape != wanted.shape or not scores.isfinite().all():
        shapes = f"{tuple(scores.shape[1:])}, expected {tuple(wanted.shape[1:])}"
        raise UserError(f"the exported folder gives scores {shapes} or no numbers; nothing was written")
    std = torch.tensor(predictor.preprocess.std)[: ours.shape[1], None, None]
    levels = ((theirs - ours) * std).abs() * 255
    most, mean = float(levels.max()), float(levels.mean())
    numbers, apart = float((scores - same).abs().max()), float((scores - wanted).abs().max())
    several = predictor.threshold is not None
    before, after = (logits.sigmoid() if several else logits.softmax(dim=1) for logits in (wanted, scores))
    if predictor.threshold is not None:
        changed = ((before >= predictor.threshold) != (after >= predictor.threshold)).any(dim=1)
    else:
        changed = before.argmax(dim=1) != after.argmax(dim=1)
    differs = "preprocessing" if most > MOST_LEVELS or mean > MEAN_LEVEL else ""
    if numbers > LIMIT * max(1.0, float(same.abs().max())):
        differs = "numbers"
    probabilities = float((after - before).abs().max())
    return Checked(len(wanted), where, numbers, apart, probabilities, most, mean, int(changed.sum()), differs)


@torch.inference_mode()
def _scores(predictor: Predictor, pixels: Tensor) -> Tensor:
    return torch.cat([predictor.model(part).float() for part in torch.split(pixels, BATCH)])
