"""From an image file, however odd, to uint8 RGB."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from finetune.system.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision means to leave decoding to torchcodec one day: then Pillow does it all
    decode_jpeg = None

# In lower case; what Pillow reads without further libraries.
_WORDS = "avif bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = frozenset(f".{word}" for word in _WORDS.split())

_ORIENTATION = 0x0112  # EXIF tag; its values are how to turn the stored image upright (EXIF 2.32, section 4.6.4 A)
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_NO_TABLE = 0x0100  # cmsFLAGS_NOOPTIMIZE of Little CMS: ImageCms has had a name for it since Pillow 10.3 only
_FORMATS = "JPEG MPO PNG WEBP GIF BMP TIFF PPM AVIF"

# Pillow's own limit. Its warning at half of that is left out: such images are read.
MAX_PIXELS = 178_956_970
# Of a file: more than the largest image takes with four channels of 16 bits.
MAX_BYTES = 2**31
_AT_ONCE = os.O_NONBLOCK if os.name == "posix" else 0
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged EXIF and such, without a name
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)

MISSING = "there is no such file, or it is a broken link"

Levels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class ImageError(UserError):
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


class Header(NamedTuple):
    """What the first bytes of an image file say.

    Attributes:
        height: Pixels, as stored: ahead of a turn by the EXIF tag.
        width: Pixels, as stored.
        mode: In Pillow's words, such as `RGB`, `L`, `P`, `CMYK`, `I;16`.
    """

    height: int
    width: int
    mode: str


def read_image(path: str) -> Tensor:
    """Decode a file: upright by its EXIF tag, transparency on white, 16 bits scaled to 8, the first of many frames.

    Returns:
        uint8 (3, height, width), RGB; not always contiguous.

    Raises:
        ImageError: The file is missing, damaged, no image, or of a kind whose range of values is unknown.
    """
    return decode(read_file(path), path)


def read_file(path: str) -> bytes:
    """The bytes of a file; raises ImageError where there are none to read."""
    try:
        with _opened_file(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise ImageError(path, MISSING) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(path, error_words(error)) from error


def read_header(path: str) -> Header:
    """Size and mode, from the first bytes only; raises ImageError."""
    try:
        with _opened_file(path) as file, _opened(file, path) as image:
            return Header(image.height, image.width, image.mode)
    except FileNotFoundError as error:
        raise ImageError(path, MISSING) from error
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ImageError) else ImageError(path, error_words(error)) from error


def _opened_file(path: str) -> IO[bytes]:
    """A regular file of a sane size, for reading; raises OSError. A pipe or a device would be read for ever."""
    # Without waiting: a pipe opens only when somebody writes into it.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE))  # noqa: SIM115 (for the caller)
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return file
    file.close()
    raise OSError("a pipe or a device, no file" if not stat.S_ISREG(status.st_mode) else "more than 2 GiB")


def header_of(data: bytes, name: str) -> Header:
    """Size and mode of an encoded image called `name`; raises ImageError."""
    with _opened(io.BytesIO(data), name) as image:
        return Header(image.height, image.width, image.mode)


def decode(data: bytes, name: str) -> Tensor:
    """As `read_image`, from the bytes of a file called `name`.

    Plain JPEGs go through torchvision's reader: it is built on the same library as Pillow's and gives the same pixels
    in two thirds of the time. What it refuses, Pillow has the last word on.

    Returns:
        uint8 (3, height, width), RGB; not always contiguous.

    Raises:
        ImageError: As `read_image`.
    """
    return _decoded(data, name, grey=False)[1]


def header_of_whole(data: bytes, name: str) -> Header:
    """Size and mode of an image that `decode` can read to its end; raises ImageError where that does.

    Of a plain JPEG grey alone is computed. All of its bits are read for that, too, and errors are met where bits are
    read; colour is arithmetic on what was read, a fifth of the work.
    """
    return _decoded(data, name, grey=True)[0]


def _decoded(data: bytes, name: str, *, grey: bool) -> tuple[Header, Tensor]:
    """What the header says, and the pixels: (3, height, width), or perhaps (1, height, width) with `grey`."""
    with _opened(io.BytesIO(data), name) as image:
        header = Header(image.height, image.width, image.mode)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            turn = _turn(image)
            pixels = _decode_jpeg(data, grey=grey)
            if pixels is not None and pixels.shape[1:] == (image.height, image.width):
                return header, pixels if turn is None else _turned(pixels, turn)
        return header, pixels_of(image)


def _decode_jpeg(data: bytes, *, grey: bool) -> Tensor | None:
    if decode_jpeg is None:
        return None
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    try:
        # A bytearray because torch warns of memory that may not be written.
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
    except RuntimeError:
        return None
    return pixels


@contextlib.contextmanager
def _opened(file: IO[bytes], name: str) -> Iterator[Image.Image]:
    """An image as Pillow sees it; whatever goes wrong, also later while it is decoded, is an ImageError."""
    # Other libraries set this for the whole process, and half an image would be learned from as if it were whole.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(file, formats=_formats()) as image:
            yield image
    except UnidentifiedImageError as error:
        empty = file.seek(0, os.SEEK_END) == 0
        raise ImageError(name, "the file is empty" if empty else "not an image, or of a kind unknown here") from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"more than {MAX_PIXELS:,} pixels: a decompression bomb?") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes; it is passed on with the file's name
        raise ImageError(name, error_words(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """What is tried on a file, whatever its name: never formats that Pillow hands to other programs (EPS)."""
    Image.init()
    return tuple(name for name in _FORMATS.split() if name in Image.OPEN)


def error_words(error: Exception) -> str:
    """What an exception says, in a line and without the path."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def pixels_of(image: Image.Image) -> Tensor:
    """An open Pillow image as uint8 (3, height, width), RGB, by the rules of `read_image`; not always contiguous."""
    _scale_clear_grey(image)
    image.load()  # ahead of the EXIF tag: some formats turn the image, and drop the tag, while they decode
    turn = _turn(image)
    pixels = torch.from_numpy(np.array(_to_rgb(image), dtype=np.uint8)).permute(2, 0, 1)
    return pixels if turn is None else _turned(pixels, turn)


def _scale_clear_grey(image: Image.Image) -> None:
    """Of a PNG of 2 or 4 bits, ahead of its pixels: Pillow makes 8 bits of these, but not of the grey that is clear."""
    clear = image.info.get("transparency")
    if isinstance(image, PngImageFile) and isinstance(clear, int):
        stored = {tile[3] for tile in image.tile}
        image.info["transparency"] = clear * (85 if "L;2" in stored else 17 if "L;4" in stored else 1)


def _turn(image: Image.Image) -> int | None:
    """The EXIF orientation, where the stored image is not upright."""
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(2, 9) else None


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """Upright: the eight orientations are a transposition and two mirrors."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    mirrored = [axis for axis, which in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in which]
    return pixels.flip(mirrored) if mirrored else pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(image)).convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    """CIE Lab to sRGB, each pixel computed: Pillow's own conversion reads a coarse table, up to 18 levels off."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB", flags=_NO_TABLE)  # type: ignore[arg-type]
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is where nothing is converted in place
    return converted


def _scaled(image: Image.Image) -> Levels:
    """One channel of more than 8 bits -> uint8 (height, width). Pillow's own conversion clips at 255 instead."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also where it is not a number
            raise UserError(f"floating-point pixels from {low:g} to {high:g}, expected 0 to 1")
        levels: Levels = np.rint(values * 255).astype(np.uint8)
        return levels
    if low < 0 or high > 65535:
        raise UserError(f"32-bit pixels from {low} to {high}, expected 0 to 65535")
    wide = values.astype(np.int64)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one grey value that stands for "nothing here"
        wide[wide == clear] = 65535
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile) and image.mode == "I;16":
        # Pillow widens 12 bits without scaling them, and takes white for zero where the file says so of 8 bits only.
        white, inverted = 2 ** image.tag_v2[_BITS][0] - 1, image.tag_v2.get(_PHOTOMETRIC, 1) == 0
    levels = ((2 * 255 * wide + white) // (2 * white)).astype(np.uint8)  # 255 * value / white, rounded
    return 255 - levels if inverted else levels
