"""Scikit-learn's handwritten digits: a bundled data set, so that every command runs offline."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.data.images.decode import Header
from finetune.data.split import FoundImages, ImageStore


@dataclass(eq=False)
class DigitStore(ImageStore):
    """Handwritten digits in memory: white ink on black."""

    images: Tensor  # uint8 (n, 8, 8)
    encoded = False

    def load(self, row: int) -> Tensor:
        """The digit, uint8 (3, 8, 8), the same in all three channels."""
        return self.images[row].expand(3, -1, -1)

    def header(self, row: int) -> Header:
        """Grey, 8 by 8."""
        return Header(8, 8, "L")

    def read(self, row: int) -> bytes:
        """The 64 grey levels."""
        return self.images[row].numpy().tobytes()

    def size(self, row: int) -> int:
        """64 bytes."""
        return self.images[row].numel()

    def stamp(self, row: int) -> str:
        """Always empty: a digit in memory is read faster than a remembered check of it."""
        return ""

    def name_of(self, row: int) -> str:
        """`digits[row]`, the row in scikit-learn's order."""
        return f"digits[{row}]"


def find_digits(conf: DataConf) -> FoundImages:
    """The 1,797 digits of `sklearn.datasets.load_digits` (the test part of UCI Optical Recognition of Digits)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))  # the data count ink from 0 to 16
    store = DigitStore(levels)
    return FoundImages(
        store=store,
        names=[store.name_of(row) for row in range(len(levels))],
        classes=tuple(str(digit) for digit in range(10)),
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        given=torch.zeros(len(levels), dtype=torch.uint8),
        place="data=digits",
        title="digits",
        note="; 8x8 pixels, from scikit-learn",
        location="digits",
    )
