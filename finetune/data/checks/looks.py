"""Near-duplicates: images that look alike, such as one picture resized, stored again with loss, or in another format.

The hash of a look is the perceptual hash of Zauner (2010): the signs of the 64 lowest frequencies of a grey picture of
32 by 32 pixels against their median. Copies differ in 0 to 4 bits, unrelated pictures in about 32.
"""

from itertools import combinations, pairwise

import numpy as np
from PIL import Image
from torch import Tensor

from finetune.data.cutting import Rows
from finetune.data.streams import Ranks

# Bits in which the looks of near-duplicates differ at most: most copies differ in 0 or 2. With 4, chains of a few
# hundred simple drawings became one group in a collection of 8,121.
RADIUS = 2
BLOCKS = RADIUS + 2  # of bits: two looks of near-duplicates agree in at least two of them
SIDE = 32  # pixels of the grey picture
FLAT = 1  # the look of a picture of one colour: its frequencies are noise, so it is compared with no other
FLAT_CONTRAST = 2.0  # standard deviation of grey levels, of 255, below which a picture counts as one colour
_BITS_OF = np.array([bin(number).count("1") for number in range(2**16)], dtype=np.uint8)


def look_of(pixels: Tensor) -> int:
    """The hash of the look of an image, uint8 (3, height, width), from 1 to 2^64 - 1."""
    import imagehash  # type: ignore[import-untyped, unused-ignore]

    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    grey = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0).convert("L")
    if np.asarray(grey).std() < FLAT_CONTRAST:
        return FLAT
    return int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes(), "big")


def near_pairs(looks: Ranks) -> tuple[Rows, Rows]:
    """Pairs of images whose looks differ in at most RADIUS bits, looks uint64 (n,); 0 and FLAT pair with none.

    Images of one look are paired with the first of them only. Different looks are compared where they agree in two of
    the blocks of bits, which all near ones do: the time grows with n log n, as long as few share two blocks.
    """
    rows = np.flatnonzero(looks > FLAT)
    values, firsts, number = np.unique(looks[rows], return_index=True, return_inverse=True)
    same = rows[firsts[number]]
    left, right = [same[same != rows]], [rows[same != rows]]
    edges = np.linspace(0, 64, BLOCKS + 1).astype(int).tolist()
    blocks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    for one, other in combinations(blocks, 2):
        keys = values & np.uint64(one | other)
        order = np.argsort(keys, kind="stable")
        keys, sorted_values = keys[order], values[order]
        starts = np.arange(len(order))
        for step in range(1, len(order)):
            starts = starts[starts < len(order) - step]
            starts = starts[keys[starts] == keys[starts + step]]
            if not len(starts):
                break
            near = starts[_bits(sorted_values[starts] ^ sorted_values[starts + step]) <= RADIUS]
            left.append(rows[firsts[order[near]]])
            right.append(rows[firsts[order[near + step]]])
    pairs = np.unique(np.sort(np.stack([np.concatenate(left), np.concatenate(right)]), axis=0), axis=1)
    return pairs[0], pairs[1]


def _bits(numbers: Ranks) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """How many bits of each number are set."""
    words = np.ascontiguousarray(numbers).view(np.uint16).reshape(-1, 4)
    return np.asarray(_BITS_OF[words].sum(axis=1, dtype=np.uint8))
