"""Runs the program of an exported folder in a process of its own: `python -I fresh.py FOLDER WORK`.

This file imports nothing of finetune, so that the folder is proven with the upstream library alone. WORK holds the
program, `program.py`; the images of the check, `0.npy`, `1.npy` and so on, uint8 (height, width, 3); and `pixels.npy`,
what finetune makes of them, float32 (images, channels, size, size). It gets `prepared.npy`, what the program makes of
the images, and the scores of both, `scores.npy` and `scores_of_pixels.npy`, float32 (images, classes).
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
    import program  # type: ignore[import-not-found]

    pixels = np.load(work / "pixels.npy", allow_pickle=False)
    images = [Image.fromarray(np.load(work / f"{number}.npy", allow_pickle=False)) for number in range(len(pixels))]
    prepared = [program.prepare(image) for image in images]
    take = np.asarray if isinstance(prepared[0], np.ndarray) else _tensor
    made = np.stack([np.asarray(each) for each in prepared])
    np.save(work / "prepared.npy", made)
    for name, values in (("scores_of_pixels", pixels), ("scores", made)):
        parts = [values[start : start + BATCH] for start in range(0, len(values), BATCH)]
        np.save(work / f"{name}.npy", np.concatenate([np.asarray(program.scores(take(part))) for part in parts]))
    images[0].save(work / "first.png")
    assert set(program.classify(str(work / "first.png"))) == set(program.classes), "classify gives other classes"
    assert FORBIDDEN not in sys.modules, f"{FORBIDDEN} was imported"


def _tensor(values: Any) -> Any:
    import torch

    return torch.from_numpy(values)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
