"""The rule for what nobody set: length, batch, rate and its decay, by the training images and the size of the network.

What the user set stays as it is. Each line stands on measurements or on published recipes: docs/quality.md has them.
Read `choose`: it is all.
"""

import math
from dataclasses import dataclass
from typing import Any

from finetune.config import Conf, OptimConf, find_problems, mixing_problems
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError
from finetune.system.terminal import counted

SHOWN, EPOCHS = 10_000, (10, 40)  # images that a run shows at least, each as often as these epochs allow
STEPS, BATCHES = 500, (8, 10, 12, 16, 24, 32, 48, 64)  # optimizer steps that a run makes at least, as far as it can
RATE, PARAMETERS, LEAST_RATE = 1e-3, 1.2e6, 5e-5  # AdamW's rate for so many parameters; larger networks take less
ADAMS = ("adamw", "adamw8bit", "muon")  # the optimizers whose rates mean the same


@dataclass(frozen=True)
class Choice:
    """A value for the setting `name`, a dotted key, and in a few words why it was chosen."""

    name: str
    value: Any
    reason: str


def with_choices(conf: Conf, images: int, model: LayeredModel) -> tuple[Conf, list[str]]:
    """`conf` with a value for all that is `auto`, for so many training images, and lines for the log that say which.

    `model` may be one without weights.

    Raises:
        UserError: What was chosen does not go with what the user set.
    """
    choices = choose(conf, images=images, parameters=sum(parameter.numel() for parameter in model.parameters()))
    if not choices:
        return conf, []
    conf = conf.choose({choice.name: choice.value for choice in choices})
    words = [f"{choice.name}={choice.value:g}" for choice in choices]
    if problems := find_problems(conf):
        raise UserError(f"{problems[0]}; what nobody set was chosen: {', '.join(words)}")
    width = max(map(len, words))
    rows = [f"  {word:<{width}}  {choice.reason}" for word, choice in zip(words, choices, strict=True)]
    return conf, ["chosen by the rule, since nobody set them:", *rows]


def choose(conf: Conf, *, images: int, parameters: int) -> list[Choice]:
    """A value for each setting that is `auto` in `conf`, for a network and so many training images."""
    shown = max(1, conf.data.epoch_images or images) * conf.augment.repeats
    epochs = conf.train.epochs
    if "train.epochs" in conf.auto:
        epochs = min(max(math.ceil(SHOWN / shown), EPOCHS[0]), EPOCHS[1])
    batch, why = _batch_size(conf, shown, epochs)
    rate, about_rate = _rate(conf.optim, parameters)
    is_new = conf.model.pretrained == "none"
    every = [
        Choice("train.epochs", epochs, f"{counted(shown, 'image')} an epoch, {epochs * shown:,} in all"),
        Choice("data.batch_size", batch, why),
        Choice("optim.lr", rate, about_rate),
        Choice(
            "optim.layer_decay",
            1.0 if is_new else OptimConf().layer_decay,
            "no layer has anything to keep" if is_new else "lower layers are more general",
        ),
        Choice("sched.warmup", 0, "the lower layers' rates are small already"),
    ]
    return [choice for choice in every if choice.name in conf.auto]


def _batch_size(conf: Conf, shown: int, epochs: int) -> tuple[int, str]:
    """The largest batch with which the run makes enough steps, and why."""
    if conf.optim.recipe_batch or conf.optim.lr_base_batch:
        return BATCHES[-1], "the recipe has a batch of its own"
    # A last batch of one image gives BatchNorm nothing to normalise.
    fitting = [size for size in BATCHES if shown % size != 1 and not mixing_problems(conf.augment, size)]
    fitting = fitting or [BATCHES[-1]]
    steps = {size: epochs * math.ceil(shown / (size * conf.train.accumulate)) for size in fitting}
    size = max((size for size in fitting if steps[size] >= STEPS), default=fitting[0])
    return size, f"{counted(steps[size], 'step')} in all; with much fewer than {STEPS} it learns too little"


def _rate(optim: OptimConf, parameters: int) -> tuple[float, str]:
    """AdamW's peak rate, and why."""
    if optim.name not in ADAMS or optim.lr_base_batch or optim.recipe_batch:
        return OptimConf().lr, "it is not known for this optimizer" if optim.name not in ADAMS else "it has a recipe"
    rate = max(LEAST_RATE, RATE * min(1.0, (PARAMETERS / parameters) ** 0.5))
    return float(f"{rate:.1g}"), f"the network has {parameters / 1e6:.3g} million parameters"
