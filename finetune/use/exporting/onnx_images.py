"""The preprocessing of a run as a graph of ONNX: from images as they are to what the network reads."""

import re

from finetune.core.preprocess import Preprocess
from finetune.system.errors import UserError

MODES = {"bicubic": "cubic", "bilinear": "linear"}

# Constants of the graph; each is in it where a line names it.
CONSTANTS = {
    "zero": "int64[1] zero = {{0}}",
    "one": "int64[1] one = {{1}}",
    "two": "int64[1] two = {{2}}",
    "three": "int64[1] three = {{3}}",
    "four": "int64[1] four = {{4}}",
    "sides": "int64[2] sides = {{2, 3}}",
    "size": "int64[1] size = {{{size}}}",
    "shorter": "int64[1] shorter = {{{shorter}}}",
    "low": "float low = {{0}}",
    "high": "float high = {{255}}",
    "half": "float half = {{0.5}}",
    "grey": "float[3, 1, 1] grey = {{0.299, 0.587, 0.114}}",
    "mean": "float[{channels}, 1, 1] mean = {{{mean}}}",
    "std": "float[{channels}, 1, 1] std = {{{std}}}",
}
HEAD = """\
<ir_version: {ir}, opset_import: ["" : {opset}]>
prepare (uint8[batch, height, width, 3] images) => (float[batch, {channels}, {size}, {size}] pixels)
<CONSTANTS>
{{
"""
START = """\
rows = Transpose <perm = [0, 3, 1, 2]> (images)
real = Cast <to = 1> (rows)
shape = Shape (real)
outer = Slice (shape, zero, two)
tall = Slice (shape, two, three)
broad = Slice (shape, three, four)
"""
# The new height and width of an image that is `tall` and `broad` pixels, as `fit_square` computes them.
SIZES = {
    "squash": """\
new_tall = Identity (size)
new_broad = Identity (size)
""",
    "crop": """\
short = Min (tall, broad)
grown_tall = Mul (tall, shorter)
grown_broad = Mul (broad, shorter)
new_tall = Div (grown_tall, short)
new_broad = Div (grown_broad, short)
""",
    "pad": """\
long = Max (tall, broad)
exact_long = Cast <to = 11> (long)
grown_tall = Mul (tall, size)
grown_broad = Mul (broad, size)
exact_tall = Cast <to = 11> (grown_tall)
exact_broad = Cast <to = 11> (grown_broad)
ratio_tall = Div (exact_tall, exact_long)
ratio_broad = Div (exact_broad, exact_long)
round_tall = Round (ratio_tall)
round_broad = Round (ratio_broad)
whole_tall = Cast <to = 7> (round_tall)
whole_broad = Cast <to = 7> (round_broad)
new_tall = Max (whole_tall, one)
new_broad = Max (whole_broad, one)
""",
}
# Pillow and torch resize the width, round (a half upwards), and then the height. Their cubic has the parameter -0.5.
RESIZE = """\
wide_shape = Concat <axis = 0> (outer, tall, new_broad)
wide_raw = Resize <mode = "{mode}", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1> (real, , , wide_shape)
wide_more = Add (wide_raw, half)
wide_floor = Floor (wide_more)
wide = Clip (wide_floor, low, high)
high_shape = Concat <axis = 0> (outer, new_tall, new_broad)
high_raw = Resize <mode = "{mode}", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1> (wide, , , high_shape)
high_more = Add (high_raw, half)
high_floor = Floor (high_more)
resized = Clip (high_floor, low, high)
"""
CUTS = {
    "squash": "square = Identity (resized)\n",
    "crop": """\
new_sides = Concat <axis = 0> (new_tall, new_broad)
beyond = Sub (new_sides, size)
exact = Cast <to = 1> (beyond)
halves = Mul (exact, half)
round_halves = Round (halves)
starts = Cast <to = 7> (round_halves)
ends = Add (starts, size)
square = Slice (resized, starts, ends, sides)
""",
    "pad": """\
new_sides = Concat <axis = 0> (new_tall, new_broad)
lacking = Sub (size, new_sides)
before = Div (lacking, two)
behind = Sub (lacking, before)
none = Concat <axis = 0> (zero, zero)
pads = Concat <axis = 0> (none, before, none, behind)
square = Pad (resized, pads, low)
""",
}
GREY = """\
weighted = Mul (square, grey)
coloured = ReduceSum <keepdims = 1> (weighted, one)
"""
END = """\
shares = Div (coloured, high)
centred = Sub (shares, mean)
pixels = Div (centred, std)
}}
"""


def preparing(preprocess: Preprocess, *, ir: int, opset: int) -> str:
    """The text of a model of ONNX, uint8 (batch, height, width, 3) to float32 (batch, channels, size, size).

    Raises:
        UserError: ONNX has no such interpolation.
    """
    channels, mode = preprocess.channels, MODES.get(preprocess.interpolation)
    if mode is None:
        raise UserError(f"--with-preprocess: ONNX resizes bicubic or bilinear, not {preprocess.interpolation}")
    mean, std = (
        ", ".join(repr(float(value)) for value in each[:channels]) for each in (preprocess.mean, preprocess.std)
    )
    colours = GREY if channels == 1 else "coloured = Identity (square)\n"
    lines = START + SIZES[preprocess.resize] + RESIZE + CUTS[preprocess.resize] + colours + END
    used = [text for name, text in CONSTANTS.items() if re.search(rf"\b{name}\b", lines)]
    text = HEAD.replace("CONSTANTS", ", ".join(used)) + lines
    numbers = {"ir": ir, "opset": opset, "size": preprocess.size, "shorter": preprocess.shorter_side}
    return text.format(**numbers, channels=channels, mode=mode, mean=mean, std=std)
