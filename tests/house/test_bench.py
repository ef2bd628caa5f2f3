"""The benchmark compares like with like: every loop does the same training. No clock is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
import bench_arms  # noqa: E402
import bench_machine  # noqa: E402
import bench_report  # noqa: E402
import bench_rivals  # noqa: E402
import bench_saving  # noqa: E402
from bench_task import (  # noqa: E402
    Pictures,
    Task,
    decoders_apart,
    levels_apart,
    make_images,
    our_model,
    picture,
    write_weights,
)

from finetune.config import DataConf, SourceKind  # noqa: E402
from finetune.data import open_source  # noqa: E402
from finetune.prefix import cache  # noqa: E402

VIEWS = ("augment=light", "augment.flip=0.5", "augment.views=2")


def make_task(folder: Path, **settings: Any) -> Task:
    make_images(folder / "images", 8, 4, size=(64, 64))
    task = Task(folder / "images", folder / "first.safetensors", "test_vit", epochs=3, batch_size=3, **settings)
    write_weights(task)
    return task


def outcome_of(arm: Any, task: Task, folder: Path, workers: int = 0) -> tuple[list[float], torch.Tensor]:
    folder.mkdir()
    flags = bench_arms.Flags(folder, workers=workers, same_pixels=True)
    outcome = arm(task, flags)
    return outcome.losses, bench_arms.final_logits(task, outcome)


@pytest.mark.parametrize("augment", [("augment=none",), VIEWS], ids=["resized", "views"])
@pytest.mark.parametrize("fix_layer", [-1, 3, 7], ids=["whole", "partly", "head"])
def test_every_loop_does_the_same_training(tmp_path: Path, fix_layer: int, augment: tuple[str, ...]) -> None:
    """From the same pixels every step's loss and the final logits agree within the rounding of fp32."""
    task = make_task(tmp_path, fix_layer=fix_layer, augment=augment)
    losses, logits = outcome_of(bench_arms.ours, task, tmp_path / "ours")
    assert len(losses) == 3 * 3
    assert losses[0] != pytest.approx(losses[-1], abs=1e-3), "nothing was learned: the comparison would say nothing"
    for arm in (bench_arms.plain, bench_arms.tuned, bench_rivals.with_timm):
        theirs, their_logits = outcome_of(arm, task, tmp_path / arm.__name__)
        assert theirs == pytest.approx(losses, abs=1e-5), arm.__name__
        assert (their_logits - logits).abs().max() < 1e-5, arm.__name__


@pytest.mark.parametrize("fix_layer", [-1, 3], ids=["whole", "partly"])
def test_ours_in_bf16_is_tuned_in_bf16(tmp_path: Path, fix_layer: int) -> None:
    """The frozen layers stored or computed every time: apart by bf16's rounding, which both do and fp32 does not.

    A logit, below 1 here, is rounded by up to 2**-9, and a loss moves by as much. Two runs in fp32 are within 1e-5.
    """
    full = make_task(tmp_path, fix_layer=fix_layer)
    half = replace(full, precision="bf16")
    exact, exact_logits = outcome_of(bench_arms.tuned, full, tmp_path / "fp32")
    theirs, their_logits = outcome_of(bench_arms.tuned, half, tmp_path / "tuned")
    losses, logits = outcome_of(bench_arms.ours, half, tmp_path / "ours")
    for rounded, rounded_logits in ((theirs, their_logits), (losses, logits)):
        assert max(abs(a - b) for a, b in zip(rounded, exact, strict=True)) > 1e-4, "this is fp32"
        assert (rounded_logits - exact_logits).abs().max() > 1e-5, "this is fp32"
    assert losses == pytest.approx(theirs, abs=2**-9)
    assert (logits - their_logits).abs().max() < 2**-9


def test_a_sweep_is_its_runs_with_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of layer_decay once, in turn, from the first weights; ours runs the frozen layers for the first only.

    That is once for each split; what is stored is the same, bit for bit, as what every run alone computes.
    """
    built: list[int] = []
    build = cache.build_in_memory
    monkeypatch.setattr(cache, "build_in_memory", lambda *given: built.append(1) or build(*given))
    decays = (0.5, 0.9)
    task = make_task(tmp_path, fix_layer=3, lr=1e-2, extra=("prefix.cache=ram",))
    for arm in (bench_arms.tuned, bench_arms.ours):
        name = arm.__name__
        runs = [outcome_of(arm, replace(task, layer_decay=decay), tmp_path / f"{name}{decay}") for decay in decays]
        assert (runs[0][1] - runs[1][1]).abs().max() > 1e-4, "the rates were the same"
        built.clear()
        losses, logits = outcome_of(bench_arms.sweep_of(arm, decays), task, tmp_path / name)
        assert losses == runs[0][0] + runs[1][0]
        assert torch.equal(logits, runs[1][1])
        assert len(built) == (3 if arm is bench_arms.ours else 0), name


def test_workers_change_nothing(tmp_path: Path) -> None:
    """Order and views of the other loops are asked for by key, so processes that live on see every epoch's."""
    task = make_task(tmp_path, fix_layer=3, augment=VIEWS)
    for arm in (bench_arms.tuned, bench_rivals.with_timm):
        alone = outcome_of(arm, task, tmp_path / f"{arm.__name__}0")
        helped = outcome_of(arm, task, tmp_path / f"{arm.__name__}2", workers=2)
        assert alone[0] == helped[0]


def test_transformers_does_the_same_training(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    task = make_task(tmp_path, fix_layer=3)
    assert bench_rivals.unsuited("transformers", task) == ""
    registers = replace(task, model="test_vit2", weights=tmp_path / "registers.safetensors")
    write_weights(registers)
    assert "reg_token" in bench_rivals.unsuited("transformers", registers)
    losses, logits = outcome_of(bench_arms.ours, task, tmp_path / "ours")
    theirs, their_logits = outcome_of(bench_rivals.with_transformers, task, tmp_path / "theirs")
    assert theirs == pytest.approx(losses, abs=1e-5)
    assert (their_logits - logits).abs().max() < 1e-5


def test_the_other_loops_groups_are_ours(tmp_path: Path) -> None:
    """Rate and weight decay of every parameter, by the two independent rules."""
    from finetune.config import OptimConf
    from finetune.core.optim import param_groups

    task = make_task(tmp_path, fix_layer=2)
    model, _ = our_model(task)
    conf = OptimConf(lr=task.lr, layer_decay=task.layer_decay, weight_decay=task.weight_decay)
    ours = {
        name: (group["lr"], group["weight_decay"])
        for group in param_groups(model, conf)
        for name in group["param_names"]
    }
    net = bench_arms.first_model(task)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for merged in (False, True):
        groups = bench_arms.freeze_and_group(net, task, merged=merged)
        theirs = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert theirs.keys() == ours.keys()
        for name, values in theirs.items():
            assert values == pytest.approx(ours[name]), name


def test_images_are_the_same_in_every_run() -> None:
    first, again, other = (picture(name, 1, (40, 30)) for name in ("train0", "train0", "train1"))
    assert first.size == (40, 30)
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_every_optimizer_of_the_row_takes_the_same_steps(tmp_path: Path) -> None:
    """Ours is the project's own, stepped through its guard; the first is torch's default."""
    arms = bench_arms.optimizers(make_task(tmp_path, fix_layer=-1))
    assert [arm["loop"] for arm in arms] == ["plain", "plain", "tuned", "ours"]
    parameters = [p for group in arms[0]["optimizer"].param_groups for p in group["params"]]
    first = [p.detach().clone() for p in parameters]
    after = []
    for arm in arms:
        assert {id(p) for group in arm["optimizer"].param_groups for p in group["params"]} == {*map(id, parameters)}
        with torch.no_grad():
            for parameter, value in zip(parameters, first, strict=True):
                parameter.copy_(value)
        for _ in range(3):
            arm["step"]()
        after.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert (after[0] - torch.cat([value.flatten() for value in first])).abs().max() > 1e-4, "nothing moved"
    for arm, values in zip(arms, after, strict=True):
        # A step is at most a rate, 1e-4; of the slowest layer an eighth of that.
        torch.testing.assert_close(values, after[0], rtol=1e-6, atol=1e-8, msg=arm["name"])
    ours = arms[-1]["optimizer"]
    assert all({"layer", "scale"} <= group.keys() for group in ours.param_groups)
    assert ours.found_inf.item() == 0, "not stepped by the guard"


def test_what_the_decoders_are_apart_is_measured(tmp_path: Path) -> None:
    """Nothing between a decoder and itself; between Pillow's and ours a level or two, and so no other image."""
    make_images(tmp_path / "images", 4, 4, size=(300, 200))
    task = Task(tmp_path / "images", tmp_path / "first.safetensors", "test_vit")
    split = open_source(DataConf(source=SourceKind.folder, root=str(task.root))).splits["val"]
    for same_pixels in (True, False):
        pictures = Pictures(split, task, task.preprocess(), train=False, same_pixels=same_pixels)
        values, _ = pictures[2, 0]
        levels = pictures.levels(2)
        assert levels.dtype == torch.uint8
        shown = (levels / 255 - pictures.mean) / pictures.std
        torch.testing.assert_close(values, shown)  # the levels of what the loops see
        assert levels_apart(pictures, pictures, 4) == {"images": 4, "largest_levels": 0, "share_of_values": 0.0}
    apart = decoders_apart(task)
    assert apart["images"] == 4
    assert apart["largest_levels"] <= 3
    assert 0 < apart["share_of_values"] < 0.1


def test_parity_is_told_against_tuned_in_the_same_precision() -> None:
    words = ["plain fp32", "tuned fp32", "tuned bf16", "ours fp32", "ours bf16", "timm bf16"]
    arms = [{"name": word, "loop": word.split()[0], "precision": word.split()[1]} for word in words]

    def partners(arms: list[dict[str, str]]) -> list[str | None]:
        return [partner and partner["name"] for partner in (bench_report.partner_of(arm, arms) for arm in arms)]

    assert partners(arms) == ["tuned fp32", None, None, "tuned fp32", "tuned bf16", "tuned bf16"]
    assert partners([arms[0], arms[3]]) == [None, "plain fp32"]


def test_the_table_tells_parity_from_the_same_pixels() -> None:
    """Beside the ratio; what the timed runs are apart stands below, a line an arm."""
    numbers = {"seconds": [2.0], "core_seconds": [2.0], "rise_mib": None, "share_of_peak": 0.5}
    tuned = {"name": "tuned bf16", "loop": "tuned", "precision": "bf16", **numbers}
    ours = {"name": "ours bf16", "loop": "ours", "precision": "bf16", **numbers}
    ours["same_pixels"] = {"from": "tuned bf16", "loss": 1e-7, "logits": 2e-7}
    ours["timed_runs"] = {"from": "tuned bf16", "loss": 3e-4, "logits": 4e-4}
    lines = bench_report.table("a row", [tuned, ours]).splitlines()
    (row,) = (line for line in lines if line.startswith("| ours"))
    assert row.endswith("| 1.00 | not measured | 50 % | 1.0e-07 | 2.0e-07 | tuned bf16 |")
    assert lines[-1] == "* as timed, ours bf16 and tuned bf16 are apart by: loss 3.0e-04, logits 4.0e-04"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rows full frozen --fix-layer 2 6", "--fix-layer 6: test_vit has 6 blocks"),
        ("--rows frozen --fix-layer -1", "--fix-layer -1: test_vit has 6 blocks"),
        ("--rows frozen --fix-layer 5 --model vit_base_patch32_224 test_vit_nonsense", "test_vit_nonsense"),
        ("--rows frozen --fix-layer 6 --model vit_base_patch32_224 test_vit", "--fix-layer 6: test_vit has 6 blocks"),
        ("--rows full head --fix-layer 2", "--fix-layer would be ignored"),
        ("--rows head --loops plain", "the row head has none of plain"),
        ("--rows full --rivals timm transformers", "accelerate is not installed"),
    ],
)
def test_what_cannot_be_measured_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    """With one line, ahead of images, workers and rows."""

    def never(*_: Any) -> None:
        raise AssertionError("it had begun to measure")

    def version(package: str) -> str:
        if package == "accelerate":
            raise bench_rivals.metadata.PackageNotFoundError
        return "5.0.0"

    monkeypatch.setattr(bench, "Bench", never)
    monkeypatch.setattr(bench_rivals.metadata, "version", version)
    models = [] if "--model" in words else ["--model", "test_vit"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split(), *models, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert str(exit_.value.code).startswith("error: ")
    assert expected in str(exit_.value.code)


def test_a_call_that_is_cut_off_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured:
        workers, peaks, decoders = 0, {"fp32": 1e9}, {"images": 1}

        def __init__(self, *_: Any) -> None: ...

        def fix_layers(self, name: str) -> list[int]:
            return [2, 4]

        def row(self, name: str, fix_layer: int) -> dict[str, Any]:
            if fix_layer == 4:
                raise KeyboardInterrupt
            return {"name": name, "fix_layer": fix_layer, "arms": []}

    monkeypatch.setattr(bench, "Bench", Measured)
    words = "--rows frozen --model test_vit --out"
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split(), str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert report["rows"] == [{"name": "frozen", "fix_layer": 2, "arms": []}]
    assert report["models"]["test_vit"]["decoders_apart"] == {"images": 1}


@pytest.mark.parametrize("has_it", [True, False])
def test_an_imitated_bf16_is_none(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    """An old GPU says yes unless it is asked about hardware, and the tuned arms would then be slower for it."""

    def supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert bench_machine.has_bf16("cuda") is has_it


@pytest.mark.slow
def test_the_script_measures_prints_and_draws(tmp_path: Path) -> None:
    """Rows, in a process of its own, as a person types it."""
    words = "--model test_vit --images 6 --val-images 4 --batch-size 4 --epochs 1 --repeats 1 --workers 0"
    words += " --rows frozen head --fix-layer 2 4 --loops tuned ours timm"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *words.split(), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "only the head learns, 1 epochs" in done.stdout
    report = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert [row["fix_layer"] for row in report["rows"]] == [2, 4, 7]
    assert report["models"]["test_vit"]["decoders_apart"]["images"] == 4
    for row in report["rows"]:
        # Other people's loops come by themselves in the rows that they are for.
        rivals = {"timm"} if row["name"] == "frozen" else set()
        assert {arm["loop"] for arm in row["arms"]} == {"tuned", "ours"} | rivals
        assert all(len(arm["seconds"]) == 1 and arm["share_of_peak"] > 0 for arm in row["arms"])
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_saving_takes_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a save takes longer than leaving it to a thread, or as long; and every epoch is saved."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    waited, writing, training = bench_saving.measure(1, waits=True)
    assert training > 0 and waited > 0 and writing > 0
