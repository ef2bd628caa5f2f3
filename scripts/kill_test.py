"""Kill `python -m finetune` at random moments, continue it, and compare every tensor with a run that nobody killed.

    python scripts/kill_test.py --rounds 50

A round starts a run of the same configuration in a new folder, sends SIGKILL after a random time (now and then to one
process alone, mostly to the whole group), and starts it again by `resume=` or by the same command, until it has
finished. Then config.yaml, history.jsonl (but for times), every weight and every value of last.pt must be equal to the
bit. Ends with 1 where a round differs or a folder became unreadable.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What a run says as training begins.
TRAINS = "resume promise"
ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    *("data=folder", "data.batch_size=4", "data.workers={workers}", "train.epochs=5", "train.save_every_steps=3"),
    *("model.head_dropout=0.2", "augment.mixup=0.2", "train.ema=0.9", "train.keep=2", "sched.interval=step"),
)


def make_images(root: Path) -> None:
    """Three classes of 16 small images each: stripes across, down, and none."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for name, (high, wide) in {"across": (1, 4), "down": (4, 1), "flat": (1, 1)}.items():
        (root / name).mkdir(parents=True)
        for index in range(16):
            cells = draw.integers(0, 2, size=(8 // high, 8 // wide))
            pixels = np.kron(cells, np.ones((high * 4, wide * 4))) * 200 + draw.normal(20, 15, (32, 32))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name / f"{index}.png")


def start(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    """`python -m finetune WORDS`, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(words: list[str], cwd: Path) -> str:
    """Run to the end; what it printed."""
    process = start(words, cwd)
    text, _ = process.communicate(timeout=900)
    if process.returncode != 0:
        raise AssertionError(f"{' '.join(words)} ended with {process.returncode}:\n{text}")
    return text


def history(folder: Path) -> list[dict[str, Any]]:
    """The history without what a clock says."""
    from finetune.runs.history import timeless

    rows = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return timeless(json.loads(line) for line in rows)


def differences(one: Any, other: Any, where: str) -> list[str]:
    """Where two trees of plain types and tensors differ, to the bit."""
    import torch

    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: other keys"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{where}.{i}")
        ]
    same = one == other or (one != one and other != other)
    return [] if same or where.endswith("counters.seconds") else [f"{where}: {one} / {other}"]


def compare(straight: Path, folder: Path) -> list[str]:
    """Every difference between two finished runs."""
    sys.path.insert(0, str(ROOT))
    from finetune.runs.checkpoint import read_state
    from finetune.runs.weights import read_weights
    from finetune.system.ours import LOCK, LOCK_HOLDER, MARKER

    found = [] if history(straight) == history(folder) else ["history.jsonl"]
    if (straight / "config.yaml").read_bytes() != (folder / "config.yaml").read_bytes():
        found.append("config.yaml")
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (straight, folder)]
    if names[0] != names[1]:
        found.append(f"files {names[0]} / {names[1]}")
    for name in names[0]:
        one, other = straight / "checkpoints" / name, folder / "checkpoints" / name
        if name.endswith(".safetensors") and other.exists():
            found += differences(read_weights(one), read_weights(other), name)
    one, other = (read_state(run / "checkpoints" / "last.pt") for run in (straight, folder))
    found += differences(one, other, "last.pt")
    # A kill in the instant after the last word leaves the lock of a dead process, which holds nobody up.
    left = [path.name for path in folder.rglob(".*") if path.name not in (MARKER, LOCK, LOCK_HOLDER)]
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (straight, folder)]
    for key in results[0]:
        if key not in ("seconds", "seconds_saving", "resumed_at", "overrides") and results[0][key] != results[1][key]:
            found.append(f"result.json {key}: {results[0][key]} / {results[1][key]}")
    return found + [f"left behind: {name}" for name in left]


def round_of_kills(
    words: list[str], folder: Path, cwd: Path, dice: random.Random, *, longest_s: float, trains_s: float
) -> str:
    """Start, kill, continue, until it has finished; how it went, in words."""
    same, kills = [*words, f"hydra.run.dir={folder}"], []
    for _ in range(dice.randint(1, 3)):
        resumes = (folder / "config.yaml").exists() and dice.random() < 0.5
        log = folder / "run.log"
        before = log.read_text(encoding="utf-8").count(TRAINS) if log.exists() else 0
        process = start([f"resume={folder}"] if resumes else same, cwd)
        began, waits = time.monotonic(), dice.random() < 0.7
        # Most of a short run is its start: mostly the dice are thrown only once it trains.
        while waits and process.poll() is None and not (log.exists() and log.read_text().count(TRAINS) > before):
            time.sleep(0.01)
        deadline = time.monotonic() + dice.uniform(0.0, trains_s if waits else longest_s - trains_s)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.003)
        seconds = time.monotonic() - began
        if process.poll() is not None:
            text, _ = process.communicate()
            assert process.returncode == 0, text
            break
        if dice.random() < 0.2:
            process.kill()  # its workers find out by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills.append(f"{seconds:.1f}")
    resumes = (folder / "config.yaml").exists() and dice.random() < 0.5
    finish([f"resume={folder}"] if resumes else same, cwd)
    return f"killed after {', '.join(kills) or 'nothing'} s"


def run_rounds(rounds: int, seed: int, work: Path, workers: int = 2) -> int:
    """All rounds; how many went wrong."""
    make_images(work / "images")
    words = [word.format(workers=workers) for word in WORDS] + [f"data.root={work / 'images'}"]
    began = time.monotonic()
    finish([*words, f"hydra.run.dir={work / 'straight'}"], work)
    longest_s = time.monotonic() - began
    trains_s = 1.5 * json.loads((work / "straight" / "result.json").read_text())["seconds"]
    print(f"the straight run took {longest_s:.1f} s, and trained for {trains_s / 1.5:.1f} s of them", flush=True)
    wrong = 0
    for number in range(rounds):
        dice, folder = random.Random(f"{seed} {number}"), work / f"round_{number}"
        try:
            how = round_of_kills(words, folder, work, dice, longest_s=longest_s, trains_s=trains_s)
            found = compare(work / "straight", folder)
        except (AssertionError, OSError, ValueError) as error:
            how, found = "", [str(error)]
        resumed = json.loads((folder / "result.json").read_text())["resumed_at"] if not found else "-"
        print(f"round {number}: {how}; resumed at {resumed}; {'; '.join(found) or 'equal to the bit'}", flush=True)
        wrong += bool(found)
        if not found:
            shutil.rmtree(folder)
    return wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = run_rounds(given.rounds, given.seed, Path(folder), given.workers)
    print(f"{given.rounds - wrong} of {given.rounds} rounds equal the straight run to the bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
