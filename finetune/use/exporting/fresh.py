"""Runs the program of an exported folder in a process of its own: `python -I fresh.py FOLDER WORK`.

This file imports nothing of finetune, so that the folder is proven with the upstream library alone. WORK holds the
program, `program.py`, and the images of the check, `0.npy`, `1.npy` and so on, uint8 (height, width, 3). It gets
`pixels.npy`, what the network read of the images, float32 (images, channels, size, size), and `scores.npy`, float32
(images, classes).
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 16
FORBIDDEN = "finetune"  # a package that the program must not need


def main(folder: Path, work: Path) -> None:
    """Run the program on the images of `work`, in the folder."""
    work = work.resolve()
    os.chdir(folder)
    sys.path.insert(0, str(work))
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO reports home by it when imported
    import program  # type: ignore[import-not-found]

    count = len([path for path in work.glob("*.npy") if path.stem.isdecimal()])
    images = [Image.fromarray(np.load(work / f"{number}.npy", allow_pickle=False)) for number in range(count)]
    # Images of one size go together, so that batches of several are tried too.
    pixels, scores = [], []
    for start in range(0, count, BATCH):
        made = [program.prepare(image) for image in images[start : start + BATCH]]
        is_even = len({tuple(each.shape) for each in made}) == 1
        for part in [made] if is_even else [[each] for each in made]:
            batch = _stacked(part)
            scores.append(np.asarray(program.scores(batch)))
            # Only a network that prepares its images itself has a function for what it made of them.
            pixels.append(np.asarray(program.pixels(batch) if "pixels" in vars(program) else batch))
    np.save(work / "pixels.npy", np.concatenate(pixels))
    np.save(work / "scores.npy", np.concatenate(scores))
    images[0].save(work / "first.png")
    assert set(program.classify(str(work / "first.png"))) == set(program.classes), "classify gives other classes"
    assert FORBIDDEN not in sys.modules, f"{FORBIDDEN} was imported"


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts)
    import torch

    return torch.stack(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
