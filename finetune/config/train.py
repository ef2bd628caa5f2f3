"""Every setting of the loop: its length, loss, metrics and saves. Standard library only."""

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, nearest, setting
from finetune.system.errors import UserError


class Loss(Choice):
    """The loss that training minimizes."""

    auto = "auto"
    ce = "ce"
    bce = "bce"
    asl = "asl"


class OnNonfinite(Choice):
    """How a run goes on after a step whose loss or gradient is NaN or infinite. Such an update is never applied."""

    stop = "stop"
    skip = "skip"


class CompileMode(Choice):
    """Whether the layers that learn are compiled."""

    none = "none"
    default = "default"
    max_autotune = "max-autotune"


class ClassTokenOnly(Choice):
    """Whether the last block computes the class token alone, on models that read no other token."""

    auto = "auto"
    off = "off"


@dataclass
class TrainConf:
    """The epoch loop."""

    epochs: int = setting(10, "passes over the training images", ge=1, le=1_000_000)
    accumulate: int = setting(1, "micro-batches that make one optimizer step", ge=1, le=1_000_000)
    clip_grad: float = setting(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    label_smoothing: float = setting(0.0, "share of each label spread over all classes", ge=0, lt=1)
    loss: Loss = setting(Loss.auto, "ce: one right class; bce: yes or no a class; asl: bce that forgets easy negatives")
    asl_gamma_pos: float = setting(0.0, "loss=asl: focusing exponent of present labels", ge=0)
    asl_gamma_neg: float = setting(4.0, "loss=asl: focusing exponent of absent labels", ge=0)
    asl_shift: float = setting(0.05, "loss=asl: probability under which an absent label costs nothing", ge=0, lt=1)
    metrics: list[str] = setting(["auto"], "metrics of val and test beside loss, top1; auto: all that suit the labels")
    monitor: str = setting(
        "auto",
        "metric that picks the best epoch; for loss and ece the lowest; auto: val/top1, or val/map (multi-label)",
    )
    recompute: bool = setting(False, "gradient checkpointing: less memory, but a second forward pass")
    class_token_only: ClassTokenOnly = setting(
        ClassTokenOnly.auto,
        "auto: the last block computes only the class token where no other is read (other rounding); off: all tokens",
    )
    compile: CompileMode = setting(CompileMode.none, "torch.compile: takes minutes; max-autotune: CUDA graphs too")
    patience: int = setting(0, "stop after this many epochs without a better monitor; 0: never", ge=0)
    ema: float = setting(0.0, "decay of an average of the weights; the better of both is saved; 0: off", ge=0, lt=1)
    ema_warmup: bool = setting(True, "ema: decay min(ema, (1 + step) / (10 + step)): it forgets the first steps")
    save_every_steps: int = setting(0, "save within an epoch every N optimizer steps; 0: at ends of epochs only", ge=0)
    save_every_minutes: float = setting(0.0, "save within an epoch N minutes after a save; 0: never", ge=0)
    max_save_share: float = setting(0.05, "share of the time that saves may take; an epoch may go unsaved", gt=0, le=1)
    keep: int = setting(1, "number of best epochs whose weights stay; above 1, each also in a file of its own", ge=1)
    on_nonfinite: OnNonfinite = setting(OnNonfinite.stop, "after a NaN or infinite loss or gradient: stop, or skip it")
    max_nonfinite: int = setting(10, "on_nonfinite=skip: stop nevertheless after more bad steps than this", ge=1)


# The metrics that `train.metrics` can name: for images with one label, and for images with several.
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
        expected = f"expected one of {', '.join(monitors)}{nearest(train.monitor, monitors)}"
        problems.append(f"train.monitor={train.monitor}: {expected}")
    if train.compile == CompileMode.max_autotune and train.accumulate > 1:
        reason = "CUDA graphs overwrite the gradients of earlier micro-batches"
        mend = "use train.compile=default, or train.accumulate=1 with a larger data.batch_size"
        both = f"train.compile=max-autotune with train.accumulate={train.accumulate}"
        problems.append(f"{both}: {reason}; {mend}")
    reasons = {}
    if not train.ema:
        reasons["ema_warmup"] = "it needs train.ema, such as train.ema=0.9998"
    if train.on_nonfinite == OnNonfinite.stop:
        reasons["max_nonfinite"] = "it needs train.on_nonfinite=skip"
    if train.loss != Loss.asl:
        reasons |= dict.fromkeys(("asl_gamma_pos", "asl_gamma_neg", "asl_shift"), "it needs train.loss=asl")
    return problems + ignored("train", train, reasons)


def without_val_problems(train: TrainConf) -> list[str]:
    """The settings that only validation images give a meaning, one line each, for a run without such images."""
    why = "it compares epochs on validation images, and there are none (data.val_fraction cuts some)"
    return ignored("train", train, dict.fromkeys(("monitor", "patience", "keep"), why))


def measured_metrics(train: TrainConf, *, is_multilabel: bool) -> tuple[tuple[str, ...], str]:
    """The metrics to measure and the one that picks the best epoch, with every `auto` filled in: (names, monitor).

    A metric of the other kind of labels is a UserError.
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
