"""Every optimizer steps by its published rule at its layer's rate, learns nothing from a bad step, resumes exactly."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import small_images, small_model
from tiny import tiny_batches, tiny_model
from tiny_runs import SIZES, load_state, save_state, tiny_fit, tiny_state
from torch import Tensor

from finetune import SchedulerConf, create_scheduler
from finetune.app.run import run
from finetune.config import OPTIMIZERS, Conf, OptimConf, TrainConf, find_problems
from finetune.config.words.configuration import compose
from finetune.core.cost import optimizer_bytes
from finetune.core.freezing import freeze
from finetune.core.layers import LayeredModel
from finetune.core.loop import TrainState, train_step
from finetune.core.optim import build_optimizer, is_hidden_matrix, param_groups
from finetune.runs.history import timeless

ROOT = Path(__file__).parent.parent.parent
FUSED = ("adamw", "sgd")
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None, reason="not installed"
        ),
    )
    for kind in OPTIMIZERS
]
OF_TIMM = ("lamb", "adan", "madgrad", "nadamuon", "sgdp")  # a few of timm's, of different kinds
each_kind_and_some_of_timm = pytest.mark.parametrize("kind", [*KINDS, *OF_TIMM])
each_kind = pytest.mark.parametrize("kind", KINDS)


def conf_of(kind: str, **changes: object) -> OptimConf:
    """As `optim=KIND` says, with every part of the rule at work."""
    conf = compose([f"optim={kind}"]).optim if kind in OPTIMIZERS else OptimConf(name=kind)
    return dataclasses.replace(conf, **{"layer_decay": 0.5, "weight_decay": 0.1, **changes})  # type: ignore[arg-type]


def trace(state: TrainState) -> tuple[dict, dict]:
    """Weights and the optimizer's whole state."""
    return copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()))


def assert_same(ours: object, theirs: object, where: str = "") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(ours, dict):
        assert isinstance(theirs, dict) and ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert isinstance(theirs, (list, tuple)) and len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    elif isinstance(ours, Tensor):
        assert isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


# --- a step is the published rule's, at the layer's rate --------------------------------------------------------------

Rule = Callable[[Tensor, Tensor, dict, int, float, float, OptimConf], Tensor]


def adamw(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    b1, b2 = conf.betas
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    step = state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + conf.eps)
    return w * (1 - lr * decay) - lr * step


def sgd(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    g = g + decay * w
    state["m"] = conf.momentum * state.get("m", 0) + g
    return w - lr * (g + conf.momentum * state["m"] if conf.nesterov else state["m"])


def lion(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    """Algorithm 2 of arXiv:2302.06675."""
    b1, b2 = conf.betas
    m = state.get("m", torch.zeros_like(w))
    step = torch.sign(b1 * m + (1 - b1) * g)
    state["m"] = b2 * m + (1 - b2) * g
    return w - lr * (step + decay * w)


def adafactor(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    """Algorithms 4 and 5 of arXiv:1804.04235, relative step, with a decoupled decay; epsilon1 never matters here."""
    beta2 = 1 - t**-0.8
    if w.ndim > 1:
        state["r"] = beta2 * state.get("r", 0) + (1 - beta2) * (g**2).mean(-1, keepdim=True)
        state["c"] = beta2 * state.get("c", 0) + (1 - beta2) * (g**2).mean(-2, keepdim=True)
        v = state["r"] * state["c"] / state["r"].mean(-2, keepdim=True)
    else:
        v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    step = g / v.sqrt()
    step = step / max(1.0, (step**2).mean().sqrt().item())
    alpha = max(1e-3, (w**2).mean().sqrt().item()) * min(lr, t**-0.5)
    return w * (1 - lr * decay) - alpha * step


def nadamw(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    """What timm's Muon does to all that is no hidden matrix: AdamW that looks one step of momentum ahead."""
    b1, b2 = conf.betas
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    ahead = b1 * state["m"] + (1 - b1) * g
    return w * (1 - lr * decay) - lr * ahead / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + conf.eps)


def muon(w: Tensor, g: Tensor, state: dict, t: int, lr: float, decay: float, conf: OptimConf) -> Tensor:
    """Jordan's, with timm's quintics in bfloat16; the step as long as AdamW's (arXiv:2502.16982, eq. 4)."""
    quintics = [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]
    state["m"] = conf.momentum * state.get("m", 0) + (1 - conf.momentum) * g
    x = ((1 - conf.momentum) * g + conf.momentum * state["m"] if conf.nesterov else state["m"]).float().bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for one, two, three in quintics:
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=two, alpha=three), x, beta=one)
    x = x.T if tall else x
    return w * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(w.shape)) * x.double()


RULES: dict[str, Rule] = {"adamw": adamw, "adamw8bit": adamw, "sgd": sgd, "lion": lion, "adafactor": adafactor}
RULES["muon"] = nadamw  # of what is no hidden matrix


@each_kind
@pytest.mark.parametrize("fused", [True, False])
def test_three_steps_equal_a_hand_computation(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        if kind not in (*FUSED, "muon"):
            pytest.skip("has no fused kernels to do without")
        monkeypatch.setattr("finetune.core.optim.fused_devices", lambda: ["cuda"])
    model = tiny_model()
    conf = conf_of(kind, lr=0.01, nesterov=kind in ("sgd", "muon"))
    optimizer = build_optimizer(model, conf)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == (fused and kind in FUSED)
    weights = {name: p.detach().double() for name, p in model.net.named_parameters()}
    states: dict[str, dict] = {name: {} for name in weights}
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2, 3):
        for name, parameter in model.net.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            layer, is_matrix = model.layer_ids[name], parameter.ndim == 2 and name != "pos_embed"
            rule = muon if kind == "muon" and is_matrix and layer in (1, 2) else RULES[kind]
            rate, decay = 0.01 * 0.5 ** (3 - min(layer, 3)), 0.1 if is_matrix else 0.0
            weights[name] = rule(weights[name], parameter.grad.double(), states[name], t, rate, decay, conf)
        optimizer.step()
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-4, atol=2e-6, msg=name)


@each_kind
@pytest.mark.parametrize("network", ["vit", "clip-vit", "convnext"])
def test_groups_and_rates_are_the_same_with_every_optimizer(kind: str, network: str) -> None:
    model = small_model(network)
    conf = conf_of(kind, lr=0.3, layer_decay=0.7, fix_layer=0)
    freeze(model, 0)
    optimizer = build_optimizer(model, conf)
    scheduler = create_scheduler(SchedulerConf(mode="linear"), optimizer, 4)
    expected = {
        name: group
        for group in param_groups(model, dataclasses.replace(conf, name="adamw"))
        for name in group["param_names"]
    }
    optimizer.step()
    scheduler.step()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(expected)
    assert [group["layer_id"] for group in optimizer.param_groups] == sorted(
        g["layer_id"] for g in optimizer.param_groups
    )
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    parameters = dict(model.net.named_parameters())
    for group in optimizer.param_groups:
        assert [parameters[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]
        for name in group["param_names"]:
            same = expected[name]
            assert group["lr"] == same["lr"] * 0.75
            assert all(group[key] == same[key] for key in ("layer", "layer_id", "scale", "weight_decay"))
            is_muon = kind == "muon" and is_hidden_matrix(model, name)
            assert group["optimizer"] == ("muon" if is_muon else "adamw" if kind == "muon" else kind)


def test_muon_moves_the_matrices_between_stem_and_head() -> None:
    model = small_model("clip-vit")
    moved = {
        name
        for group in param_groups(model, conf_of("muon"))
        if group["optimizer"] == "muon"
        for name in group["param_names"]
    }
    shapes = {name: p.ndim for name, p in model.net.named_parameters()}
    wanted = {name for name in shapes if "resblocks" in name and shapes[name] == 2} | {"visual.proj"}
    assert moved == wanted and len(moved) == 3 * 4 + 1


@each_kind_and_some_of_timm
@pytest.mark.parametrize("fix_layer", [-1, 0, 1])
def test_frozen_parameters_never_move_and_the_others_do(kind: str, fix_layer: int) -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    tiny_fit(tiny_state(model, conf_of(kind, fix_layer=fix_layer)))
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, before[name]) == (model.layer_ids[name] <= fix_layer), name


# --- a bad step leaves no trace ---------------------------------------------------------------------------------------


@each_kind_and_some_of_timm
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(
    kind: str, first: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments and step counts; and training goes on as if the batch had not been there."""
    if not fused:
        monkeypatch.setattr("finetune.core.optim.fused_devices", lambda: ["cuda"])
    model = tiny_model(batch_norm=True)
    straight, state = tiny_state(copy.deepcopy(model), conf_of(kind)), tiny_state(model, conf_of(kind))
    state.guard.limit = 1
    batches = tiny_batches(SIZES)
    bad = (batches[1][0] * float("nan"), *batches[1][1:])
    if not first:
        train_step(state, batches[:1], TrainConf())
        train_step(straight, batches[:1], TrainConf())
    before = trace(state)
    train_step(state, [bad], TrainConf())
    assert_same(before[0], trace(state)[0])
    if not first:  # at the very first step a fused kernel makes moments; they are zero, as the next lines show
        assert_same(before[1], trace(state)[1])
    train_step(state, batches[2:3], TrainConf())
    train_step(straight, batches[2:3], TrainConf())
    assert_same(trace(straight), trace(state))
    # One more than the limit: nothing is learned from then on, good batch or bad.
    train_step(state, [bad], TrainConf())
    train_step(state, batches[3:], TrainConf())
    assert_same(trace(straight), trace(state))


@each_kind_and_some_of_timm
def test_the_fp16_scaler_skips_an_infinite_gradient(kind: str) -> None:
    state = tiny_state(tiny_model(), conf_of(kind), scaler=256.0)
    batches = tiny_batches(SIZES)
    train_step(state, batches[:1], TrainConf())
    before = trace(state)
    hook = state.model.net.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    train_step(state, batches[1:2], TrainConf())
    assert_same(before, trace(state))
    assert state.skipped == 1
    hook.remove()
    train_step(state, batches[2:3], TrainConf())
    assert not torch.equal(before[0]["net.head.weight"], state.model.net.head.weight)


# --- resume -----------------------------------------------------------------------------------------------------------


@each_kind_and_some_of_timm
@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(kind: str, stop_at: int, tmp_path: Path) -> None:
    straight_rows: list[dict] = []
    straight = tiny_state(tiny_model(dropout=0.3), conf_of(kind))
    assert tiny_fit(straight, rows=straight_rows)

    rows: list[dict] = []
    state = tiny_state(tiny_model(dropout=0.3), conf_of(kind))
    assert not tiny_fit(state, stop_at=stop_at, rows=rows)
    save_state(tmp_path / "last.pt", state)
    state = tiny_state(tiny_model(seed=1, dropout=0.3), conf_of(kind))
    load_state(tmp_path / "last.pt", state)
    assert tiny_fit(state, rows=rows)

    assert_same(trace(straight), trace(state))
    assert_same(timeless(straight_rows), timeless(rows))


def steps(model: LayeredModel, optimizer: torch.optim.Optimizer, network: str, count: int) -> None:
    model.eval()
    for _ in range(count):
        model(small_images(network)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@each_kind
@pytest.mark.parametrize("network", ["vit", "convnext"])
def test_state_survives_a_checkpoint_on_real_shapes(kind: str, network: str, tmp_path: Path) -> None:
    """Kernels of four dimensions, tensors large enough for 8 bits; the groups' names and settings come back too."""
    conf = conf_of(kind, fix_layer=0, lr=1e-3)
    one, other = tiny_state(small_model(network), conf), tiny_state(small_model(network), conf)
    steps(one.model, one.optimizer, network, 2)
    steps(other.model, other.optimizer, network, 1)  # elsewhere, above the same frozen stem
    save_state(tmp_path / "last.pt", one)
    load_state(tmp_path / "last.pt", other)
    for state in (one, other):
        steps(state.model, state.optimizer, network, 2)
    assert_same(trace(one), trace(other))
    for ours, theirs in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert all(
            ours[key] == theirs[key] for key in ("name", "layer", "layer_id", "scale", "param_names", "optimizer")
        )
    tensors = [value for held in other.optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    assert any(tensor.dtype == torch.uint8 for tensor in tensors) == (kind == "adamw8bit")


def test_moments_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "last.pt", tiny_state(tiny_model(), conf_of("sgd")))
    with pytest.raises(ValueError, match="was saved with optim=sgd"):
        load_state(tmp_path / "last.pt", tiny_state(tiny_model(), conf_of("lion")))


# --- cost -------------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("network", ["vit", "convnext"])
def test_memory_is_what_the_optimizer_holds(kind: str, network: str) -> None:
    conf = conf_of(kind, fix_layer=0)
    model = small_model(network)
    freeze(model, 0)
    optimizer = build_optimizer(model, conf)
    steps(model, optimizer, network, 1)
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step" and not name.startswith("qmap")
    )
    assert optimizer_bytes(model.to("meta"), conf) == held


def test_sgd_without_momentum_keeps_nothing() -> None:
    model, conf = tiny_model(), conf_of("sgd", momentum=0.0)
    tiny_fit(tiny_state(model, conf))
    assert optimizer_bytes(model, conf) == 0
    assert not tiny_state(model, conf).optimizer.state_dict()["state"]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_optimizer_has_its_yaml() -> None:
    files = {path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml")}
    assert files == set(OPTIMIZERS)
    for name in files:
        conf = compose([f"optim={name}"])
        assert conf.optim.name == name and not find_problems(conf)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim=sgd", "optim.betas=[0.9,0.99]"], ["optim.betas=[0.9,0.99]", "optim=sgd", "optim=lion"]),
        (["optim=adafactor", "optim.eps=1e-6"], ["optim.eps=1e-06", "optim=adafactor", "optim=adamw "]),
        (["optim=lion", "optim.eps=1e-6"], ["optim.eps", "optim=lion does not read it"]),
        (["optim.momentum=0.5"], ["optim.momentum=0.5", "optim=adamw does not", "optim=sgd or optim=muon does"]),
        (["optim.nesterov=true"], ["optim.nesterov=true", "optim=sgd or optim=muon"]),
        (["optim=sgd", "optim.nesterov=true", "optim.momentum=0"], ["needs optim.momentum above 0"]),
        (["optim=lion", "optim.betas=[0.9,1.0]"], ["optim.betas=[0.9, 1.0]", "less than 1"]),
    ],
)  # fmt: skip
def test_a_setting_that_the_optimizer_ignores_is_an_error(words: list[str], expected: list[str]) -> None:
    from finetune.system.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        compose(words)
    (problem,) = error.value.problems
    assert all(part in problem for part in expected), problem


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"optim\.name=lion_: no optimizer has that name \(did you mean 'lion'"):
        build_optimizer(model, OptimConf(name="lion_"))
    with pytest.raises(ValueError, match="needs second derivatives"):
        build_optimizer(model, OptimConf(name="adahessian"))
    with pytest.raises(ValueError, match=r"optim\.betas=\[0\.9, 0\.99\] does not fit optim\.name=adan"):
        build_optimizer(model, OptimConf(name="adan", betas=[0.9, 0.99]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optim\.nesterov=True does not fit optim\.name=lamb"):
        build_optimizer(model, OptimConf(name="lamb", nesterov=True))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.optim", None)
        with pytest.raises(ValueError, match="bitsandbytes, which is not installed: pip install 'finetune"):
            build_optimizer(model, conf_of("adamw8bit"))
    with pytest.raises(ValueError, match="runs on cpu, cuda and xpu, and not on meta"):
        build_optimizer(tiny_model().to("meta"), conf_of("adamw8bit"))
    freeze(model, 2)
    with pytest.raises(ValueError, match="no matrix between stem and head learns"):
        build_optimizer(model, conf_of("muon"))


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])  # tests/test_run.py has AdamW's
def test_it_learns_the_digits_with_its_own_settings(kind: str, tmp_path: Path) -> None:
    """A new head on the bundled network: nothing is known of the digits before the first step."""
    words = ["model=vit", "augment=none", "sched=cosine_pi", "train.epochs=2"]
    few = ["data.fraction=0.4", "data.batch_size=16", "data.workers=0"]
    conf: Conf = compose([f"optim={kind}", *words, *few])
    result = run(conf, tmp_path, [], quiet=True)
    assert result["val/top1"] > 0.9 and result["test/top1"] > 0.9
    rates = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["lr"]
    assert rates["head.decay"] == pytest.approx(conf.optim.lr)
    assert len(set(rates.values())) == 8
