"""What a run will certainly need, memory and open files, checked before it takes any."""

import torch

from finetune.config import Conf, ModelConf
from finetune.core.cost import estimate_memory
from finetune.core.device import WIDE, pick_precision
from finetune.core.freezing import set_up_layers
from finetune.data import Source
from finetune.data.loading.workers import pick_workers
from finetune.models import build_model
from finetune.models.patches import products_dominate
from finetune.system.limits import check_memory, check_open_files
from finetune.system.terminal import counted

LARGE_BATCH, LARGE_SIDE, MANY_CLASSES = 2**28, 768, 100_000  # bytes, pixels: below these nothing is estimated
FILES, FILES_OF_WORKER = 20, 16  # handles; two workers were seen to take 28 beside the 20 of a run without any


def check_files(conf: Conf, device: torch.device) -> None:
    """A LimitError where the system allows fewer open files than the loader processes will need."""
    workers = pick_workers(1.0, device) if conf.data.workers == "auto" else int(conf.data.workers)
    fewer = f"; data.workers=0 needs fewer than data.workers={conf.data.workers}" if workers else ""
    check_open_files(FILES + workers * FILES_OF_WORKER, fewer)


def check_room(conf: Conf, model_conf: ModelConf, source: Source, device: torch.device) -> None:
    """A LimitError where the model and one batch of images take more memory than the host has, as `describe` counts it.

    Only unusually large settings are looked at, since the estimate takes a second. A GPU says itself what does not fit;
    for one, only the images of a batch and the weights are counted, which the host holds first.
    """
    shown = (conf.data.epoch_images or len(source.splits["train"])) * conf.augment.repeats
    # The order of an epoch: four numbers of 64 bits a showing.
    check_memory(
        f"the order of {counted(shown, 'image')} an epoch", 32 * shown, "lower data.epoch_images or augment.repeats"
    )
    batch = min(max(1, conf.data.batch_size), shown)
    side = model_conf.image_size
    images = batch * 3 * max(side, 32) ** 2 * 4
    if images < LARGE_BATCH and side < LARGE_SIDE and len(source.classes) < MANY_CLASSES:
        return
    mend = "lower data.batch_size or model.image_size"
    what = f"a batch of {counted(batch, 'image')} of {max(side, 32):,} pixels a side"
    check_memory(what, images, mend)
    built = build_model(model_conf, source.classes, device="meta")
    model, side = built.model, built.preprocess.size
    images, what = batch * 3 * side**2 * 4, f"a batch of {counted(batch, 'image')} of {side:,} pixels a side"
    set_up_layers(model, conf.optim, train=conf.train)
    needed = images + 4 * sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu":
        dtype = pick_precision(conf.precision, device, is_wide=products_dominate(model.net, WIDE))
        averaged = conf.train.ema > 0
        needed = (
            images
            + estimate_memory(model, side, batch_size=batch, dtype=dtype, averaged=averaged, optim=conf.optim).total
        )
    check_memory(f"training on {what}", needed, mend)
