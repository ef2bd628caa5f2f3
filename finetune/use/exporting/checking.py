"""Compares an exported folder with the model it was made of: on real images, by the upstream library alone."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.core.preprocess import Preprocess
from finetune.data import ImageError
from finetune.data.images.transforms import fit_square
from finetune.data.loading.batches import in_channels, normalise
from finetune.data.split import Split
from finetune.system.errors import UserError
from finetune.system.terminal import counted, printable
from finetune.use.predictor import Predictor

IMAGES, ROUNDED_IMAGES = 64, 500  # that are compared: scores of an exact export, the accuracy of one that rounds
MOST_BYTES = 2**29  # of their pixels, together
LIMIT = 1e-4  # largest difference of scores of equal pixels; where scores are above 1, that share of the largest one
# Pillow and torch round a resized pixel differently now and then: by 1 of 255, or by 2 where an edge overshoots, and in
# less than 1 % of the pixels. Another size, crop, interpolation or mean differs by more in one of these two numbers.
MOST_LEVELS, MEAN_LEVEL = 2.1, 0.05
MOST_LOST = 0.01  # of the accuracy, by an export that rounds; one image may always be lost
BATCH = 16
SCRIPT = Path(__file__).with_name("fresh.py")


@dataclass(frozen=True, eq=False)
class Images:
    """The images that an export is compared on."""

    split: Split
    where: str  # they come from
    is_labelled: bool  # whether the labels of `split` are the images' own
    examples: Split  # on which a format that rounds measures ranges: images of training where there are some


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
    differs: str  # what is above the limit: numbers, accuracy, preprocessing, or empty
    accuracy: tuple[float, float] | None  # before and after, of an export that rounds

    def __str__(self) -> str:
        """In a sentence."""
        if self.accuracy is not None:
            before, after = self.accuracy
            said = f"{counted(self.images, 'image')} of {self.where}: accuracy {before:.4f} before rounding"
            changed = f"{counted(self.changed, 'prediction')} changed, probabilities by {self.probabilities:.0e}"
            return f"{said}, {after:.4f} after it; {changed}"
        apart = f"scores of equal pixels differ by at most {self.numbers:.0e}; with its own preprocessing"
        apart += f" pixels by {self.levels:.0f} of 255 ({self.mean_level:.4f} on average), scores by {self.scores:.0e}"
        changed = f"probabilities by {self.probabilities:.0e}, and {counted(self.changed, 'prediction')} changed"
        return f"{counted(self.images, 'image')} of {self.where}: {apart}, {changed}"


def check(folder: Path, predictor: Predictor, images: Images, *, is_rounded: bool = False) -> Checked:
    """Run the program in the folder's README in a fresh process, and compare its scores with those of `predictor`.

    An export that rounds is judged by its accuracy: by the labels of the images, else by the model's own predictions.

    Raises:
        ImageError: No image can be read.
        UserError: The program fails.
    """
    with tempfile.TemporaryDirectory() as name:
        work, count = Path(name), ROUNDED_IMAGES if is_rounded else IMAGES
        kept: list[int] = []
        fitted: list[Tensor] = []
        for index, image in _spread(images.split, count):
            np.save(work / f"{len(kept)}.npy", image.permute(1, 2, 0).contiguous().numpy())
            kept.append(index)
            fitted.append(fit_square(image, predictor.preprocess))
        ours = _normalised(fitted, predictor.preprocess)
        (work / "program.py").write_text(_program_in(folder / "README.md"), encoding="utf-8")
        _run(folder, work)
        theirs, scores = (
            torch.from_numpy(np.load(work / f"{name}.npy", allow_pickle=False)) for name in ("pixels", "scores")
        )
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape[1:])}, expected {tuple(ours.shape[1:])}"
        raise UserError(f"the exported folder makes pixels {shapes}; nothing was written")
    same = _scores(predictor, theirs)
    wanted = same if is_rounded else _scores(predictor, ours)
    found = _compared(predictor, theirs - ours, (wanted, same, scores), images.where)
    if not is_rounded:
        return found
    if images.is_labelled:
        truth = images.split.labels[kept]
    else:
        truth = _predicted(same, predictor.threshold)
        found = replace(found, where=f"{found.where}, where the model's own predictions count as right")
    return _judged(found, *(_accuracy(each, truth, predictor.threshold) for each in (same, scores)))


def prepared(split: Split, preprocess: Preprocess, count: int) -> Tensor:
    """What the network reads of up to `count` images of a split: float32 (images, channels, size, size)."""
    return _normalised([fit_square(image, preprocess) for _, image in _spread(split, count)], preprocess)


def _spread(split: Split, count: int) -> Iterator[tuple[int, Tensor]]:
    """Up to `count` images of the split that can be read, evenly spread, with their indices; raises ImageError."""
    used, error = 0, None
    for index in torch.linspace(0, len(split) - 1, min(count, len(split))).long().tolist():
        try:
            image = split.load(index)
        except ImageError as unreadable:  # `finetune check` lists them
            error = unreadable
            continue
        if used and used + image.numel() > MOST_BYTES:
            return
        used += image.numel()
        yield index, image
    if error is not None and not used:
        raise error


def _normalised(fitted: list[Tensor], preprocess: Preprocess) -> Tensor:
    mean, std = torch.tensor((preprocess.mean, preprocess.std), dtype=torch.float32)[:, :, None, None]
    return in_channels(normalise(torch.stack(fitted), mean, std), preprocess.channels)


def _predicted(scores: Tensor, threshold: float | None) -> Tensor:
    """The class of each image, (images,); with several labels which labels it has, bool (images, classes)."""
    return scores.argmax(dim=1) if threshold is None else scores.sigmoid() >= threshold


def _accuracy(scores: Tensor, truth: Tensor, threshold: float | None) -> float:
    """The share of images whose class is right; with several labels that of labels."""
    return float((_predicted(scores, threshold) == truth.to(torch.int64)).float().mean())


def _judged(found: Checked, before: float, after: float) -> Checked:
    """What was found, judged by the accuracy before and after rounding."""
    lost = before - after > max(MOST_LOST, 1 / found.images) + 1e-6
    differs = "accuracy" if lost else found.differs.replace("numbers", "")
    return replace(found, differs=differs, accuracy=(before, after))


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


def _compared(predictor: Predictor, apart: Tensor, logits: tuple[Tensor, Tensor, Tensor], where: str) -> Checked:
    """`apart` is the difference of pixels.

    The logits are the model's of its own pixels, the model's of the upstream library's, and that library's of these.
    """
    wanted, same, scores = logits
    if scores.shape != wanted.shape or not scores.isfinite().all():
        shapes = f"{tuple(scores.shape[1:])}, expected {tuple(wanted.shape[1:])}"
        raise UserError(f"the exported folder gives scores {shapes} or no numbers; nothing was written")
    std = torch.tensor(predictor.preprocess.std)[: apart.shape[1], None, None]
    levels = (apart * std).abs() * 255
    most, mean = float(levels.max()), float(levels.mean())
    numbers, farthest = (float((scores - each).abs().max()) for each in (same, wanted))
    several = predictor.threshold is not None
    before, after = (each.sigmoid() if several else each.softmax(dim=1) for each in (wanted, scores))
    labels = _predicted(wanted, predictor.threshold) != _predicted(scores, predictor.threshold)
    changed = int((labels.any(dim=1) if several else labels).sum())
    differs = "preprocessing" if most > MOST_LEVELS or mean > MEAN_LEVEL else ""
    if numbers > LIMIT * max(1.0, float(same.abs().max())):
        differs = "numbers"
    probabilities = float((after - before).abs().max())
    return Checked(len(wanted), where, numbers, farthest, probabilities, most, mean, changed, differs, None)


@torch.inference_mode()
def _scores(predictor: Predictor, pixels: Tensor) -> Tensor:
    return torch.cat([predictor.model(part).float() for part in torch.split(pixels, BATCH)])
