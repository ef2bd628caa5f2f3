"""What a model expects of an image: the one contract that models state and the data side fulfils."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from finetune.config import DataConf, Resize
from finetune.system.errors import UserError

# The words of `data.resize` as `Preprocess.resize` has them.
WAYS = {Resize.shortest: "crop", Resize.squash: "squash", Resize.pad: "pad"}


# What can stand beside the weights of a network for images: pixels are in [0, 1], and a few models take 0 to 255.
Mean = Annotated[float, Meta(ge=-1000, le=1000)]
Deviation = Annotated[float, Meta(ge=1e-4, le=1000)]
CropFraction = Annotated[float, Meta(ge=0.05, le=1)]
_MODES = "^(nearest|nearest-exact|bilinear|bicubic|box|hamming|lanczos)$"


@dataclass(frozen=True)
class Preprocess:
    """From an RGB image in [0, 1] to what the first layer reads.

    The rules in the types hold for what is read from a file of weights.
    """

    size: Annotated[int, Meta(ge=1)]  # pixels a side
    mean: tuple[Mean, Mean, Mean]  # subtracted from each channel
    std: tuple[Deviation, Deviation, Deviation]  # each channel is divided by it
    interpolation: Annotated[str, Meta(pattern=_MODES)] = "bicubic"  # or `bilinear`; always antialiased
    # `squash` (both sides to `size`), `crop` (shorter side to `size / crop_fraction`, then the centre) or `pad` (longer
    # side to `size`, then black borders).
    resize: Annotated[str, Meta(pattern="^(crop|squash|pad)$")] = "crop"
    crop_fraction: CropFraction = 1.0  # share of the resized shorter side that the centre crop keeps
    channels: Annotated[int, Meta(ge=1)] = (
        3  # of the images that the model reads: 3, or 1 for grey; `mean` and `std` are then three times one
    )

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side ahead of the centre crop, rounded down as timm does."""
        # A fraction that was computed as size / pixels must give back these pixels, and not one less.
        return math.floor(self.size / self.crop_fraction + 1e-6)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, as a checkpoint's metadata holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def with_channels(preprocess: Preprocess, channels: int) -> Preprocess:
    """The preprocessing for images of so many channels; for one, the three numbers of `mean` and `std` become equal."""
    if channels == 1:
        (red, green, blue), (first, second, third) = preprocess.mean, preprocess.std
        mean = red if red == green == blue else (red + green + blue) / 3
        std = first if first == second == third else (first + second + third) / 3
        preprocess = dataclasses.replace(preprocess, mean=(mean, mean, mean), std=(std, std, std))
    return dataclasses.replace(preprocess, channels=channels)


def as_asked(preprocess: Preprocess, data: DataConf) -> Preprocess:
    """The preprocessing of the weights, with what `data.resize` and `data.eval_resize` change.

    Raises:
        UserError: `eval_resize` would be ignored, or is smaller than the image that the model sees.
    """
    eval_resize = data.eval_resize
    if data.resize != Resize.auto:
        preprocess = dataclasses.replace(preprocess, resize=WAYS[data.resize])
    if not eval_resize:
        return preprocess
    if preprocess.resize != "crop":
        why = f"these weights {preprocess.resize} images"
        raise UserError(f"data.eval_resize={eval_resize} would be ignored: {why}; add data.resize=shortest")
    if eval_resize < preprocess.size:
        problem = f"smaller than the {preprocess.size} pixels a side that the model sees"
        raise UserError(f"data.eval_resize={eval_resize}: {problem}; expected at least that, or 0 (as the weights)")
    return dataclasses.replace(preprocess, crop_fraction=preprocess.size / eval_resize)
