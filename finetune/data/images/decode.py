"""From an image file of any kind to uint8 RGB pixels, with one clear error for a file that cannot be read."""

import contextlib
import functools
import io
import os
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
from finetune.system.limits import in_bytes
from finetune.system.reading import open_regular

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision plans to leave decoding to torchcodec; then Pillow decodes everything
    decode_jpeg = None

# Lower-case endings of files that Pillow reads without further libraries.
_WORDS = "avif bmp gif jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = frozenset(f".{word}" for word in _WORDS.split())
_ORIENTATION = 0x0112  # EXIF tag: how to turn the stored image upright (EXIF 2.32, section 4.6.4 A)
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_NO_TABLE = 0x0100  # cmsFLAGS_NOOPTIMIZE of Little CMS, which has a name in ImageCms since Pillow 10.3
_RAISE = "data.max_image_mib raises the limit"
_FORMATS = "JPEG MPO PNG WEBP GIF BMP TIFF PPM AVIF"
MAX_PIXELS = 178_956_970  # of data.max_image_mib=512, and Pillow's own limit
BYTES_A_PIXEL = 12  # of a file at most: a file of the largest image with four channels of 16 bits is smaller
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of damaged EXIF; they name no file
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)

Levels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class ImageError(UserError):
    """An image that cannot be read."""

    def __init__(self, path: str, reason: str) -> None:
        """Take the path, or the name of an image without a file of its own, and the reason in a few words."""
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        """One line: the file, the reason, and how to mend it."""
        return f"{self.path}: cannot be read as an image ({self.reason}); repair or remove the file"


class Header(NamedTuple):
    """Size and mode of an image, which stand in the first bytes of its file."""

    height: int  # in pixels, as stored: before the EXIF tag turns the image
    width: int
    mode: str  # Pillow's name, such as `RGB`, `L`, `P`, `CMYK`, `I;16`


def read_image(path: str) -> Tensor:
    """Decode a file to uint8 (3, height, width), RGB; not always contiguous.

    The image is turned upright by its EXIF tag. Transparency is put on white, 16 bits are scaled to 8, and of several
    frames the first counts. Raises ImageError, also for an image whose range of values is unknown.
    """
    return decode(read_file(path), path)


def read_file(path: str, max_pixels: int = MAX_PIXELS, *, last: int = 0) -> bytes:
    """The bytes of a file, or only its `last` ones; raises ImageError where it cannot be read."""
    with _opened_file(path, max_pixels) as file:
        if last:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
        return file.read()


def read_header(path: str, max_pixels: int = MAX_PIXELS) -> Header:
    """Size and mode of an image file, read from its first bytes only; raises ImageError."""
    with _opened_file(path, max_pixels) as file, _opened(file, path, max_pixels) as image:
        return Header(image.height, image.width, image.mode)


def check_encoded(name: str, num_bytes: int, max_pixels: int) -> None:
    """Raises ImageError for an image file called `name` that is longer than any file of `max_pixels` pixels."""
    most = BYTES_A_PIXEL * max_pixels
    if num_bytes > most:
        raise ImageError(name, f"its file has {in_bytes(num_bytes)}, {in_bytes(most)} are read; {_RAISE}")


@contextlib.contextmanager
def _opened_file(path: str, max_pixels: int) -> Iterator[IO[bytes]]:
    """Open a regular file that is not too long: a pipe or a device would be read for ever. Raises ImageError."""
    try:
        with open_regular(path) as file:
            check_encoded(path, os.fstat(file.fileno()).st_size, max_pixels)
            yield file
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(path, error_words(error)) from error


def header_of(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Header:
    """Size and mode of an encoded image called `name`; raises ImageError."""
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        return Header(image.height, image.width, image.mode)


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode the bytes of a file called `name`, as `read_image` does."""
    return decode_with_header(data, name, max_pixels)[1]


def decode_with_header(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> tuple[Header, Tensor]:
    """What `header_of` and `decode` give, of an image that is opened once.

    torchvision decodes plain JPEGs: with the same library as Pillow, to the same pixels, in two thirds of the time.
    Pillow decodes all other images, and those that torchvision refuses.
    """
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        header = Header(image.height, image.width, image.mode)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            pixels = _decode_jpeg(data)
            if pixels is not None and pixels.shape[1:] == (image.height, image.width):
                return header, _upright(pixels, image)
        return header, pixels_of(image)


def _decode_jpeg(data: bytes) -> Tensor | None:
    if decode_jpeg is None:
        return None
    try:
        # A copy in a bytearray, since torch warns of memory that may not be written.
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    return pixels


@contextlib.contextmanager
def _opened(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image with Pillow. Every error, also of decoding inside the `with` block, becomes an ImageError."""
    # Other libraries set this for the whole process; a model would then train on half an image.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses twice as many
    try:
        with Image.open(file, formats=_formats()) as image:
            yield image
    except UnidentifiedImageError as error:
        empty = file.seek(0, os.SEEK_END) == 0
        raise ImageError(name, "the file is empty" if empty else "not an image, or of a kind unknown here") from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"more than {max_pixels:,} pixels: a decompression bomb? {_RAISE}") from error
    except MemoryError as error:
        raise ImageError(name, "it needs more memory than is free") from error
    except Exception as error:  # decoders raise nearly any error on damaged bytes; it goes on with the file's name
        raise ImageError(name, error_words(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow may try on a file: none that it hands to another program, as it does EPS."""
    Image.init()
    return tuple(name for name in _FORMATS.split() if name in Image.OPEN)


def error_words(error: Exception) -> str:
    """The message of an exception in one line, without the path."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file, or it is a broken link"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def pixels_of(image: Image.Image) -> Tensor:
    """An open Pillow image as uint8 (3, height, width), RGB, by the rules of `read_image`; not always contiguous."""
    _scale_clear_grey(image)
    image.load()  # before `_upright` reads the EXIF tag: some decoders turn the image themselves and drop the tag
    return _upright(torch.from_numpy(np.array(_to_rgb(image), dtype=np.uint8)).permute(2, 0, 1), image)


def _scale_clear_grey(image: Image.Image) -> None:
    """Scale the transparent grey value of a 2- or 4-bit PNG to 8 bits: Pillow does so for the pixels alone."""
    clear = image.info.get("transparency")
    if isinstance(image, PngImageFile) and isinstance(clear, int):
        stored = {tile[3] for tile in image.tile}
        image.info["transparency"] = clear * (85 if "L;2" in stored else 17 if "L;4" in stored else 1)


def _upright(pixels: Tensor, image: Image.Image) -> Tensor:
    """The pixels of `image` upright: each EXIF orientation is a transposition and two mirrors, or some of these."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    mirrored = [axis for axis, which in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in which]
    return pixels.flip(mirrored) if mirrored else pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(image)).convert("RGB")
    if image.mode == "LAB":
        # Computed for each pixel, since Pillow's own conversion to sRGB uses a coarse table, up to 18 levels off.
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB", flags=_NO_TABLE)  # type: ignore[arg-type]
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # Pillow returns None for a conversion in place only
        return converted
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Levels:
    """Scale one channel of more than 8 bits to uint8 (height, width). Pillow's own conversion clips at 255 instead."""
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
    if isinstance(clear, int):  # one grey value that means transparent
        wide[wide == clear] = 65535
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile) and image.mode == "I;16":
        # Pillow does not scale 12 bits to 16, and inverts images whose zero is white only where they have 8 bits.
        white, inverted = 2 ** image.tag_v2[_BITS][0] - 1, image.tag_v2.get(_PHOTOMETRIC, 1) == 0
    levels = ((2 * 255 * wide + white) // (2 * white)).astype(np.uint8)  # 255 * value / white, rounded
    return 255 - levels if inverted else levels
