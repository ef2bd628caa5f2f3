"""A picture of training images exactly as the model will see them: in the order and the views of the first epoch."""

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from finetune.config import AugmentConf, DataConf
from finetune.core.preprocess import Preprocess
from finetune.data.images.mix import Mixer
from finetune.data.loading.loader import Loader
from finetune.data.split import Source
from finetune.system.files import write_atomic

COLUMNS, ROWS = 8, 6
MIN_SIDE = 128  # pixels of a tile; a smaller image is enlarged by a whole number
GAP, CAPTION = 8, 18  # pixels between tiles, and of a line of text


def write_contact_sheet(
    path: Path, source: Source, preprocess: Preprocess, *, data: DataConf, augment: AugmentConf, seed: int
) -> None:
    """Write a PNG of the first images of the first training epoch; all images of `source` must be readable."""
    wanted = COLUMNS * ROWS
    # Only the training GPU knows what `batch_size=fit` is. Views do not depend on it, mixtures do.
    data = data if data.batch_size else dataclasses.replace(data, batch_size=wanted)
    device = torch.device("cpu")
    loader = Loader(source.splits["train"], preprocess, conf=data, augment=augment, seed=seed, device=device)
    mixer = Mixer(augment, num_classes=len(source.classes), seed=seed, batch_size=data.batch_size)
    try:
        batches = islice(mixer.wrap(loader.epoch(0), 0), -(-wanted // data.batch_size))
        tiles = [(image, label) for images, labels, _ in batches for image, label in zip(images, labels, strict=True)]
    finally:
        loader.close()
    sheet = _sheet([(pixels_of_input(image, preprocess), _caption(source, label)) for image, label in tiles[:wanted]])
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def pixels_of_input(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Undo the normalising of an image: float32 (channels, size, size) -> uint8, the pixels before it, RGB."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _caption(source: Source, label: Tensor) -> str:
    """The class of an image; for a mixed image all its classes with their shares."""
    if label.ndim == 0:
        return source.classes[int(label)]
    pairs = zip(label.tolist(), source.classes, strict=True)
    shares = sorted(((share, name) for share, name in pairs if share), reverse=True)
    return " + ".join(name if share == 1 else f"{share:.0%} {name}" for share, name in shares) or "no label"


def _sheet(tiles: list[tuple[Tensor, str]]) -> Image.Image:
    import matplotlib  # for its font, which has more alphabets than Pillow's

    size = tiles[0][0].shape[-1]
    side = size * -(-MIN_SIDE // size)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + rows * (side + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 12)
    for number, (pixels, caption) in enumerate(tiles):
        x = GAP + number % columns * (side + GAP)
        y = GAP + number // columns * (side + CAPTION + GAP)
        tile = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        sheet.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y))
        text = " ".join(caption.split())
        while text and font.getlength(text) > side:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        draw.text((x, y + side + 2), text, fill="black", font=font)
    return sheet
