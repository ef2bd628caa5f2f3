"""Fine-tuning from images on disk to the final checkpoint, beside the loops that people write; prints ratios.

    python scripts/bench.py                                    every row, three repetitions: hours on two cores
    python scripts/bench.py --rows frozen --repeats 1          one row, once
    python scripts/bench.py --rows full --rivals none          without other people's loops
    python scripts/bench.py --rows frozen --model vit_base_patch32_224 vit_base_patch16_224 --fix-layer 3 6 9
    python scripts/bench.py --device cuda --model vit_base_patch16_224 --images 4000 --val-images 400 --batch-size 256

Rows:

    frozen      10 of 12 blocks frozen, 10 epochs, images only resized
    views       the same with 4 views of each image, recycled over 20 epochs
    full        nothing frozen, 3 epochs
    head        only the classifier learns, 50 epochs
    sweep       five values of layer_decay with 9 blocks frozen, 10 epochs each
    optimizer   one step of AdamW on the 85.8 million parameters of a ViT-B/16

Arms, in turn within one process, each from the same files, first weights, order, views, rates and validations:

    plain       Pillow, DataLoader, fp32, AdamW as it comes, one group a parameter, `loss.item()` at every step
    tuned       the same with autocast, fused AdamW, merged groups, the loss left on the device
    ours        `python -m finetune`, from its command line on, with cold caches; the test set, plots and reports too
    timm        timm's loader, optimizer and the steps of its training script
    transformers    Hugging Face's Trainer

The last two run in the rows `frozen` and `full`, where they are installed and know the model; those that `--rivals`
names, in every row; with `--rivals none`, in no row. `--loops` leaves arms out.

Clocks start with what is imported already, for all arms. `x plain` and `x tuned`: how many times as fast. `bench.json`
is written anew after every row, so a call that is cut off keeps what it has measured.
"""

from __future__ import annotations

import os

# As `python -m finetune` does, for every arm, and before torch is imported: its threads spin shortly, then sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_arms
import bench_report
import bench_rivals
import torch
from bench_arms import Flags, Outcome, final_logits
from bench_machine import core_seconds, describe, has_bf16, matmul_peak, peak_memory, timed
from bench_task import Task, decoders_apart, make_images, our_model, write_weights
from torch.utils.flop_counter import FlopCounterMode

from finetune.core.cost import count_flops
from finetune.core.device import environment
from finetune.core.freezing import set_up_layers
from finetune.system.files import write_text

DECAYS = (0.55, 0.65, 0.75, 0.85, 0.95)
WEIGHTS = Path("first.safetensors")  # need not be there to look at a model
Run = Callable[[Task, Flags], Outcome]
LOOPS: dict[str, Run] = {"plain": bench_arms.plain, "tuned": bench_arms.tuned, "ours": bench_arms.ours}


@dataclass(frozen=True)
class Row:
    """One kind of fine-tuning.

    Attributes:
        title: For people; `{frozen}`, `{blocks}` and `{epochs}` are filled in.
        epochs: How long.
        frozen_below: `fix_layer`, counted from the number of blocks: -2 leaves two blocks to learn; None: nothing is
            frozen.
        augment: Words that choose the augmentation.
        views: How many different views an image has.
        loops: Which arms run: loop, then whether in fp32, in bf16.
        runs: How many runs an arm makes: of a sweep several.
    """

    title: str
    epochs: int
    frozen_below: int | None
    augment: tuple[str, ...] = ("augment=none",)
    views: int = 1
    loops: tuple[tuple[str, bool, bool], ...] = (("plain", True, False), ("tuned", False, True), ("ours", False, True))
    runs: int = 1


WITHOUT_PLAIN = (("tuned", False, True), ("ours", False, True))
# Where `--rivals auto` runs them: the longest rows would take hours.
WITH_RIVALS = ("frozen", "full")
ROWS = {
    "frozen": Row(
        "{frozen} of {blocks} blocks frozen, {epochs} epochs, images only resized",
        epochs=10,
        frozen_below=-2,
        loops=(("plain", True, False), ("tuned", True, True), ("ours", True, True)),
    ),
    "views": Row(
        "{frozen} of {blocks} blocks frozen, 4 views of each image over {epochs} epochs",
        epochs=20,
        frozen_below=-2,
        augment=("augment=light", "augment.flip=0.5", "augment.views=4"),
        views=4,
        loops=WITHOUT_PLAIN,
    ),
    "full": Row("nothing frozen, {epochs} epochs", epochs=3, frozen_below=None),
    "head": Row("only the head learns, {epochs} epochs", epochs=50, frozen_below=1, loops=WITHOUT_PLAIN),
    "sweep": Row(
        "a sweep of five layer_decay values, {frozen} of {blocks} blocks frozen, {epochs} epochs each",
        epochs=10,
        frozen_below=-3,
        loops=WITHOUT_PLAIN,
        runs=len(DECAYS),
    ),
}


def main() -> int:
    """Measure, print, draw."""
    given = _arguments()
    try:
        check(given)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    report: dict[str, Any] = {
        "machine": describe(device),
        "environment": environment(device),
        "command": " ".join(["python", "scripts/bench.py", *sys.argv[1:]]),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "models": {},
        "rows": [],
    }
    print(f"{report['machine']}; {given.images} training and {given.val_images} validation images")
    print(f"load average {report['load_average']}; command: {report['command']}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    for row in _rows(given, report["models"]):
        report["rows"].append(row)
        write_text(given.out / "bench.json", json.dumps(report, indent=1))
    bench_report.draw(report, given.out / "bench.png")
    print(f"\nwritten: {given.out / 'bench.json'}, {given.out / 'bench.png'}")
    return 0


def check(given: argparse.Namespace) -> None:
    """Find what is wrong with the words of the command line, before hours of measuring.

    Raises:
        ValueError: A model that nobody knows, a `--fix-layer` that one of them has not or that no row takes, a rival
            that is not installed, or a row without an arm.
    """
    if given.fix_layer and not any(map(_takes_fix_layer, given.rows)):
        takers = ", ".join(filter(_takes_fix_layer, ROWS))
        raise ValueError(f"--fix-layer would be ignored: only the rows {takers} take it")
    for model in given.model:
        blocks = our_model(Task(Path(), WEIGHTS, model), load=False, device="meta")[0].num_blocks
        for fix_layer in given.fix_layer:
            if not 0 <= fix_layer < blocks:
                raise ValueError(
                    f"--fix-layer {fix_layer}: {model} has {blocks} blocks, one of which must learn;"
                    f" expected 0 to {blocks - 1}"
                )
    named = _named_rivals(given)
    for rival in named:
        if missing := bench_rivals.missing(rival):
            raise ValueError(f"--rivals {rival}: {missing}")
    for name in ROWS.keys() & given.rows:
        loops = {loop for loop, *_ in ROWS[name].loops} | {*(bench_rivals.ARMS if name in WITH_RIVALS else ())}
        if not named and not loops & {*given.loops}:
            raise ValueError(f"--loops: the row {name} has none of {', '.join(given.loops)}")


def _named_rivals(given: argparse.Namespace) -> list[str]:
    return [rival for rival in given.rivals if rival in bench_rivals.ARMS]


def _takes_fix_layer(name: str) -> bool:
    return name in ROWS and (ROWS[name].frozen_below or 0) < 0


def _rows(given: argparse.Namespace, models: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure row by row; what belongs to a model as a whole goes into `models`."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [name for name in given.rows if name in ROWS]
        for model in given.model if rows else []:
            bench = Bench(given, model, Path(folder) / model)
            models[model] = {"workers": bench.workers, "matmul_peak": bench.peaks, "decoders_apart": bench.decoders}
            for name in rows:
                yield from (bench.row(name, fix_layer) for fix_layer in bench.fix_layers(name))
    if "optimizer" in given.rows:
        yield _optimizer_row(given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "optimizer"], default=[*ROWS, "optimizer"])
    parser.add_argument("--model", nargs="+", default=["vit_base_patch32_224"], help="ViTs of timm")
    parser.add_argument(
        "--fix-layer", nargs="+", type=int, default=[], help="of frozen, views, sweep, one after another"
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--val-images", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=0, help="instead of each row's own number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the tuned arms")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch, for every arm; 0: torch's own choice")
    parser.add_argument("--workers", default="auto", help="of the other loops; auto: what is fastest for tuned here")
    every = [*LOOPS, *bench_rivals.ARMS]
    parser.add_argument("--loops", nargs="+", choices=every, default=every, help="leave the others out")
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=["auto", "none", *bench_rivals.ARMS],
        default=["auto"],
        help="auto: all that can run here, in the rows frozen and full; by name: in every row",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile in the arms tuned and ours")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="more words for our command line")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    given = parser.parse_args()
    if len(given.rivals) > 1 and {"auto", "none"} & {*given.rivals}:
        parser.error("--rivals: auto and none stand alone")
    return given


class Bench:
    """Images and first weights of one model, and the measuring of a row."""

    def __init__(self, given: argparse.Namespace, model: str, folder: Path) -> None:
        """Render the images and draw the weights."""
        self.given, self.model, self.folder = given, model, folder
        self.workers = -1 if given.workers == "auto" else int(given.workers)
        self.peaks: dict[str, float] = {}
        self.counter = itertools.count()
        self.half = (
            "bf16" if given.precision == "bf16" or (given.precision == "auto" and has_bf16(given.device)) else ""
        )
        make_images(folder / "images", given.images, given.val_images)
        make_images(folder / "few", 2 * given.batch_size + 3, 8, suffix=".png")
        common = {"model": model, "batch_size": given.batch_size, "device": given.device}
        extra = (*given.ours, *(["train.compile=default"] if given.compile else []))
        self.task = Task(folder / "images", folder / WEIGHTS, extra=extra, **common)
        write_weights(self.task)
        self.blocks = our_model(self.task, load=False, device="meta")[0].num_blocks
        self.rivals = self._suited_rivals()
        self.decoders = decoders_apart(self.task)
        print(f"\n{model}: {bench_report.decoders_line(self.decoders)}")
        if self.workers < 0:
            self.workers = self._best_workers()
        self.peaks["fp32"] = matmul_peak(self.task, torch.float32)
        if self.half:
            self.peaks["bf16"] = matmul_peak(self.task, torch.bfloat16)
        for word, peak in self.peaks.items():
            print(f"{model}: matmul peak on its own shapes, {word}: {peak / 1e9:,.0f} GFLOP/s")
        print(f"workers of the other loops: {self.workers}", flush=True)

    def fix_layers(self, name: str) -> list[int]:
        """`fix_layer` of a row, or those that were asked for."""
        below = ROWS[name].frozen_below
        if below is None:
            return [-1]
        asked: list[int] = self.given.fix_layer if _takes_fix_layer(name) else []
        return asked or [self.blocks + below]

    def row(self, name: str, fix_layer: int) -> dict[str, Any]:
        """Check that the arms do the same, then time them in turn."""
        row = ROWS[name]
        epochs = self.given.epochs or row.epochs
        task = replace(self.task, epochs=epochs, fix_layer=fix_layer, augment=row.augment)
        arms = self._arms(name)
        for arm in arms:
            replace(task, precision=arm["precision"]).prepare()
        title = f"{self.model}: {row.title.format(frozen=fix_layer, blocks=self.blocks, epochs=epochs)}"
        print(f"\n## {title}", flush=True)
        self._check(arms, task)
        for repeat in range(self.given.repeats):
            shift = repeat % len(arms)  # no arm always follows the same other one
            for arm in arms[shift:] + arms[:shift]:
                self._measure(arm, task)
                print(f"  {arm['name']:<24} {arm['seconds'][-1]:8.2f} s", flush=True)
        self._compare(arms, task, "timed_runs")
        for arm in arms:
            work = row.runs * self.work(task, row.views, ours=arm["loop"] == "ours", runs=row.runs)
            arm["flop"] = work
            arm["share_of_peak"] = work / bench_report.median(arm) / self.peaks[arm["precision"]]
            del arm["run"], arm["outcome"]
        print(bench_report.table(title, arms), flush=True)
        return {
            "name": name,
            "title": title,
            "model": self.model,
            "epochs": epochs,
            "fix_layer": fix_layer,
            "arms": arms,
        }

    def work(self, task: Task, views: int, *, ours: bool, runs: int) -> float:
        """FLOPs of the matrix products of one run: a loop that computes everything every time, or ours.

        Args:
            task: The work.
            views: Of each training image.
            ours: What is frozen is computed once for each view, and once for each validation image.
            runs: Of a sweep, which share what is computed once.
        """
        model, preprocess = our_model(task, load=False, device="meta")
        if ours:
            conf = task.conf()
            set_up_layers(model, conf.optim, train=conf.train)  # may shorten the last block, too
        flops = count_flops(model, preprocess.size)
        images, val = self.given.images, self.given.val_images
        if not ours or not model.boundary:
            return task.epochs * (images * flops.training + val * flops.forward)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, preprocess.size, preprocess.size, device="meta"), stop=model.boundary)
        prefix = counter.get_total_flops()
        once = (min(views, task.epochs) * images + val) * prefix / runs
        return once + task.epochs * (images * (flops.training - prefix) + val * (flops.forward - prefix))

    def _suited_rivals(self) -> list[str]:
        """Those that `--rivals auto` runs; says why another one is left out."""
        if self.given.rivals != ["auto"] or not {*WITH_RIVALS} & {*self.given.rows}:
            return []
        suited = []
        for rival in filter(self.given.loops.__contains__, bench_rivals.ARMS):
            if reason := bench_rivals.missing(rival) or bench_rivals.unsuited(rival, self.task):
                print(f"{self.model}: without the arm {rival}: {reason}", flush=True)
            else:
                suited.append(rival)
        return suited

    def _arms(self, name: str) -> list[dict[str, Any]]:
        row, half = ROWS[name], self.half
        rivals = _named_rivals(self.given) or (self.rivals if name in WITH_RIVALS else [])
        wanted = [
            (loop, precision)
            for loop, full, halved in row.loops
            if loop in self.given.loops
            for precision in (["fp32"] if full or not half else []) + ([half] if halved and half else [])
        ]
        wanted += [(rival, half or "fp32") for rival in rivals]
        loops = LOOPS | bench_rivals.ARMS
        return [
            {
                "name": f"{loop} {precision}",
                "loop": loop,
                "precision": precision,
                "run": loops[loop] if row.runs == 1 else bench_arms.sweep_of(loops[loop], DECAYS),
                "seconds": [],
                "core_seconds": [],
                "peak_mib": [],
                "rise_mib": [],
            }
            for loop, precision in wanted
        ]

    def _flags(self, workers: int, *, same_pixels: bool = False) -> Flags:
        folder = self.folder / f"run{next(self.counter)}"
        folder.mkdir()
        return Flags(folder, workers, same_pixels, compiled=self.given.compile)

    def _check(self, arms: list[dict[str, Any]], task: Task) -> None:
        """Two epochs of a few images, the same pixels for all arms: how far they are apart. Warms up, too."""
        few = replace(task, root=self.folder / "few", epochs=2)
        for arm in arms:
            task = replace(few, precision=arm["precision"])
            task.prepare()
            arm["outcome"] = arm["run"](task, self._flags(self.workers, same_pixels=True))
        self._compare(arms, few, "same_pixels")
        for line in bench_report.apart_lines(arms, "same_pixels"):
            print(f"  on the same pixels, {line}", flush=True)

    def _compare(self, arms: list[dict[str, Any]], task: Task, key: str) -> None:
        """How far each arm's losses and final validation logits are from its partner's, into `arm[key]`."""
        logits = [final_logits(replace(task, precision="fp32"), arm["outcome"]) for arm in arms]
        for arm, mine in zip(arms, logits, strict=True):
            partner = bench_report.partner_of(arm, arms)
            if partner is not None:
                theirs = logits[arms.index(partner)]
                pairs = zip(arm["outcome"].losses, partner["outcome"].losses, strict=True)
                arm[key] = {
                    "from": partner["name"],
                    "loss": max(abs(a - b) for a, b in pairs),
                    "logits": float((mine - theirs).abs().max()),
                }

    def _measure(self, arm: dict[str, Any], task: Task) -> None:
        task, flags = replace(task, precision=arm["precision"]), self._flags(self.workers)
        with peak_memory(task.device) as memory:
            cores, began = core_seconds(), time.perf_counter()
            arm["outcome"] = arm["run"](task, flags)
            if task.device == "cuda":
                torch.cuda.synchronize()
            arm["seconds"].append(time.perf_counter() - began)
            arm["core_seconds"].append(core_seconds() - cores)
            if arm["outcome"].last_epoch:
                arm.setdefault("last_epoch", []).append(arm["outcome"].last_epoch)
        if not memory:
            arm["peak_mib"] = arm["rise_mib"] = None
        elif arm["peak_mib"] is not None:
            arm["peak_mib"].append(memory["peak"])
            arm["rise_mib"].append(memory["rise"])

    def _best_workers(self) -> int:
        """The number of loader processes with which an epoch of the tuned loop is fastest here."""
        task = replace(self.task, epochs=2, fix_layer=self.blocks - 2, precision=self.half or "fp32")
        task.prepare()
        seconds: dict[int, float] = {}
        bench_arms.tuned(replace(task, epochs=1), self._flags(0))
        for workers in dict.fromkeys([0, 1, os.cpu_count() or 1]):
            began = time.perf_counter()
            bench_arms.tuned(task, self._flags(workers))
            seconds[workers] = time.perf_counter() - began
        shown = ", ".join(f"{workers}: {value:.1f} s" for workers, value in seconds.items())
        print(f"two epochs of the tuned loop by number of workers: {shown}", flush=True)
        return min(seconds, key=lambda workers: seconds[workers])


def _optimizer_row(given: argparse.Namespace) -> dict[str, Any]:
    """One step of AdamW over a ViT-B/16, gradients given."""
    title = "one step of AdamW, 85.8 million parameters of a ViT-B/16"
    print(f"\n## {title}", flush=True)
    task = Task(Path(), WEIGHTS, "vit_base_patch16_224", device=given.device)
    arms = bench_arms.optimizers(task)
    for _ in range(max(7, given.repeats)):
        for arm in arms:
            arm["seconds"].append(timed(arm["step"], given.device))
    for arm in arms:
        arm["seconds"] = arm["seconds"][2:]  # the first step makes the moments
        del arm["optimizer"], arm["step"]
    print(bench_report.optimizer_table(title, arms), flush=True)
    return {"name": "optimizer", "title": title, "arms": arms}


if __name__ == "__main__":
    sys.exit(main())
