"""Other people's recipes for `bench_quality.py`, each rewritten from its documented steps. docs/quality.md lists them.

Every arm gets a `Ready` and gives an `Outcome`. Whatever it chooses among, it chooses by validation; the test images
are scored once, under the chosen weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from quality_tasks import CropView, LightView, Ready, View
from torch import Tensor, nn

from finetune.core.layers import LayeredModel
from finetune.models.heads.head import find_head
from finetune.models.heads.probe import features_of

NO_AUGMENT, LIGHT = View(), LightView()


@dataclass
class Outcome:
    """What a cell found: shares of right answers, and which setting validation chose."""

    test: float
    val: float
    chosen: str
    seconds: float  # of training the chosen setting
    steps: int
    tried: dict[str, float] = field(default_factory=dict)  # setting -> val


@dataclass
class Trained:
    """One setting's run: the weights that its own rule keeps, and their validation score."""

    model: LayeredModel
    top1: float
    loss: float
    steps: int


@torch.inference_mode()
def score(model: nn.Module, given: Ready, split: str) -> tuple[float, float]:
    """Share of right answers and mean loss."""
    model.eval()
    pictures = given.splits[split]
    parts = pictures.squares.split(256)
    logits = torch.cat([model(given.normalize(part)) for part in parts])
    right = (logits.argmax(1) == pictures.labels).double().mean().item()
    return right, F.cross_entropy(logits, pictures.labels).item()


def fit(
    given: Ready,
    model: LayeredModel,
    optimizer: torch.optim.Optimizer,
    *,
    view: View,
    epochs: int,
    rate: Callable[[float], None] = lambda epoch: None,
    by_step: bool = False,
    keep: str = "last",
    smoothing: float = 0.0,
    clip: float = 0.0,
) -> Trained:
    """A training loop with a validation after each epoch.

    Args:
        given: The task.
        model: Starts as it is.
        optimizer: Over its parameters.
        view: How training images are shown.
        epochs: Passes over the training images.
        rate: Sets the rates for a moment of the run, in epochs.
        by_step: Call `rate` before each step; else before each epoch.
        keep: `last` epoch, or the best one by `top1` or `loss`; of equal ones the first.
        smoothing: Of labels.
        clip: Largest norm of the gradient; 0: none.
    """
    best: tuple[float, dict[str, Tensor], tuple[float, float]] | None = None
    steps = 0
    for epoch in range(epochs):
        batches = batches_an_epoch(given)
        rate(epoch)
        model.train()
        for number, (images, labels) in enumerate(given.batches(view, epoch)):
            if by_step:
                rate(epoch + number / batches)
            loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            steps += 1
        top1, val_loss = score(model, given, "val")
        value = {"last": float(epoch), "top1": top1, "loss": -val_loss}[keep]
        if best is None or value > best[0]:
            best = value, copy.deepcopy(model.state_dict()), (top1, val_loss)
    assert best is not None
    model.load_state_dict(best[1])
    return Trained(model, *best[2], steps)


def batches_an_epoch(given: Ready) -> int:
    """The number of batches of an epoch."""
    images, size = len(given.splits["train"]), given.task.batch_size
    return max(1, images // size + (images % size > 1))


def search(given: Ready, settings: Iterable[Any], train: Callable[[Any], Trained]) -> Outcome:
    """Train every setting, keep the best on validation (of equal ones that with the lowest loss), score test once."""
    best: tuple[tuple[float, float], Trained, str, float] | None = None
    tried = {}
    for setting in settings:
        began = time.monotonic()
        trained = train(setting)
        seconds = time.monotonic() - began
        name = str(setting)
        tried[name] = trained.top1
        value = trained.top1, -trained.loss
        if best is None or value > best[0]:
            best = value, trained, name, seconds
    assert best is not None
    _, trained, name, seconds = best
    return Outcome(score(trained.model, given, "test")[0], trained.top1, name, seconds, trained.steps, tried)


# lr, layer decay (1.0: none). The rates of timm's ViT and CLIP fine-tunes lie within, and the best of issue 17's table.
TIMM = ((3e-4, 1.0), (1e-3, 1.0), (1e-3, 0.75), (3e-3, 0.75), (3e-3, 0.65))


def timm_recipe(given: Ready, view: View, epochs: int, settings: Iterable[Any] = TIMM) -> Outcome:
    """Timm's `train.py` (1.0.31): AdamW, decay 0.05 of matrices, 5 epochs of warmup, cosine, smoothing 0.1, best top1.

    `--opt adamw --weight-decay .05 --layer-decay D --lr LR --sched cosine`, the rest as it comes. Its schedule is
    stepped once an epoch, and its saver keeps the best top1. Its loader would drop the last batch, which on a hundred
    images is a third of them: here it is kept, as in the other arms.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    def train(setting: tuple[float, float]) -> Trained:
        lr, decay = setting
        model = given.fresh_model()
        net = model.net
        target: Any = net if hasattr(net, "group_matcher") or decay == 1 else _groups(model, decay)
        more = {"layer_decay": decay if decay < 1 else None} if isinstance(target, nn.Module) else {}
        optimizer = create_optimizer_v2(target, opt="adamw", lr=lr, weight_decay=0.05, **more)
        warmup = min(5, epochs // 2)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-5, min_lr=0
        )
        return fit(given, model, optimizer, view=view, epochs=epochs, rate=scheduler.step,
                   keep="top1", smoothing=0.1)  # fmt: skip

    return search(given, settings, train)


def _groups(model: LayeredModel, decay: float) -> list[dict[str, Any]]:
    """Timm's groups for a network that timm does not know (open_clip's tower): `lr_scale` by the distance to the head.

    Timm counts the last norm with the last block.
    """
    top = len(model.layers) - 2  # the head's number once the readout has the last block's
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.net.named_parameters():
        layer = model.layer_ids[name]
        number = top if layer == len(model.layers) - 1 else min(layer, top - 1)
        decayed = parameter.ndim > 1 and "positional_embedding" not in name
        new = {"params": [], "lr_scale": decay ** (top - number), "weight_decay": 0.05 if decayed else 0.0}
        groups.setdefault((number, decayed), new)["params"].append(parameter)
    return list(groups.values())


TRANSFORMERS = (2e-5, 5e-5, 2e-4, 1e-3, 3e-3)  # the README's, Trainer's default, and larger ones


def transformers_example(given: Ready, epochs: int, settings: Iterable[Any] = TRANSFORMERS) -> Outcome:
    """`run_image_classification.py` of transformers: AdamW without decay, linear to 0 by step, clip 1, lowest val loss.

    Views: random resized crop and mirror image. The example's README passes `--load_best_model_at_end True`.
    """

    def train(lr: float) -> Trained:
        model = given.fresh_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        return fit(given, model, optimizer, view=CropView(0.0), epochs=epochs, keep="loss", clip=1.0, by_step=True,
                   rate=_linear(optimizer, lr, epochs))  # fmt: skip

    return search(given, settings, train)


def _linear(optimizer: torch.optim.Optimizer, lr: float, epochs: int) -> Callable[[float], None]:
    def rate(epoch: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)

    return rate


PLAIN = (1e-4, 3e-4, 1e-3)


def plain_loop(given: Ready, epochs: int, settings: Iterable[Any] = PLAIN) -> Outcome:
    """The loop of a tutorial: AdamW as torch has it, a constant rate, no augmentation, the last epoch."""

    def train(lr: float) -> Trained:
        model = given.fresh_model()
        return fit(given, model, torch.optim.AdamW(model.parameters(), lr=lr), view=NO_AUGMENT, epochs=epochs)

    return search(given, settings, train)


PENALTIES = tuple(10.0**k for k in range(-5, 4))  # scikit-learn's C: the inverse of the penalty


@torch.inference_mode()
def frozen_features(given: Ready, model: LayeredModel, split: str) -> Tensor:
    """What the head reads, without augmentation. -> (images, features)."""
    model.eval()
    return torch.cat([features_of(model, given.normalize(part)) for part in given.splits[split].squares.split(256)])


def fitted(given: Ready, model: LayeredModel) -> tuple[Any, tuple[float, float], str, dict[str, float]]:
    """Logistic regression on standardised frozen features, its penalty by validation: top1, then loss."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, val = (frozen_features(given, model, split).numpy() for split in ("train", "val"))
    y, val_y = (given.splits[split].labels.numpy() for split in ("train", "val"))
    best: tuple[tuple[float, float], Any, str] | None = None
    tried = {}
    for penalty in PENALTIES:
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000)).fit(x, y)
        top1 = float(pipe.score(val, val_y))
        value = top1, -float(log_loss(val_y, pipe.predict_proba(val), labels=pipe.classes_))
        tried[f"C={penalty:g}"] = top1
        if best is None or value > best[0]:
            best = value, pipe, f"C={penalty:g}"
    assert best is not None
    return best[1], best[0], best[2], tried


def logistic(given: Ready, epochs: int) -> Outcome:
    """The probe that everybody can fit with scikit-learn."""
    began = time.monotonic()
    model = given.fresh_model()
    pipe, (top1, _), name, tried = fitted(given, model)
    seconds = time.monotonic() - began
    test = float(pipe.score(frozen_features(given, model, "test").numpy(), given.splits["test"].labels.numpy()))
    return Outcome(test, top1, name, seconds, 0, tried)


LP_FT = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def lp_ft(given: Ready, epochs: int, settings: Iterable[Any] = LP_FT) -> Outcome:
    """LP-FT (arXiv:2202.10054): the fitted probe is the first head, then all layers with AdamW and a cosine.

    Views as the application's default; the best top1 on validation is kept.
    """
    probe = fitted(given, given.fresh_model())[0]
    scaler, regression = probe[0], probe[1]
    weight = torch.from_numpy(regression.coef_ / scaler.scale_).float()
    bias = torch.from_numpy(regression.intercept_).float() - weight @ torch.from_numpy(scaler.mean_).float()

    def train(lr: float) -> Trained:
        model = given.fresh_model()
        find_head(model.net).set(weight, bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)

        def rate(epoch: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / epochs)).item())

        return fit(given, model, optimizer, view=LIGHT, epochs=epochs, rate=rate, by_step=True, keep="top1")

    return search(given, settings, train)


ARMS: dict[str, Callable[..., Outcome]] = {
    "timm": lambda given, epochs, **named: timm_recipe(given, CropView(0.4), epochs, **named),
    "timm-light": lambda given, epochs, **named: timm_recipe(given, LIGHT, epochs, **named),
    "transformers": transformers_example,
    "plain": plain_loop,
    "logistic": logistic,
    "lp-ft": lp_ft,
}
