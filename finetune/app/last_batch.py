"""BatchNorm learns from several values a channel: a training batch of one image is foreseen before training."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.app.build import Run
from finetune.system.errors import UserError

# How torch's error begins where BatchNorm sees one value a channel.
ONE_VALUE = "Expected more than 1 value per channel"


def refuse_last_batch_of_one(run: Run) -> None:
    """A UserError where an epoch has a batch of one image and a BatchNorm of the model cannot learn from it.

    It cannot where its input has one position, as in a norm of pooled features or behind a small image's last stage.
    Whether there is such a norm among the layers that learn is tried on the device `meta`, which takes no memory.
    """
    images, size = run.loader("train", train=True).num_images, run.conf.data.batch_size
    if (images - 1) % size or run.conf.train.epochs == 0:  # the last batch has other than one image
        return
    if not any(isinstance(module, _BatchNorm) for module in run.model.net.modules()):
        return
    model, pixels = run.built_again("meta").train(), run.built.preprocess.size
    try:
        model(torch.empty(1, model.channels, pixels, pixels, device="meta"))
    except NotImplementedError:  # a network that cannot run there
        return
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        raise UserError(_problem(run, images, size)) from error


def _problem(run: Run, images: int, size: int) -> str:
    which = "each batch" if size == 1 else f"the last batch of an epoch of {images:,} images"
    problem = f"data.batch_size={size}: {which} has one image, and BatchNorm of {run.conf.model.name} needs two"
    if images == 1:
        return f"{problem}; a single image cannot train this model"
    other = next(number for number in range(size + 1, images + 2) if (images - 1) % number)
    dropped = " or data.drop_last=true, which leaves it out" * (size > 1 and images > size * run.conf.train.accumulate)
    return f"{problem}; use data.batch_size={other}{dropped}"
