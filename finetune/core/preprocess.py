"""What a model expects of an image: the one contract that models state and the data side fulfils."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preprocess:
    """From an RGB image in [0, 1] to what the first layer reads."""

    size: int  # pixels a side
    mean: tuple[float, float, float]  # subtracted from each channel
    std: tuple[float, float, float]  # each channel is divided by it
    interpolation: str = "bicubic"  # or `bilinear`; always antialiased
    # `squash` (both sides to `size`), `crop` (shorter side to `size / crop_fraction`, then the centre) or `pad` (longer
    # side to `size`, then black borders).
    resize: str = "crop"
    crop_fraction: float = 1.0  # share of the resized shorter side that the centre crop keeps, in (0, 1]

    def as_dict(self) -> dict[str, Any]:
        """Plain types, as a checkpoint's metadata holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
