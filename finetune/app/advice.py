"""What a run's own curves say about it at its end: one line on what matters most, and a command to try next."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.app.rule import STEPS
from finetune.config import Conf, DataConf
from finetune.core.metrics.intervals import wilson
from finetune.report.reading import number
from finetune.runs.records import Result
from finetune.system.terminal import command, counted

WIDE = 0.1  # of an interval: scores of different settings hide in it
LEARNT, NOT_LEARNT = 0.995, 0.9  # top1 on train, on val
FALLING = 0.99  # the training loss fell where it is below this part of the epoch before

Remark = tuple[str, list[str]]  # what is to be said, and words for the command line

logger = logging.getLogger("finetune")


def log_next(conf: Conf, result: Result, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log what the epochs `rows` of a finished run say about it, and a sweep to try next.

    Only the first remark that holds is made.
    """
    words: list[str] = result["overrides"]
    if remark := _ended_early(conf, result, rows) or _small_val(conf, result) or _learnt_by_heart(result, rows):
        text, settings = remark
        logger.info("%s; try: python -m finetune %s", text, _with(words, *settings))
    rate = conf.optim.lr
    rates = ",".join(f"{rate * factor:.2g}" for factor in (1 / 3, 1, 3))
    # First the rate: on new data it is what most often changes a result.
    logger.info("next, a sweep around it: python -m finetune %s", _with(words, "-m", f"optim.lr={rates}"))


def _with(words: Sequence[str], *settings: str) -> str:
    """The words of a command line with these settings, which replace their like; a new run gets a folder of its own."""
    new = {word.partition("=")[0] for word in settings} | {"hydra.run.dir"}
    flags = [word for word in settings if "=" not in word]
    kept = [word for word in words if word.partition("=")[0] not in new]
    return " ".join([*flags, command([*kept, *(word for word in settings if "=" in word)])])


def _ended_early(conf: Conf, result: Result, rows: Sequence[Mapping[str, Any]]) -> Remark | None:
    """The best epoch is one of the last two, and the training loss still falls."""
    if len(rows) < 3 or not result["data"]["val"] or result.get("best_epoch", 0) < len(rows) - 1:
        return None
    if number(result.get("val/top1")) == 1.0:
        return None
    before, last = (number(row.get("train/loss")) for row in rows[-2:])
    if not last < FALLING * before:
        return None
    text = f"it still got better when it ended: epoch {result['best_epoch']} of {len(rows)} is the best"
    steps: int = result["steps"]
    longer = f"train.epochs={2 * conf.train.epochs}"
    if steps >= STEPS or conf.data.batch_size < 16:
        return text, [longer]
    smaller = f"data.batch_size={conf.data.batch_size // 2}"
    return f"{text}, after only {counted(steps, 'optimizer step')}", [longer, smaller]


def _small_val(conf: Conf, result: Result) -> Remark | None:
    """So few validation images that scores of different settings cannot be told apart."""
    images, score = result["data"]["val"], number(result.get("val/top1"))
    if conf.data.folds or not images or result["monitor"] != "val/top1" or not 0 <= score <= 1:
        return None
    low, high = wilson(score, images)
    if high - low < WIDE:
        return None
    text = f"val has {counted(images, 'image')}, so its top1 {score:.2f} may be {low:.2f} to {high:.2f} on others"
    # Beside folds another share than the default would be ignored, and is refused, also one out of a yaml file.
    share = DataConf().val_fraction
    default = [] if conf.data.val_fraction == share else [f"data.val_fraction={share:g}"]
    return f"{text}; folds use every image for it", ["-m", *default, "data.folds=5", "data.fold=0,1,2,3,4"]


def _learnt_by_heart(result: Result, rows: Sequence[Mapping[str, Any]]) -> Remark | None:
    """Every training image is predicted right, and many of validation are not."""
    if not rows or not result["data"]["val"]:
        return None
    train, val = number(rows[-1].get("train/top1")), number(result.get("val/top1"))
    if not (train >= LEARNT and val < NOT_LEARNT):
        return None
    text = (
        f"train is learnt by heart (top1 {train:.3f}), val is not ({val:.3f}): more images help most, then augmentation"
    )
    return text, ["-m", "augment=light,three_augment,randaug"]
