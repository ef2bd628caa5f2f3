"""The averages equal a hand computation, cost the weights nothing, resume to the last bit, and the better is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_batches, tiny_model
from tiny_runs import SIZES, load_state, save_state, tiny_fit, tiny_state

from finetune.app.run import run
from finetune.config import Conf, TrainConf
from finetune.core.ema import Ema
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState, train_step
from finetune.runs.history import timeless


def averaged(
    model: LayeredModel, decay: float = 0.9, *, warmup: bool = True, fix_layer: int = -1, interval: str = "epoch"
) -> TrainState:
    state = tiny_state(model, fix_layer=fix_layer, interval=interval)
    state.ema = Ema(model, decay, warmup=warmup)
    return state


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    assert state.ema is not None
    return {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}


@pytest.mark.parametrize("warmup", [True, False])
def test_averages_equal_a_hand_computation(warmup: bool) -> None:
    model = tiny_model()
    state = averaged(model, 0.6, warmup=warmup)
    expected = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    for step, batch in enumerate(tiny_batches(SIZES), start=1):
        train_step(state, [batch], TrainConf())
        decay = min(0.6, (1 + step) / (10 + step)) if warmup else 0.6
        for name, parameter in model.net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, average in tensors(state).items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)


def test_averaging_changes_no_weight_and_swapping_comes_back_to_the_last_bit() -> None:
    plain = tiny_state(tiny_model(dropout=0.3))
    tiny_fit(plain, TrainConf())
    state = averaged(tiny_model(dropout=0.3))
    tiny_fit(state, TrainConf(ema=0.9))
    for ours, theirs in zip(state.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    before, averages = {n: p.clone() for n, p in state.model.net.named_parameters()}, tensors(state)
    assert state.ema is not None
    with pytest.raises(KeyError), state.ema.swapped_in():
        assert all(torch.equal(p, averages[name]) for name, p in state.model.net.named_parameters())
        raise KeyError  # as where a signal ends a validation
    assert all(torch.equal(p, before[name]) for name, p in state.model.net.named_parameters())
    assert all(torch.equal(average, averages[name]) for name, average in tensors(state).items())


def test_what_is_frozen_is_not_averaged_and_running_statistics_are() -> None:
    state = averaged(tiny_model(batch_norm=True), fix_layer=1)
    assert not any(name.startswith(("stem", "pos_embed", "blocks.0")) for name in tensors(state))
    assert {"blocks.1.2.running_mean", "blocks.1.2.running_var"} <= set(tensors(state))


@pytest.mark.parametrize("stop_at", [1, 4, 6, 11, 12])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(stop_at: int, interval: str, tmp_path: Path) -> None:
    conf = TrainConf(epochs=3, ema=0.9)
    straight, straight_rows = averaged(tiny_model(dropout=0.3), interval=interval), []  # seeds: so one after the other
    tiny_fit(straight, conf, rows=straight_rows)
    state, rows = averaged(tiny_model(dropout=0.3), interval=interval), []
    assert not tiny_fit(state, conf, stop_at=stop_at, rows=rows)
    save_state(tmp_path / "last.pt", state)
    state = averaged(tiny_model(seed=1, dropout=0.3), interval=interval)
    load_state(tmp_path / "last.pt", state)
    assert tiny_fit(state, conf, rows=rows)
    expected = tensors(straight)
    assert all(torch.equal(average, expected[name]) for name, average in tensors(state).items())
    for ours, theirs in zip(state.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert timeless(rows) == timeless(straight_rows)
    assert (state.best_score, state.best_is_ema) == (straight.best_score, straight.best_is_ema)


def test_a_checkpoint_with_averages_is_not_read_without_them(tmp_path: Path) -> None:
    save_state(tmp_path / "last.pt", averaged(tiny_model()))
    with pytest.raises(ValueError, match="with averages"):
        load_state(tmp_path / "last.pt", tiny_state(tiny_model()))


def test_the_better_of_weights_and_averages_is_the_best_epoch() -> None:
    rows: list[dict] = []
    state = averaged(tiny_model(), 0.5)
    tiny_fit(state, TrainConf(epochs=3, ema=0.5), rows=rows, monitor="val/loss")
    scores = {(row["epoch"], name): row[name] for row in rows for name in ("val/loss", "val_ema/loss")}
    (epoch, name), score = min(scores.items(), key=lambda item: item[1])
    assert (state.best_epoch, state.best_is_ema, state.best_score) == (epoch, name == "val_ema/loss", score)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_makes_no_average_is_refused(decay: float) -> None:
    model = tiny_model()
    freeze(model, -1)
    with pytest.raises(ValueError, match=r"train\.ema"):
        Ema(model, decay)


def test_a_run_keeps_and_names_the_better_weights(tmp_path: Path) -> None:
    conf = Conf()
    conf.data.batch_size = 128
    conf.train.epochs, conf.train.ema, conf.optim.fix_layer = 2, 0.99, 6
    folder = tmp_path / "run"
    folder.mkdir()
    result = run(conf, folder, [], quiet=True)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    key = {"ema": "val_ema/top1", "raw": "val/top1"}[result["best_weights"]]
    assert result["val/top1"] == rows[result["best_epoch"] - 1][key]
    assert result["val/top1"] == max(max(row["val/top1"], row["val_ema/top1"]) for row in rows)
    assert "val_ema/top1" in (folder / "run.log").read_text()
