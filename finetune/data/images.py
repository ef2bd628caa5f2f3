"""From an image file, however odd, to uint8 RGB; and the lists of such files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# In lower case; what Pillow reads without further libraries.
_WORDS = "avif bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = frozenset(f".{word}" for word in _WORDS.split())

_ORIENTATION = 0x0112  # EXIF tag; its values are how to turn the stored image upright (EXIF 2.32, section 4.6.4 A)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Levels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class ImageError(ValueError):
    """An image file that cannot be read.

    Attributes:
        path: The file.
        reason: Why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        """Name the file first: that is what its owner needs."""
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """One line that says what to do."""
        return f"{self.path}: cannot be read as an image ({self.reason}); repair or remove the file"


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts as people count: `class 2` ahead of `class 10`, upper and lower case together."""
    parts = [part for part in re.split(r"(\d+)", text.casefold()) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], text


class PackedStrings(Sequence[str]):
    """An immutable list of file names in two arrays.

    A Python list of millions of strings is copied page by page into every forked worker, because reading an object
    writes its reference count (pytorch#13246); these two arrays stay shared.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Copy `strings`."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        """How many."""
        return len(self._ends)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's overload for slices is refused below
        """The string at `index`, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index}: expected 0 to {len(self) - 1}")
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")


def read_image(path: str) -> Tensor:
    """Decode a file: upright by its EXIF tag, transparency on white, 16 bits scaled to 8, the first of many frames.

    Returns:
        uint8 (3, height, width), RGB.

    Raises:
        ImageError: The file is missing, damaged, no image, or of a kind whose range of values is unknown.
    """
    try:
        with Image.open(path) as image:
            return _to_tensor(image)
    except FileNotFoundError as error:
        raise ImageError(path, "there is no such file, or it is a broken link") from error
    except UnidentifiedImageError as error:
        raise ImageError(path, "not an image" if os.path.getsize(path) else "the file is empty") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes; it is passed on with the file's name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(path, reason) from error


def _to_tensor(image: Image.Image) -> Tensor:
    image.load()  # ahead of the EXIF tag: some formats turn the image, and drop the tag, while they decode
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Levels:
    """One channel of more than 8 bits -> uint8 (height, width). Pillow's own conversion clips at 255 instead."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also where it is not a number
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}, expected 0 to 1")
        levels: Levels = np.rint(values * 255).astype(np.uint8)
        return levels
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit pixels from {low} to {high}, expected 0 to 65535")
    wide = values.astype(np.int64)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one grey value that stands for "nothing here"
        wide[wide == clear] = 65535
    levels = ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, so this is value / 257, rounded
    return levels
