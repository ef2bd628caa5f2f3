"""Every setting of the loop: how long, by which loss, judged by what, saved how often.

Part of the configuration in `config.py`, on a page of its own; standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import Choice, changed, nearest, setting
from finetune.system.errors import UserError


class Loss(Choice):
    """What the model learns by."""

    auto = "auto"
    ce = "ce"
    bce = "bce"
    asl = "asl"


class OnNonfinite(Choice):
    """What becomes of a step whose loss or gradient is NaN or infinite; its update is applied in no case."""

    stop = "stop"
    skip = "skip"


class CompileMode(Choice):
    """Whether the layers that learn are compiled."""

    none = "none"
    default = "default"
    max_autotune = "max-autotune"


class ClassTokenOnly(Choice):
    """Whether the last block does only what the class token needs, on models that read nothing else."""

    auto = "auto"
    off = "off"


@dataclass
class TrainConf:
    """The epoch loop."""

    epochs: int = setting(10, "passes over the training images", at_least=1)
    accumulate: int = setting(1, "micro-batches that make one optimizer step", at_least=1)
    clip_grad: float = setting(1.0, "largest global gradient norm; 0: no clipping", at_least=0)
    label_smoothing: float = setting(0.0, "share of each label spread over all classes", at_least=0, below=1)
    loss: Loss = setting(
        Loss.auto,
        "ce: one right class; bce: a yes or no for each class; asl: bce that forgets easy negatives;"
        " auto: ce, or bce where images have several labels",
    )
    asl_gamma_pos: float = setting(0.0, "loss=asl: focusing exponent of labels that are there", at_least=0)
    asl_gamma_neg: float = setting(4.0, "loss=asl: focusing exponent of labels that are not", at_least=0)
    asl_shift: float = setting(
        0.05, "loss=asl: probability under which an absent label costs nothing", at_least=0, below=1
    )
    metrics: list[str] = setting(
        ["auto"], "measured on val and test beside loss and top1; auto: all that suit the labels (docs/metrics.md)"
    )
    monitor: str = setting(
        "auto",
        "the validation metric that picks the best epoch, lower is better for loss and ece; auto: val/top1, or val/map"
        " where images have several labels",
    )
    recompute: bool = setting(
        False, "gradient checkpointing: compute each learning layer twice instead of keeping its activations"
    )
    class_token_only: ClassTokenOnly = setting(
        ClassTokenOnly.auto,
        "auto: the last block does only what the class token needs, on models that read nothing else: the same but for"
        " rounding; off: upstream's own bits",
    )
    compile: CompileMode = setting(
        CompileMode.none,
        "torch.compile what the loop runs: default, or max-autotune (on CUDA with graphs); first steps take minutes",
    )
    patience: int = setting(0, "stop after this many epochs without a better monitor; 0: never", at_least=0)
    ema: float = setting(
        0.0,
        "decay of a moving average of the weights; scored beside them, the better kept; 0: off",
        at_least=0,
        below=1,
    )
    ema_warmup: bool = setting(
        True, "ema: forget faster in the first steps, decay min(ema, (1 + step) / (10 + step)); false: never"
    )
    save_every_steps: int = setting(
        0, "save within an epoch each so many optimizer steps; 0: at the end of epochs only", at_least=0
    )
    save_every_minutes: float = setting(
        0.0, "save within an epoch when the last save is so many minutes old; 0: at the end of epochs only", at_least=0
    )
    max_save_share: float = setting(
        0.05,
        "share of the time that saving at the ends of epochs may take: an epoch that comes too soon is saved with a"
        " later one; 1, or train.keep above 1: every epoch is saved",
        above=0,
        at_most=1,
    )
    keep: int = setting(
        1, "weights of so many best epochs are kept: the best, and where above 1 each under its epoch", at_least=1
    )
    on_nonfinite: OnNonfinite = setting(
        OnNonfinite.stop, "a loss or gradient that is NaN or infinite: stop, or skip the step; its batch is stored"
    )
    max_nonfinite: int = setting(10, "on_nonfinite=skip: stop after all once more steps than this were bad", at_least=1)


# What `train.metrics` can name: for one label an image, and for several.
LABEL_METRICS = ("top1", "top5", "balanced_accuracy", "macro_f1", "ece")
MULTILABEL_METRICS = (
    *("top1", "map", "f1_micro", "f1_macro"),
    *("precision_at_3", "recall_at_3", "f1_at_3", "precision_at_5", "recall_at_5", "f1_at_5"),
)


def train_problems(train: TrainConf) -> list[str]:
    """What is wrong with the loop's settings beyond their ranges, one line each."""
    problems = []
    known = dict.fromkeys([*LABEL_METRICS, *MULTILABEL_METRICS])
    for word in train.metrics:
        if word not in known and [word] != ["auto"]:
            problems.append(f"train.metrics: {word}: expected auto, or any of {', '.join(known)}{nearest(word, known)}")
    if "auto" in train.metrics and len(train.metrics) > 1:
        problems.append(f"train.metrics={train.metrics}: auto stands alone: it measures all that suits the labels")
    measured = ["loss", "top1", *(known if train.metrics == ["auto"] else train.metrics)]
    monitors = dict.fromkeys(["auto", *(f"val/{name}" for name in measured)])
    if train.monitor not in monitors and not problems:
        problems.append(
            f"train.monitor={train.monitor}: expected one of {', '.join(monitors)}{nearest(train.monitor, monitors)}"
        )
    if not train.ema and not train.ema_warmup:
        problems.append("train.ema_warmup=False would be ignored: it needs train.ema, such as train.ema=0.9998")
    if train.on_nonfinite == OnNonfinite.stop and changed(train, "max_nonfinite"):
        problems.append(f"train.max_nonfinite={train.max_nonfinite} would be ignored: it needs train.on_nonfinite=skip")
    if train.compile == CompileMode.max_autotune and train.accumulate > 1:
        problems.append(
            f"train.compile=max-autotune with train.accumulate={train.accumulate}: CUDA graphs write the gradients of"
            " every micro-batch to the same memory, over those that were to be added up; use train.compile=default,"
            " or train.accumulate=1 with a larger data.batch_size"
        )
    if train.loss != Loss.asl:
        for name, value in changed(train, "asl_gamma_pos", "asl_gamma_neg", "asl_shift").items():
            problems.append(f"train.{name}={value} would be ignored: it needs train.loss=asl")
    return problems


def measured_metrics(train: TrainConf, *, is_multilabel: bool) -> tuple[tuple[str, ...], str]:
    """What `auto` in `train.metrics` and `train.monitor` comes to once the labels are known: (names, monitor).

    Raises:
        ValueError: A metric of the other kind of labels.
    """
    suitable = MULTILABEL_METRICS if is_multilabel else LABEL_METRICS
    names = suitable if train.metrics == ["auto"] else tuple(train.metrics)
    monitor = train.monitor
    if monitor == "auto":
        monitor = "val/map" if is_multilabel else "val/top1"
        names = tuple(dict.fromkeys([*names, monitor.removeprefix("val/")]))
    wrong = [name for name in (*names, monitor.removeprefix("val/")) if name not in (*suitable, "loss")]
    if wrong:
        kind = "several labels" if is_multilabel else "one label"
        raise UserError(
            f"{wrong[0]} is no metric for images with {kind}: train.metrics and train.monitor can name"
            f" {', '.join(suitable)}{nearest(wrong[0], suitable)}"
        )
    return names, monitor
