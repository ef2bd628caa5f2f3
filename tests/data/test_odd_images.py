"""Laws of unusual images: pixels equal those that numpy computes from the stored numbers, written here byte by byte.

Tolerances are in levels of 255. 0.5 is rounding. 1: Pillow keeps the upper of two bytes, so a channel of 16 bits loses
less than one level. 2: so does the transparency, or the black ink, that the channel is multiplied by.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from finetune.data.images.decode import ImageError, decode

HEIGHT, WIDTH = 5, 7
ROUNDED, BYTE, TWO_BYTES = 0.5001, 1.0, 2.0
Values = np.ndarray


def drawn(*shape: int, below: int, seed: int = 0) -> Values:
    return np.random.default_rng([seed, below, *shape]).integers(0, below, shape)


def levels(data: bytes) -> Values:
    """The pixels that this package reads, (height, width, 3)."""
    return decode(data, "x").permute(1, 2, 0).numpy().astype(float)


def assert_read(data: bytes, expected: Values, tolerance: float) -> None:
    found = levels(data)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


def grey(values: Values, top: int) -> Values:
    """One channel (height, width, 1), up to `top`, as RGB."""
    return np.repeat(values * 255 / top, 3, axis=2)


def on_white(rgb: Values, alpha: Values) -> Values:
    """`alpha` (height, width, 1) in [0, 1]."""
    return rgb * alpha + 255 * (1 - alpha)


def inks(values: Values, top: int) -> Values:
    """Cyan, magenta, yellow, black (height, width, 4), `top` is all ink: what they leave of the light."""
    light = 1 - values / top
    return 255 * light[..., :3] * light[..., 3:]


def packed(values: Values, bits: int) -> list[bytes]:
    """Each row, the first value in the upper bits of the first byte."""
    rows = values.reshape(len(values), -1)
    places = np.arange(bits - 1, -1, -1)
    return [np.packbits((row[:, None] >> places & 1).astype(np.uint8).reshape(-1)).tobytes() for row in rows]


# --- PNG --------------------------------------------------------------------------------------------------------------

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of the specification


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: Values, bits: int, colour: int, *more: bytes) -> bytes:
    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row for row in packed(values, bits)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_of_one_channel_with_and_without_a_clear_grey(bits: int) -> None:
    top = 2**bits - 1
    values = drawn(HEIGHT, WIDTH, 1, below=top + 1)
    assert_read(png(values, bits, GREY), grey(values, top), ROUNDED)
    for clear in sorted({0, 1, top // 2, top, int(values[2, 3, 0])}):
        there = (values != clear).astype(float)
        data = png(values, bits, GREY, chunk(b"tRNS", struct.pack(">H", clear)))
        assert_read(data, on_white(grey(values, top), there), ROUNDED)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", ["none", "first clear", "half of them"])
def test_png_with_a_palette(bits: int, alphas: str) -> None:
    count = min(2**bits, 200)
    palette, index = drawn(count, 3, below=256), drawn(HEIGHT, WIDTH, below=count)
    stored = {"none": [], "first clear": [0], "half of them": drawn(count // 2, below=256).tolist()}[alphas]
    alpha = np.array(stored + [255] * (count - len(stored))) / 255
    more = [chunk(b"PLTE", bytes(palette.reshape(-1).tolist()))] + [chunk(b"tRNS", bytes(stored))] * bool(stored)
    assert_read(png(index, bits, PALETTE, *more), on_white(palette[index], alpha[index][..., None]), ROUNDED)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, ROUNDED), (16, TWO_BYTES)])
def test_png_with_alpha_is_put_on_white(bits: int, tolerance: float) -> None:
    top = 2**bits - 1
    values = drawn(HEIGHT, WIDTH, 4, below=top + 1)
    assert_read(png(values[..., :3], bits, RGB), values[..., :3] * 255 / top, min(tolerance, BYTE))
    assert_read(png(values, bits, RGB_ALPHA), on_white(values[..., :3] * 255 / top, values[..., 3:] / top), tolerance)
    pair = values[..., :2]
    assert_read(png(pair, bits, GREY_ALPHA), on_white(grey(pair[..., :1], top), pair[..., 1:] / top), tolerance)


# --- TIFF -------------------------------------------------------------------------------------------------------------

WHITE_IS_ZERO, BLACK_IS_ZERO, TIFF_RGB, INKS, LAB = 0, 1, 2, 5, 8  # PhotometricInterpretation, TIFF 6.0
LONG, SHORT = 4, 3


def tiff(
    data: bytes, shape: Sequence[int], bits: int, kind: int | None, *, order: str = "<", extra: int | None = None
) -> bytes:
    """One uncompressed strip.

    `kind` None: no such tag. `extra`: what the channel behind the colours is, 1 premultiplied alpha, 2 alpha.
    """
    height, width, channels = shape
    entries = {256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels), 259: (SHORT, [1])}
    entries |= {273: (LONG, [8]), 277: (SHORT, [channels]), 278: (LONG, [height]), 279: (LONG, [len(data)])}
    entries |= {tag: (SHORT, [value]) for tag, value in ((262, kind), (338, extra)) if value is not None}
    data += bytes(len(data) % 2)
    behind, listed = b"", struct.pack(f"{order}H", len(entries))
    start = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, (size, values) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(values)}{'I' if size == LONG else 'H'}", *values)
        if len(value) > 4:
            behind, value = behind + value, struct.pack(f"{order}I", start + len(behind))
        listed += struct.pack(f"{order}HHI", tag, size, len(values)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + listed + bytes(4) + behind


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_16_bits_in_either_order_of_bytes(order: str) -> None:
    values = drawn(HEIGHT, WIDTH, 4, below=2**16)

    def stored(channels: int, kind: int | None, extra: int | None = None) -> bytes:
        part = values[..., :channels]
        return tiff(part.astype(f"{order}u2").tobytes(), part.shape, 16, kind, order=order, extra=extra)

    assert_read(stored(1, BLACK_IS_ZERO), grey(values[..., :1], 65535), ROUNDED)
    assert_read(stored(3, TIFF_RGB), values[..., :3] * 255 / 65535, BYTE)
    assert_read(stored(4, TIFF_RGB, 2), on_white(values[..., :3] * 255 / 65535, values[..., 3:] / 65535), TWO_BYTES)
    either = [(stored(1, WHITE_IS_ZERO), 255 - grey(values[..., :1], 65535)), (stored(4, INKS), inks(values, 65535))]
    either.append((stored(1, None), grey(values[..., :1], 65535)))  # most writers that leave the tag out mean this
    for data, expected in either:  # one byte order is unknown to Pillow, or to older versions
        try:
            found = levels(data)
        except ImageError as error:
            assert order == ">" and "of a kind unknown here" in str(error)
        else:
            assert np.abs(found - expected).max() <= TWO_BYTES


def test_tiff_of_12_bits() -> None:
    values = drawn(HEIGHT, WIDTH, 1, below=2**12)
    data = tiff(b"".join(packed(values, 12)), values.shape, 12, BLACK_IS_ZERO)
    assert_read(data, grey(values, 4095), ROUNDED)


@pytest.mark.parametrize("bits", [1, 8])
def test_tiff_with_white_at_either_end(bits: int) -> None:
    values = drawn(HEIGHT, WIDTH, 1, below=2**bits)
    data, expected = b"".join(packed(values, bits)), grey(values, 2**bits - 1)
    assert_read(tiff(data, values.shape, bits, BLACK_IS_ZERO), expected, 0)
    assert_read(tiff(data, values.shape, bits, WHITE_IS_ZERO), 255 - expected, 0)


def test_tiff_with_inks_and_with_both_kinds_of_alpha() -> None:
    values = drawn(HEIGHT, WIDTH, 4, below=256)
    plain = values.astype(np.uint8).tobytes()
    assert_read(tiff(plain, values.shape, 8, INKS), inks(values, 255), ROUNDED)
    assert_read(tiff(plain, values.shape, 8, TIFF_RGB, extra=2), on_white(values[..., :3], values[..., 3:] / 255), 0.51)
    values[..., :3] = np.minimum(values[..., :3], values[..., 3:])
    premultiplied = tiff(values.astype(np.uint8).tobytes(), values.shape, 8, TIFF_RGB, extra=1)
    assert_read(premultiplied, values[..., :3] + 255.0 - values[..., 3:], BYTE)
    pair = values[..., 2:]
    data = tiff(pair.astype(np.uint8).tobytes(), pair.shape, 8, BLACK_IS_ZERO, extra=2)
    assert_read(data, on_white(grey(pair[..., :1], 255), pair[..., 1:] / 255), ROUNDED)


def test_lab() -> None:
    """CIE 1976 under D50, the white of TIFF's Lab, to sRGB (IEC 61966-2-1): from the numbers that the file holds."""
    to_srgb = np.array([[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]])
    lightness = drawn(32, 32, below=120) + 100  # of 255
    a, b = drawn(2, 32, 32, below=41) - 20
    y = (lightness * 100 / 255 + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=2)
    linear = (np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1, 0.82521]) @ to_srgb.T
    assert linear.min() > 0 and linear.max() < 1  # colours that sRGB has: how others are clipped is a choice
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    stored = np.stack([lightness, a & 255, b & 255], axis=2)  # the last two are signed
    assert_read(tiff(stored.astype(np.uint8).tobytes(), stored.shape, 8, LAB), expected, BYTE)


# --- JPEG with four channels ------------------------------------------------------------------------------------------


def jpeg(stored: Values) -> bytes:
    """Four channels as they stand in the file; Pillow turns them over while it writes, and marks them as Adobe does."""
    file = io.BytesIO()
    Image.fromarray((255 - stored).astype(np.uint8), "CMYK").save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def marker(data: bytes) -> int:
    place = data.index(b"\xff\xee\x00\x0eAdobe")
    assert data[place + 15] == 0  # transform: none
    return place


def patches() -> Values:
    """Inks (64, 80, 4), in squares that a JPEG keeps."""
    return np.kron(drawn(4, 5, 4, below=256), np.ones((16, 16, 1))).astype(np.int64)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_cmyk_jpegs_are_stored_turned_over_with_adobes_marker_or_without() -> None:
    """libjpeg writes the marker with every such file: where there is none it was taken out, as by a cleaner of tags."""
    values = patches()
    data = jpeg(255 - values)
    place = marker(data)
    assert_read(data, inks(values, 255), TWO_BYTES)
    assert_read(data[:place] + data[place + 16 :], inks(values, 255), TWO_BYTES)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_ycck_jpegs() -> None:
    """As Adobe writes them: the light of each ink as YCbCr (ITU-T T.871, section 7), and black turned over."""
    values = patches()
    red, green, blue = np.moveaxis(values[..., :3].astype(float), 2, 0)  # turned over twice: 255 - (255 - ink)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    stored = np.stack([y, (blue - y) / 1.772 + 128, (red - y) / 1.402 + 128, 255.0 - values[..., 3]], axis=2)
    data = bytearray(jpeg(np.rint(stored).clip(0, 255).astype(np.int64)))
    data[marker(bytes(data)) + 15] = 2  # transform: YCCK
    # Two roundings to a level of chroma, which counts up to 1.8 times.
    assert_read(bytes(data), inks(values, 255), 4)


# --- upright ----------------------------------------------------------------------------------------------------------

# What stands in the stored row 0 and column 0 (EXIF 2.32, section 4.6.4 A): the shown image by its stored one.
UPRIGHT = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # right, top
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda a: a.transpose(1, 0, 2)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_every_orientation_of_an_image_that_is_not_square(orientation: int, kind: str) -> None:
    values = patches()[..., : 4 if kind == "CMYK" else 3]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = io.BytesIO()
    image = Image.fromarray(values.astype(np.uint8), "CMYK" if kind == "CMYK" else "RGB")
    image.save(file, "JPEG" if kind == "CMYK" else kind, exif=exif, **options.get(kind, {"quality": 100}))
    expected = inks(values, 255) if kind == "CMYK" else values
    assert_read(file.getvalue(), UPRIGHT[orientation](expected), TWO_BYTES)
