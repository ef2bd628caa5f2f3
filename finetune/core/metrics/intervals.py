"""How far a share of some images may lie from that of all images of the kind."""

import math


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images (Wilson 1927, equation 4)."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
