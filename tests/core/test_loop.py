"""The loop equals a plain 20-line reference loop, weighs images right, and learns from no loss that is not finite."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_batches, tiny_model
from tiny_runs import SIZES, load_state, save_state, tiny_fit, tiny_state
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import SchedulerConf, create_scheduler
from finetune.config import OptimConf, TrainConf
from finetune.core.ema import Ema
from finetune.core.finite import NotFiniteError
from finetune.core.fit import Validation, _note_best, fit, is_better, validate
from finetune.core.loop import train_step
from finetune.core.losses import cross_entropy
from finetune.core.metrics import LabelMeter, Sums, top5
from finetune.core.optim import build_optimizer
from finetune.runs.epoch_files import best_epochs, score_of
from finetune.runs.history import timeless


def test_nothing_ahead_of_the_first_layer_gets_gradients() -> None:
    model = tiny_model()
    ((images, targets, ids),) = tiny_batches([4], seed=0)
    with pytest.raises(AssertionError, match="run on into layers that are frozen"):
        train_step(tiny_state(model), [(images.requires_grad_(), targets, ids)], TrainConf())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a value asked for, or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_step_asks_the_device_for_nothing(clip_grad: float) -> None:
    """Fused AdamW, as on a GPU; a step that skips itself by the mask, too. And validation, until its end."""
    state = tiny_state(tiny_model())
    assert state.optimizer.defaults["fused"]
    state.guard.limit = 3
    batches = tiny_batches([4, 4, 4], seed=0)
    with Waits() as waits:
        assert torch.ones(()).item() and len(waits.seen) == 1  # it does see one
        waits.seen.clear()
        for images, targets, ids in batches:
            train_step(state, [(images, targets, ids)], TrainConf(clip_grad=clip_grad))
        poisoned = torch.full_like(batches[0][0], torch.nan)
        train_step(state, [(poisoned, *batches[0][1:])], TrainConf(clip_grad=clip_grad))
        assert waits.seen == []
        meter = LabelMeter(cross_entropy)
        for images, targets, _ in batches:
            meter.add(state.model(images), targets)
        assert waits.seen == []
        state.guard.look()
    assert len(state.guard.take()) == 1


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_equals_a_plain_reference_loop(interval: str) -> None:
    model = tiny_model(dropout=0.2)
    reference = copy.deepcopy(model)
    rows: list[dict] = []
    tiny_fit(
        tiny_state(model, interval=interval),
        TrainConf(epochs=3, clip_grad=0.5, label_smoothing=0.1),
        rows=rows,
    )

    optimizer = build_optimizer(reference, OptimConf(lr=0.02, layer_decay=0.7))
    scheduler = create_scheduler(
        SchedulerConf(mode="cosine_pi", interval=interval), optimizer, 3 if interval == "epoch" else 12
    )
    torch.manual_seed(5)
    losses = []
    for epoch in range(3):
        reference.train()
        total = 0.0
        for images, labels, _ in tiny_batches(SIZES, seed=epoch):
            loss = F.cross_entropy(reference(images), labels, label_smoothing=0.1, reduction="sum") / len(labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            total += loss.item() * len(labels)
            if interval == "step":
                scheduler.step()
        losses.append(total / sum(SIZES))
        if interval == "epoch":
            scheduler.step()

    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-6)


def test_accumulation_weighs_every_image_alike() -> None:
    """Micro-batches of 8, 8, 8 and 3 in one window give the gradient of the one batch of 27."""
    model = tiny_model()
    whole = copy.deepcopy(model)
    batches = tiny_batches(SIZES)
    together = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    train_step(tiny_state(model), batches, TrainConf(accumulate=4))
    train_step(tiny_state(whole), [together], TrainConf())
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fix_layer", [-1, 0, 2, 3])
def test_frozen_parameters_are_bitwise_unchanged_and_the_others_learn(fix_layer: int) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    tiny_fit(tiny_state(model, fix_layer=fix_layer), TrainConf(epochs=1))
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, before[name]) == (model.layer_ids[name] <= fix_layer), name


def test_the_loop_overfits_a_handful_of_images() -> None:
    model = tiny_model()
    state = tiny_state(model, epochs=60)
    rows: list[dict] = []
    fit(
        state,
        TrainConf(epochs=60),
        train_batches=lambda epoch, skip: tiny_batches([8]),
        validation=Validation(lambda meter: tiny_batches([8])),
        on_step_end=lambda state: False,
        on_epoch_end=lambda state, row: rows.append(row),
    )
    assert rows[-1]["val/top1"] == 1.0
    assert rows[-1]["val/loss"] < 0.2 * rows[0]["val/loss"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_images(poison: str) -> None:
    model = tiny_model()
    state = tiny_state(model)
    batches = tiny_batches(SIZES)
    train_step(state, batches[:1], TrainConf())
    before = copy.deepcopy((model.state_dict(), state.optimizer.state_dict()))
    images, labels, ids = batches[1]
    if poison == "loss":
        images[3] = float("nan")
    else:
        model.net.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFiniteError) as error:
        fit(
            state,
            TrainConf(epochs=1),
            train_batches=lambda epoch, skip: [(images, labels, ids), *batches[2:]],
            validation=Validation(lambda meter: batches),
            on_step_end=lambda state: False,
            on_epoch_end=lambda state, row: None,
        )
    assert error.value.record.step == 2
    assert error.value.record.ids.tolist() == list(range(8, 16))
    after = (model.state_dict(), state.optimizer.state_dict())
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    for index, moments in before[1]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, after[1]["state"][index][name]), name


def test_later_steps_do_not_learn_either_before_the_host_has_looked() -> None:
    """On a GPU the host looks rarely: the sticky flag must mask every update in between."""
    model = tiny_model()
    state = tiny_state(model)
    batches = tiny_batches(SIZES)
    batches[1][0][0] = float("inf")
    train_step(state, batches[:1], TrainConf())
    before = copy.deepcopy(model.state_dict())
    train_step(state, batches[1:2], TrainConf())
    train_step(state, batches[2:3], TrainConf())
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(NotFiniteError) as error:
        state.guard.look()
    assert error.value.record.step == 2


def test_bad_steps_are_skipped_up_to_a_limit_and_leave_no_trace() -> None:
    """As if the bad batch had not been there, running statistics of BatchNorm included."""
    model = tiny_model(batch_norm=True)
    state, straight = tiny_state(model), tiny_state(copy.deepcopy(model))
    state.guard.limit = 1
    for each in (state, straight):
        each.ema = Ema(each.model, 0.9, warmup=False)
    batches = tiny_batches(SIZES)
    for batch in (batches[0], batches[2]):
        train_step(straight, [batch], TrainConf())
    bad = (batches[1][0] * float("nan"), *batches[1][1:])
    for batch in (batches[0], bad, batches[2]):
        train_step(state, [batch], TrainConf())
    state.guard.look()
    (found,) = state.guard.take()
    assert (found.epoch, found.step, found.batch, found.ids.tolist()) == (0, 2, 1, list(range(8, 16)))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name
    assert state.ema is not None and straight.ema is not None
    averages = copy.deepcopy(straight.ema.state_dict())
    assert all(torch.equal(value, state.ema.state_dict()[name]) for name, value in averages.items())

    train_step(state, [bad], TrainConf())
    train_step(state, [batches[3]], TrainConf())
    with pytest.raises(NotFiniteError, match="after 1 such") as error:
        state.guard.look()
    assert error.value.record.step == 4
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name
    assert all(torch.equal(value, state.ema.state_dict()[name]) for name, value in averages.items())


def test_a_step_that_the_fp16_scaler_skips_moves_no_average() -> None:
    model = tiny_model()
    state = tiny_state(model, scaler=2.0**20)
    state.ema = Ema(model, 0.5, warmup=False)
    batches = tiny_batches(SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # so that an average would move, though no step is taken
    before = copy.deepcopy(state.ema.state_dict())
    handle = model.net.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    train_step(state, batches[:1], TrainConf())
    assert state.skipped == 1
    assert all(torch.equal(value, state.ema.state_dict()[name]) for name, value in before.items())
    handle.remove()
    train_step(state, batches[1:2], TrainConf())
    assert not all(torch.equal(value, state.ema.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 11, 12])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(stop_at: int, interval: str, tmp_path: Path) -> None:
    conf = TrainConf(epochs=3)
    straight_rows: list[dict] = []
    straight = tiny_state(tiny_model(dropout=0.3), interval=interval)
    tiny_fit(straight, conf, rows=straight_rows)

    rows: list[dict] = []
    state = tiny_state(tiny_model(dropout=0.3), interval=interval)
    assert not tiny_fit(state, conf, stop_at=stop_at, rows=rows)
    save_state(tmp_path / "last.pt", state)
    state = tiny_state(tiny_model(seed=1, dropout=0.3), interval=interval)  # other weights: all must come from the file
    load_state(tmp_path / "last.pt", state)
    assert tiny_fit(state, conf, rows=rows)

    for (name, ours), theirs in zip(state.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(
        state.optimizer.state_dict()["state"].values(), straight.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert timeless(rows) == timeless(straight_rows)


def test_patience_stops_and_the_best_epoch_is_kept() -> None:
    state = tiny_state(tiny_model(), epochs=50)
    rows: list[dict] = []
    tiny_fit(state, TrainConf(epochs=50, patience=3), rows=rows, monitor="val/loss")
    losses = [row["val/loss"] for row in rows]
    assert state.best_epoch == losses.index(min(losses)) + 1
    assert state.epoch == len(rows) == state.best_epoch + 3 < 50


def test_scores_compare_by_the_monitors_direction() -> None:
    nan = float("nan")
    assert is_better(0.9, nan, "val/top1")
    assert is_better(0.9, 0.8, "val/top1")
    assert not is_better(0.8, 0.8, "val/top1")
    assert is_better(0.1, 0.2, "val/loss")
    assert not is_better(nan, 0.2, "val/loss")
    assert not is_better(nan, nan, "val/top1")
    assert is_better(0.8, 0.8, "val/top1", loss=0.1, best_loss=0.2)
    assert is_better(0.3, 0.3, "val/ece", loss=0.1, best_loss=nan)
    assert not is_better(0.8, 0.8, "val/top1", loss=0.2, best_loss=0.2)
    assert not is_better(0.8, 0.8, "val/top1", loss=nan, best_loss=0.2)
    assert not is_better(0.7, 0.8, "val/top1", loss=0.1, best_loss=0.2)


def test_among_equal_scores_the_lower_loss_is_the_best_epoch() -> None:
    """By the state, which a checkpoint carries, and by the rows, which rank the files of `train.keep` epochs."""
    rows: list[dict[str, Any]] = []
    losses = iter([0.5, 0.3, 0.4, 0.3, 0.9, 0.2])
    scores = iter([0.8, 0.8, 0.8, 0.8, 0.9, 0.8])
    state = tiny_state(tiny_model())
    best = []
    for epoch in range(1, 7):
        state.epoch = epoch
        rows.append({"epoch": epoch, "val/top1": next(scores), "val/loss": next(losses)})
        _note_best(state, rows[-1], "val/top1")
        best.append(state.best_epoch)
    assert best == [1, 2, 2, 2, 5, 5]
    assert state.best_loss == 0.9
    assert best_epochs(rows, "val/top1", 6) == [5, 6, 2, 4, 3, 1]


def test_of_weights_and_averages_with_one_score_the_lower_loss_is_kept() -> None:
    state = tiny_state(tiny_model())
    state.ema = Ema(state.model, 0.5)
    state.epoch = 1
    row = {"epoch": 1, "val/top1": 0.8, "val/loss": 0.5, "val_ema/top1": 0.8, "val_ema/loss": 0.4}
    _note_best(state, row, "val/top1")
    assert state.best_is_ema and state.best_loss == 0.4 and score_of(row, "val/top1") == (0.8, 0.4, True)
    row |= {"val_ema/loss": 0.6}
    assert score_of(row, "val/top1") == (0.8, 0.5, False)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("batch_size", [1, 4, 8, 64])
def test_validation_is_exact_over_uneven_last_batches(size: int, batch_size: int) -> None:
    model = tiny_model().eval()
    images, labels, ids = tiny_batches([size])[0]
    batches = list(zip(images.split(batch_size), labels.split(batch_size), ids.split(batch_size), strict=True))
    result = validate(model, batches, contextlib.nullcontext())
    with torch.no_grad():
        logits = model(images)
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-12)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)


def test_top5_counts_the_five_highest() -> None:
    logits = torch.arange(10.0).repeat(3, 1)
    assert top5(logits, torch.tensor([9, 5, 4])).tolist() == [1.0, 1.0, 0.0]
    assert top5(logits[:, :3], torch.tensor([0, 1, 2])).tolist() == [1.0, 1.0, 1.0]


def test_sums_continue_from_their_state() -> None:
    values = torch.rand(20)
    straight, first, second = (Sums(torch.device("cpu")) for _ in range(3))
    straight.add(loss=values[:12])
    straight.add(loss=values[12:])
    first.add(loss=values[:12])
    second.load_state_dict(first.state_dict())
    second.add(loss=values[12:])
    assert second.means() == straight.means()
