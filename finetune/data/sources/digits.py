"""Scikit-learn's handwritten digits: a bundled data set, so that every command runs offline."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.config import DataConf
from finetune.data.images.decode import Header
from finetune.data.split import FoundImages, ImageStore


class DigitStore(ImageStore):
    """Handwritten digits in memory: white ink on black."""

    encoded = False

    def __init__(self, images: Tensor) -> None:
        """Take the digits, uint8 (n, 8, 8)."""
        self._images = images

    def load(self, row: int) -> Tensor:
        """The digit, uint8 (3, 8, 8), the same in all three channels."""
        return self._images[row].expand(3, -1, -1)

    def header(self, row: int) -> Header:
        """Grey, 8 by 8."""
        height, width = self._images[row].shape
        return Header(height, width, "L")

    def read(self, row: int) -> bytes:
        """The 64 grey levels."""
        return self._images[row].numpy().tobytes()

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
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    store = DigitStore(levels)
    return FoundImages(
        store=store,
        names=[store.name_of(row) for row in range(len(labels))],
        classes=tuple(str(digit) for digit in range(10)),
        labels=labels,
        given=torch.zeros(len(labels), dtype=torch.uint8),
        place="data=digits",
        title="digits",
        note="; 8x8 pixels, from scikit-learn",
        location="digits",
    )
