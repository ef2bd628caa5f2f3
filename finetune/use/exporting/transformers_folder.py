"""The format `transformers`: a folder that `AutoModelForImageClassification.from_pretrained` loads.

transformers wraps every network of timm (`TimmWrapperForImageClassification`) and reads timm's own `config.json`,
preprocessing included. So the files are those of the format `timm`. A CLIP is written by `transformers_clip.py`.
"""

from pathlib import Path

from finetune.config import Library
from finetune.models.build import library_of
from finetune.models.heads.head import TowerWithHead
from finetune.use.exporting import timm_folder, transformers_clip
from finetune.use.exporting.formats import Written, completed
from finetune.use.loading import Learned

PROGRAM = """\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

FOLDER = "."  # where this file lies
model = AutoModelForImageClassification.from_pretrained(FOLDER).eval()
processor = AutoImageProcessor.from_pretrained(FOLDER)
classes = [model.config.id2label[index] for index in range(model.config.num_labels)]


def prepare(image):
    return processor(image.convert("RGB"))["pixel_values"][0]


def scores(batch):
    with torch.inference_mode():
        return model(pixel_values=batch).logits
"""


def write(learned: Learned, folder: Path) -> Written:
    """Write the folder.

    Raises:
        UserError: transformers has no such network, and neither has timm.
    """
    net = learned.built.model.net
    if library_of(learned.conf) == Library.open_clip and isinstance(net, TowerWithHead):
        return transformers_clip.write(learned, net, folder)
    notes = timm_folder.write_files(learned, folder)
    needs = "transformers runs this network by timm, so timm is needed too; timm alone loads the folder as well."
    return Written(completed(PROGRAM, learned), (needs, *notes))
