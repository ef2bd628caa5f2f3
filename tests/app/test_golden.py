"""Four small runs give the numbers that they gave before: a change that moves both sides of a comparison is seen here.

`tests/golden/runs.json` holds each run's losses and, layer by layer, two numbers of its final weights. Kernels of other
processors and of other versions of torch differ in the last bits, and training carries that on. Between AVX-512, AVX2
and plain kernels, and between one thread and two, they differ by 7e-6 at most; TOLERANCE allows 1e-4. A change of
arithmetic on purpose regenerates the file: `pytest tests/app/test_golden.py --update-golden`, with the reason in the
commit.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.__main__ import main

GOLDEN = Path(__file__).parent.parent / "golden" / "runs.json"
TOLERANCE = 1e-4  # relative to the largest number of the same kind in the run
FEW = ("data.shots=20", "train.epochs=2", "data.batch_size=64", "device=cpu", "precision=fp32", "data.workers=0")
RUNS = {
    "clip": ("model=clip", "sched.mode=cosine_pi"),
    "vit": ("model=vit", "optim.layer_decay=0.65"),
    "frozen, cached": ("model=clip", "optim.fix_layer=3", "augment.views=1", "prefix.cache=ram"),
    "ema, mixup": ("model=vit", "augment.mixup=0.8", "train.ema=0.9", "sched.interval=step", "sched.warmup=2"),
}


def summary(run_dir: Path) -> dict[str, dict[str, float]]:
    """The losses of a run, and of its final weights the norm and a fixed projection of every layer's tensors."""
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    losses = {f"epoch {row['epoch']} {name}": row[name] for row in rows for name in row if name.endswith("/loss")}
    layers: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, tensor in sorted(load_file(run_dir / "checkpoints" / "last.safetensors").items()):
        if tensor.is_floating_point():
            layers[".".join(name.split(".")[:3])].append(tensor.double().flatten())
    norms, projections = {}, {}
    for name, tensors in layers.items():
        flat = torch.cat(tensors)
        norms[name] = float(flat.norm())
        projections[name] = float(flat @ torch.arange(len(flat), dtype=torch.float64).cos())
    return {"losses": losses, "norms": norms, "projections": projections}


@pytest.mark.parametrize("name", RUNS)
def test_a_small_run_gives_its_golden_numbers(name: str, folder: Path, update_golden: bool) -> None:
    assert main([*RUNS[name], *FEW, "hydra.run.dir=run"]) == 0
    found = summary(folder / "run")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if update_golden:
        rounded = {
            kind: {key: float(f"{value:.7g}") for key, value in numbers.items()} for kind, numbers in found.items()
        }
        golden = {run: golden[run] for run in RUNS if run in golden} | {name: rounded}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    for kind, numbers in golden[name].items():
        assert found[kind].keys() == numbers.keys()
        scale = max(abs(value) for value in numbers.values())
        apart = {key: abs(found[kind][key] - value) / scale for key, value in numbers.items()}
        assert max(apart.values()) <= TOLERANCE, f"{kind}: {max(apart, key=lambda key: apart[key])}"
