"""Test accuracy of this project's recipe beside other people's, on the same images, weights, epochs and batch.

    python scripts/quality_sets.py                                              fetch the images and weights, once
    nice -n 10 python scripts/bench_quality.py --jobs 2                         the whole table, in hours; go on with it
    python scripts/bench_quality.py --sets letters --arms ours timm --seeds 0 1 2
    python scripts/bench_quality.py --arms ours ours:fast --ours fast='optim.lr=3e-3 sched.mode=cosine'
    python scripts/bench_quality.py --same-seconds --arms ours timm             each arm has the seconds that ours took
    python scripts/bench_quality.py --table                                     print what there is, as markdown

A cell is one set, arm and seed. A finished cell is a line of OUT/results.jsonl, so a killed bench goes on where it was;
a cell whose code or images have changed since is computed again. docs/quality.md says what each arm does.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a cell: ahead of numpy and torch, which read it once

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import quality_rivals
import torch
from quality_rivals import Outcome
from quality_sets import DEFAULT_OUT, fetch_lite0, make
from quality_table import Row, append_row, key_of, markdown, newest, read_rows
from quality_tasks import TASKS, WEIGHTS, Task, data_version, ready

from finetune.app.run import run
from finetune.config.words.configuration import compose
from finetune.config.words.saved import read_conf

ROOT = Path(__file__).parents[1]
OURS = "ours"
SAME_SECONDS = "@seconds"  # ends the name of an arm whose epochs were chosen to take the seconds of ours


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the results to be.

    Attributes:
        set: A name of `TASKS`.
        arm: `ours`, `ours:NAME`, or a name of `quality_rivals.ARMS`.
        seed: Of the head, the order and the views.
        version: Of the code and the images that decide the result.
        overrides: Words for our command line, for `ours:NAME`.
        epochs: In the place of the task's; 0: the task's.
        settings: The one setting to train, by its place among the arm's; -1: all of them.
    """

    set: str
    arm: str
    seed: int
    version: str
    overrides: tuple[str, ...] = ()
    epochs: int = 0
    setting: int = -1


def our_overrides(task: Task, cell: Cell, out: Path) -> list[str]:
    """Our command line; a word of the arm takes the place of the task's word for the same key."""
    words = {word.partition("=")[0]: word for word in task.overrides(out, cell.seed)}
    words |= {word.partition("=")[0]: word for word in cell.overrides}
    if cell.epochs:
        words["train.epochs"] = f"train.epochs={cell.epochs}"
    return list(words.values())


def run_ours(cell: Cell, task: Task, out: Path) -> Outcome:
    """The application, in this process: what `finetune WORDS` does."""
    words = our_overrides(task, cell, out)
    folder = out / "runs" / f"{cell.set}-{cell.arm.replace(':', '-')}-{cell.seed}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = run(compose(words), folder, words, quiet=True)
    conf = read_conf(folder)  # with what the rule chose
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    steps = -(-result["data"]["train"] // (conf.data.batch_size * conf.train.accumulate)) * len(rows)
    chosen = f"epoch {result['best_epoch']} of {len(rows)}" if "best_epoch" in result else f"{len(rows)} epochs"
    seconds = float(result["seconds"])
    return Outcome(float(result["test/top1"]), float(result["val/top1"]), chosen, seconds, steps)


def run_cell(cell: Cell, out: Path) -> Row:
    """Compute one cell, with one thread. -> its line."""
    torch.set_num_threads(1)
    task, began = TASKS[cell.set], time.monotonic()
    arm = cell.arm.removesuffix(SAME_SECONDS)
    if arm.partition(":")[0] == OURS:
        outcome = run_ours(cell, task, out)
    else:
        given = ready(task, out, cell.seed)
        named = {} if cell.setting < 0 else {"settings": [settings_of(arm)[cell.setting]]}
        outcome = quality_rivals.ARMS[arm](given, cell.epochs or task.epochs, **named)
    row = {name: getattr(cell, name) for name in ("set", "arm", "seed", "version")}
    wall = time.monotonic() - began
    return row | dataclasses.asdict(outcome) | {"epochs": cell.epochs or task.epochs, "wall": wall}


def settings_of(arm: str) -> Sequence[object]:
    """What an arm chooses among by training; none for a probe."""
    rivals = quality_rivals
    return {"timm": rivals.TIMM, "timm-light": rivals.TIMM, "transformers": rivals.TRANSFORMERS,
            "plain": rivals.PLAIN, "lp-ft": rivals.LP_FT, "logistic": ()}[arm]  # fmt: skip


def versions(label: str | None) -> tuple[str, str]:
    """The version of our code, and that of the other recipes: short checksums, or the label for both."""
    if label:
        return label, label
    ours = [*sorted((ROOT / "finetune").rglob("*.py")), *sorted((ROOT / "conf").rglob("*.yaml"))]
    theirs = [ROOT / "scripts" / name for name in ("quality_rivals.py", "quality_tasks.py")]
    return _checksum(ours), _checksum(theirs)


def _checksum(paths: Iterable[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return state.hexdigest()[:10]


def cells_of(arguments: argparse.Namespace, rows: Sequence[Row]) -> list[Cell]:
    """Every cell that was asked for and is not finished, sets first, then seeds, then arms."""
    mine, theirs = versions(arguments.version)
    finished = {key_of(row) for row in rows}
    found = []
    for name in arguments.sets:
        images = data_version(TASKS[name], arguments.out)
        for seed in arguments.seeds:
            for arm in arguments.arms:
                is_ours = arm.partition(":")[0] == OURS
                overrides = tuple(arguments.ours.get(arm.partition(":")[2], ()))
                code = f"{mine}+{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:4]}" if overrides else mine
                version = f"{code if is_ours else theirs}/{images}"
                cell = Cell(name, arm, seed, version, overrides)
                found.append(with_seconds_of_ours(cell, rows) if arguments.same_seconds else cell)
    return [cell for cell in found if (cell.set, cell.arm, cell.seed, cell.version) not in finished]


def with_seconds_of_ours(cell: Cell, rows: Sequence[Row]) -> Cell:
    """The cell with as many epochs as fit into the seconds of ours, by the means of the table of equal epochs.

    A peer trains the setting alone that validation chose there for this seed.
    """
    known = newest(rows)
    ours, theirs = known.get((cell.set, OURS)), known.get((cell.set, cell.arm))
    if not ours or not theirs or cell.seed not in theirs:
        raise SystemExit(f"--same-seconds needs the cells of {cell.set} for ours and {cell.arm} first")
    mean = statistics.fmean(row["seconds"] for row in ours.values())
    epoch = statistics.fmean(row["seconds"] / row["epochs"] for row in theirs.values())
    names = [] if cell.arm.startswith(OURS) else [str(setting) for setting in settings_of(cell.arm)]
    chosen = str(theirs[cell.seed]["chosen"])
    setting = names.index(chosen) if chosen in names else -1
    name = cell.arm + SAME_SECONDS
    return dataclasses.replace(cell, arm=name, epochs=max(1, round(mean / epoch)), setting=setting)


def bench(cells: Sequence[Cell], out: Path, jobs: int) -> int:
    """Compute the cells, writing each as it ends. -> how many failed."""
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_cell, cell, out): cell for cell in cells}
        for number, future in enumerate(as_completed(waiting), 1):
            cell = waiting[future]
            name = f"[{number}/{len(cells)}] {cell.set} {cell.arm} seed {cell.seed}"
            if (error := future.exception()) is not None:
                failed += 1
                print(f"{name}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            row = future.result()
            append_row(out / "results.jsonl", row)
            scores = f"val {row['val']:.3f} test {row['test']:.3f} ({row['chosen']})"
            print(f"{name}: {scores} {row['wall']:.0f} s", flush=True)
    return failed


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=[OURS, *quality_rivals.ARMS], help="ours, ours:NAME, or a peer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=WORDS", help="an arm ours:NAME")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument("--same-seconds", action="store_true", help="second table: the seconds of ours for all")
    parser.add_argument("--version", help="take this for the version of the code: keeps lines across changes")
    parser.add_argument("--table", action="store_true", help="only print the table of all lines")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    named = [given.partition("=") for given in arguments.ours]
    arguments.ours = {name: words.split() for name, _, words in named}
    known = [OURS, *(f"{OURS}:{name}" for name in arguments.ours), *quality_rivals.ARMS]
    if unknown := [arm for arm in arguments.arms if arm not in known]:
        parser.error(f"no such arm: {', '.join(unknown)}; expected any of {', '.join(known)}")
    return arguments


def main() -> None:
    """Compute what is missing, print the table."""
    arguments = parse()
    results = arguments.out / "results.jsonl"
    failed = 0
    if not arguments.table:
        for images in dict.fromkeys(TASKS[name].images for name in arguments.sets):
            make(images, arguments.out)
        if any(WEIGHTS in word for name in arguments.sets for word in TASKS[name].model):
            fetch_lite0(arguments.out)
        failed = bench(cells_of(arguments, read_rows(results)), arguments.out, arguments.jobs)
    print(markdown(read_rows(results)))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
