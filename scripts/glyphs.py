"""Images of characters for pretraining: glyphs of fonts and drawn strokes, distorted to look like handwriting.

A `Bank` holds each glyph once, upright and clean. `GlyphSampler` draws batches from the bank and distorts them with a
few batched tensor operations. No data set of handwriting is read.
"""

import math
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
GLYPH_SIZE = 56  # pixels a side of a stored glyph
INK_SIZE = 40  # pixels of the longer side of its ink, which is centred
IMAGE_SIZE = 32  # pixels a side of a training image

# Beginnings of the file names of fonts that have symbols in the place of letters, or no outlines of their own.
NOT_LATIN = ("cmsy", "cmex", "STIXSiz", "STIXNonUni", "D050000L", "StandardSymbols", "DejaVuSansDis", "DejaVuSerifDis")

# Several ways to write each digit by hand. A way is a list of strokes, with "/" between them. A stroke is a smooth
# curve through points "x,y" in hundredths of a box, y downwards; a point given twice is a corner.
STROKES = {
    "0": (
        "50,0 18,20 10,55 30,95 60,97 88,60 80,20 50,0",
        "70,5 35,8 12,50 35,97 80,80 85,25 45,2",
    ),
    "1": (
        "50,0 50,100",
        "65,0 35,100",
        "25,25 52,0 52,0 50,100",
        "25,25 52,0 52,0 50,100 / 20,100 82,100",
        "10,40 60,0 60,0 50,100",
    ),
    "2": (
        "12,25 35,2 75,8 82,35 50,65 10,100 10,100 90,100",
        "15,25 40,0 80,15 72,45 40,80 15,97 8,85 25,78 55,93 92,97",
        "10,12 50,0 85,20 60,60 12,93 12,93 50,90 95,100",
    ),
    "3": (
        "12,12 45,0 80,15 75,38 40,48 40,48 80,60 85,82 50,100 10,90",
        "10,0 85,0 85,0 40,40 40,40 85,58 75,92 40,100 10,90",
        "15,5 70,5 70,35 35,47 80,60 75,93 10,97",
    ),
    "4": (
        "20,0 10,55 10,55 92,55 / 72,10 68,100",
        "65,100 65,0 65,0 5,65 5,65 95,65",
        "35,0 5,60 5,60 95,58 / 65,30 55,100",
        "15,2 12,40 40,52 80,45 / 85,0 78,100",
    ),
    "5": (
        "85,0 20,0 20,0 15,45 15,45 50,37 88,60 75,93 40,100 8,88",
        "22,3 15,45 15,45 55,40 85,65 65,97 8,95 / 20,2 92,0",
        "88,4 30,4 20,38 62,47 85,70 60,100 10,92",
    ),
    "6": (
        "72,0 30,25 10,65 30,97 70,95 88,70 62,50 30,58 12,75",
        "42,0 15,50 15,85 50,100 85,80 70,55 35,60 15,80",
    ),
    "7": (
        "10,2 90,0 90,0 40,100",
        "10,12 12,2 90,3 90,3 55,45 40,100",
        "10,2 90,0 90,0 40,100 / 22,50 85,48",
        "5,10 50,0 88,8 70,45 50,100 / 30,52 90,45",
    ),
    "8": (
        "80,12 50,0 20,15 30,40 70,58 85,80 50,100 15,82 30,58 72,38 80,12",
        "50,0 20,12 25,40 50,48 78,35 78,10 50,0 / 50,48 12,65 20,95 55,100 88,85 80,58 50,48",
        "85,10 45,0 20,20 50,45 80,70 55,100 20,85 45,52 85,10",
    ),
    "9": (
        "82,20 50,0 15,20 30,48 70,42 85,12 85,12 80,60 70,100",
        "80,10 40,0 12,25 40,48 80,20 / 82,2 78,100",
        "82,20 50,0 15,20 30,50 70,42 85,15 88,50 65,95 15,95",
    ),
}


@dataclass
class Bank:
    """Clean glyphs, one row each.

    Attributes:
        images: White ink on black, uint8 (count, GLYPH_SIZE, GLYPH_SIZE).
        labels: Indices into CHARACTERS, (count,).
        weights: How often a row is drawn, relative to the other rows of its character, (count,).
        sources: Number of glyphs by the file name of their font.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    sources: dict[str, int]


def find_fonts(folders: list[Path]) -> list[Path]:
    """The files of outline fonts below `folders`, sorted, without those in NOT_LATIN."""
    found = {path for folder in folders for suffix in ("ttf", "otf", "ttc") for path in folder.rglob(f"*.{suffix}")}
    return sorted(path for path in found if not path.name.startswith(NOT_LATIN))


def fit_ink(picture: Image.Image) -> np.ndarray | None:
    """Crop to the ink, scale and centre it. -> uint8 (GLYPH_SIZE, GLYPH_SIZE); None for ink below 16 pixels."""
    box = picture.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < 16:
        return None
    ink = picture.crop(box)
    scale = INK_SIZE / max(ink.size)
    width, height = (max(2, round(side * scale)) for side in ink.size)
    canvas = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    corner = ((GLYPH_SIZE - width) // 2, (GLYPH_SIZE - height) // 2)
    canvas.paste(ink.resize((width, height), Image.Resampling.BOX), corner)
    return np.asarray(canvas)


def render_font(path: Path) -> dict[str, np.ndarray]:
    """The glyphs of one font by character, without those that the font lacks or draws as its box for missing glyphs."""
    with TTFont(path, fontNumber=0, lazy=True) as face:
        mapped = {chr(code) for code in face.getBestCmap() or {}}
    font = ImageFont.truetype(str(path), 96)
    glyphs: dict[str, np.ndarray] = {}
    seen: set[bytes] = set()
    missing = fit_ink(draw_text(font, "\uffff"))
    if missing is not None:
        seen.add(missing.tobytes())
    for character in CHARACTERS:
        glyph = fit_ink(draw_text(font, character)) if character in mapped else None
        # A glyph with the same pixels as an earlier one (small capitals, a box) would teach a wrong label.
        if glyph is not None and glyph.tobytes() not in seen:
            seen.add(glyph.tobytes())
            glyphs[character] = glyph
    return glyphs


def draw_text(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """White text on a black canvas with room around the text for long strokes."""
    canvas = Image.new("L", (320, 320))
    ImageDraw.Draw(canvas).text((110, 80), text, fill=255, font=font)
    return canvas


def smooth_curve(points: np.ndarray, steps: int = 12) -> np.ndarray:
    """Catmull-Rom spline through the points, with a corner at a repeated point. (n, 2) -> ((n - 1) * steps + 1, 2).

    Source: Catmull and Rom, "A class of local interpolating splines", 1974; the uniform form with tension 1/2.
    """
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        linear, square, cube = p2 - p0, 2 * p0 - 5 * p1 + 4 * p2 - p3, 3 * p1 - p0 - 3 * p2 + p3
        pieces.append(p1 + 0.5 * (linear * t + square * t**2 + cube * t**3))
    return np.concatenate([*pieces, points[-1:]])


def draw_strokes(strokes: str, rng: np.random.Generator) -> np.ndarray | None:
    """One digit in the style of handwriting: every point is jittered; slant, width and pen are random."""
    side = 200
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    radius = rng.uniform(3.5, 10)
    jitter, slant, narrow = rng.uniform(0.02, 0.07), rng.normal(0, 0.12), rng.uniform(0.45, 0.95)
    for stroke in strokes.split("/"):
        points = np.array([[int(number) / 100 for number in point.split(",")] for point in stroke.split()])
        moved = points + rng.normal(0, jitter, points.shape)
        for i in range(1, len(points)):  # the two copies of a corner stay together
            if (points[i] == points[i - 1]).all():
                moved[i] = moved[i - 1]
        curve = smooth_curve(moved)
        curve[:, 0] = (curve[:, 0] - 0.5 + slant * (0.5 - curve[:, 1])) * narrow + 0.5
        curve = curve * 120 + 40
        pen.line([tuple(point) for point in curve], fill=255, width=round(2 * radius))
        for x, y in curve:  # a round pen has round ends and joints
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return fit_ink(canvas)


def build_bank(fonts: list[Path], hand_fonts: list[Path], *, drawings: int, seed: int) -> Bank:
    """Render all glyphs.

    There are three sources: printed fonts, handwriting fonts and, for digits, drawn strokes. The weights make all three
    equally frequent, whatever their number of rows.

    Args:
        fonts: Printed fonts.
        hand_fonts: Fonts that imitate handwriting.
        drawings: Number of drawn examples for each way to write a digit.
        seed: Seed of the drawn examples.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[np.ndarray, int, int, int]] = []  # glyph, label, source, folder
    sources: dict[str, int] = {}
    folders: list[Path] = []
    for source, paths in enumerate((fonts, hand_fonts)):
        for path in paths:
            glyphs = render_font(path)
            if not glyphs:
                continue
            sources[path.name] = len(glyphs)
            if path.parent not in folders:
                folders.append(path.parent)
            place = folders.index(path.parent)
            rows += [(glyph, CHARACTERS.index(character), source, place) for character, glyph in glyphs.items()]
    for digit, ways in STROKES.items():
        drawn = [draw_strokes(strokes, rng) for strokes in ways for _ in range(drawings)]
        rows += [(glyph, CHARACTERS.index(digit), 2, len(folders)) for glyph in drawn if glyph is not None]
    labels, source, folder = torch.tensor([row[1:] for row in rows]).unbind(1)
    # A folder usually holds the weights of one family of fonts, so it counts with the square root of its size.
    in_folder = labels * (len(folders) + 1) + folder
    weights = torch.bincount(in_folder)[in_folder].double().rsqrt()
    in_source = labels * 3 + source
    weights /= torch.bincount(in_source, weights)[in_source]
    return Bank(torch.from_numpy(np.stack([row[0] for row in rows])), labels, weights, sources)


class GlyphSampler:
    """Draws varied batches: `images, labels = sampler.batch(128)`.

    By default half of a batch are digits and half are letters. Every glyph is sheared, rotated and warped, cropped to
    its ink, stretched into a box and perhaps thickened. Most images then lose resolution (see `degrade`).
    """

    def __init__(self, bank: Bank, *, seed: int, digit_share: float = 0.5) -> None:
        """Sample from `bank`, with `digit_share` of a batch as digits. The same seed gives the same batches."""
        self.bank = bank
        self.digit_share = digit_share
        self.generator = torch.Generator().manual_seed(seed)
        # The rows sorted by label. The cumulative weights of label k lie in the interval (k, k + 1].
        self.order = torch.argsort(bank.labels, stable=True)
        share = bank.weights / torch.bincount(bank.labels, bank.weights)[bank.labels]
        self.cumulative = share[self.order].cumsum(0)
        # Bicubic interpolation of 4 values as a matrix, which costs much less than `F.interpolate` on every batch.
        self.elastic_basis = F.interpolate(
            torch.eye(4)[None, :, :, None].expand(-1, -1, -1, 4), (GLYPH_SIZE, 4), mode="bicubic", align_corners=True
        )[0, :, :, 0].T  # (GLYPH_SIZE, 4)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] with white ink on black, and labels. -> (size, 1, IMAGE_SIZE, IMAGE_SIZE), (size,)."""
        is_digit = self.uniform(size) < self.digit_share
        digits = torch.randint(0, 10, (size,), generator=self.generator)
        letters = torch.randint(10, len(CHARACTERS), (size,), generator=self.generator)
        labels = torch.where(is_digit, digits, letters)
        places = torch.searchsorted(self.cumulative, labels + self.uniform(size).double())
        glyphs = self.bank.images[self.order[places.clamp(max=len(self.order) - 1)]][:, None].float() / 255
        boxed = self.vary_thickness(self.crop_to_box(self.warp(glyphs)))
        return self.degrade(boxed).clamp(0, 1), labels

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Independent uniform numbers. -> (size,)."""
        return torch.rand(size, generator=self.generator) * (high - low) + low

    def normal(self, size: int, std: float) -> Tensor:
        """Independent normal numbers with mean 0. -> (size,)."""
        return torch.randn(size, generator=self.generator) * std

    def vary_thickness(self, glyphs: Tensor) -> Tensor:
        """Thicken glyphs by one pixel, two or none. Bold glyphs stay as they are: dilation would fill their holes."""
        thick = dilate(glyphs)
        is_bold = glyphs.mean((1, 2, 3), keepdim=True) > 0.33
        kind = self.uniform(len(glyphs))[:, None, None, None]
        return torch.where(is_bold | (kind < 0.4), glyphs, torch.where(kind < 0.8, thick, dilate(thick)))

    def warp(self, glyphs: Tensor) -> Tensor:
        """Rotate, shear and distort smoothly, by a 4 x 4 grid of random shifts."""
        size = len(glyphs)
        angle, shear = self.normal(size, 8 * math.pi / 180), self.normal(size, 0.18)
        cos, sin = angle.cos(), angle.sin()
        # Zoom out by 1.25, so that the warp pushes no ink over the edge.
        matrix = torch.stack([cos, sin * 0 + shear * cos - sin, sin, shear * sin + cos], 1).view(size, 2, 2) * 1.25
        grid = F.affine_grid(
            torch.cat([matrix, torch.zeros(size, 2, 1)], 2), [size, 1, GLYPH_SIZE, GLYPH_SIZE], align_corners=False
        )
        strength = self.uniform(size, 0.02, 0.13)[:, None, None, None]
        shifts = torch.randn(size, 2, 4, 4, generator=self.generator) * strength
        field = self.elastic_basis @ shifts @ self.elastic_basis.T
        return F.grid_sample(glyphs, grid + field.permute(0, 2, 3, 1), align_corners=False)

    def crop_to_box(self, glyphs: Tensor) -> Tensor:
        """Crop to the ink and stretch it into a box of the final image, mostly of full height and with a random width.

        Readers of forms normalise characters in this way: 32 rows high and about 20 columns wide, narrow characters
        left narrow (Garris et al., "NIST form-based handprint recognition system", NISTIR 5469, 1994).
        """
        size = len(glyphs)
        left, right = ink_range(glyphs.amax(2)[:, 0])
        top, bottom = ink_range(glyphs.amax(3)[:, 0])
        aspect = (right - left) / (bottom - top)
        stretch = torch.where(aspect > 0.35, self.uniform(size), self.uniform(size, 0, 0.15))
        width = (aspect.clamp(max=0.9) * (1 - stretch) + 0.66 * stretch) * self.normal(size, 0.12).exp()
        width = width.clamp(0.12, 0.98)
        loose = self.uniform(size) < 0.3  # 30 % do not fill the frame
        height = torch.where(loose, self.uniform(size, 0.6, 1.0), self.uniform(size, 0.92, 1.02))
        width = torch.where(loose, width * height, width)
        shift_x = self.normal(size, 0.04) + torch.where(loose, self.normal(size, 0.08), torch.zeros(size))
        shift_y = torch.where(loose, self.normal(size, 0.1), self.normal(size, 0.02))
        # Output position u in [-1, 1] reads the input at: centre of the ink + (u - shift) * half its extent / width.
        scale_x, scale_y = (right - left) / 2 / width, (bottom - top) / 2 / height
        offset_x, offset_y = (left + right) / 2 - shift_x * scale_x, (top + bottom) / 2 - shift_y * scale_y
        zero = torch.zeros(size)
        matrix = torch.stack([scale_x, zero, offset_x, zero, scale_y, offset_y], 1).view(size, 2, 3)
        grid = F.affine_grid(matrix, [size, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
        return F.grid_sample(glyphs, grid, align_corners=False)

    def degrade(self, images: Tensor) -> Tensor:
        """Lower the resolution of 60 % by `through_bitmap` and of 20 % by resizing; then random gamma and noise."""
        size = len(images)
        kind = self.uniform(size)
        counted = through_bitmap(images, self.uniform(size, 0.2, 0.6))
        side = int(torch.randint(9, 21, (1,), generator=self.generator))
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        blurred = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        kind = kind[:, None, None, None]
        out = torch.where(kind < 0.6, counted, torch.where(kind < 0.8, blurred, images))
        gamma = self.normal(size, 0.15).exp()[:, None, None, None]
        noise = torch.randn(out.shape, generator=self.generator) * self.uniform(size, 0, 0.04)[:, None, None, None]
        return out.clamp(0, 1) ** gamma + noise


def dilate(images: Tensor) -> Tensor:
    """Maximum over 3 x 3 pixels, same shape. Shifted views are several times faster than `max_pool2d` on a CPU."""
    wide = F.pad(images, (1, 1, 0, 0))
    wide = torch.maximum(torch.maximum(wide[..., :-2], wide[..., 1:-1]), wide[..., 2:])
    tall = F.pad(wide, (0, 0, 1, 1))
    return torch.maximum(torch.maximum(tall[..., :-2, :], tall[..., 1:-1, :]), tall[..., 2:, :])


def ink_range(profile: Tensor) -> tuple[Tensor, Tensor]:
    """First and last edge of the ink on one axis, in [-1, 1] as `grid_sample` counts. (batch, n) -> 2 x (batch,)."""
    has_ink = profile > 0.4 * profile.amax(1, keepdim=True)
    n = profile.shape[1]
    position = torch.arange(n)
    first = torch.where(has_ink, position, n).amin(1).clamp(max=n - 4)
    last = torch.where(has_ink, position, -1).amax(1) + 1
    last = torch.maximum(last, first + 4)
    return first * 2 / n - 1, last * 2 / n - 1


def through_bitmap(images: Tensor, threshold: Tensor) -> Tensor:
    """Threshold to a bitmap, count its white pixels in 4 x 4 blocks (17 levels), enlarge. (batch, 1, 32, 32) -> same.

    The "Optical Recognition of Handwritten Digits" set was prepared so (Alpaydin and Kaynak, UCI, 1998).
    """
    bitmap = (images > threshold[:, None, None, None]).float()
    counts = F.avg_pool2d(bitmap, 4) * 16
    levels = (counts * (255 / 16)).floor() / 255  # rounded to 8-bit grey
    return F.interpolate(levels, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
