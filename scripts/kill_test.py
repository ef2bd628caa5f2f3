"""Kill runs at each of their writes, or at random moments, continue them, and compare with a run that nobody killed.

    python scripts/kill_test.py --points                # before and after each place that writes, once
    python scripts/kill_test.py --rounds 200            # at random moments, with many kinds of settings

The first counts every write of an unbroken run, see kill_points.py. Then the same run is started anew for each of them,
kills itself there, and is continued by the same command or by `resume=`. So it goes with runs that continue, that begin
anew in the folder of another start, that fall back to the checkpoint before the last, and that store bad batches. With
`--all` each place is tried each time that the run comes to it.

A round of the second sends SIGKILL after a random time, once to three times, now and then to one process alone, mostly
to the whole group. Settings go around: caches in memory and on disk, averages, MixUp, accumulation, two workers.

Then config.yaml, history.jsonl (but for times), result.json, every weight, every value of last.pt and the caches must
be equal to the bit, with no temporary file left. Ends with one line of figures, and with 1 where a run was not equal.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

for _name, _value in (("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1"), ("MPLBACKEND", "agg")):
    os.environ.setdefault(_name, _value)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from kill_points import AFTER, BEFORE, MOMENTS, Kill, Process, import_as  # noqa: E402

EQUAL = "bitwise equal"
RUN, IMAGES, SHARDS = "run", "images", "shards"
SAME = ("data.batch_size=8", "model.head_dropout=0.2", "device=cpu", f"hydra.run.dir={RUN}")
FOLDER = (*SAME, "data=folder", "data.root={images}", "data.workers=0", "sched.interval=step", "train.keep=2")
FROZEN = ("model=vit", "optim.fix_layer=4", "augment=none")
# Shards, decoded images, activations and results of checks, all of them in a new cache.
CACHES = (
    *(*SAME, *FROZEN, "data=webdataset", "data.root={shards}", "data.download=true", "data.workers=0"),
    *("data.cache=disk", "prefix.cache=disk", "data.on_error=skip", "train.epochs=3", "train.save_every_steps=3"),
    *("train.ema=0.5", "train.keep=2", "optim.lr=0.003"),
)
# Every step after the first is not finite.
BAD_BATCHES = (*FOLDER, "train.epochs=2", "optim.lr=1e38", "train.on_nonfinite=skip", "train.max_nonfinite=100")
# What a round's run is made of: words, by name.
ROUNDS = {
    "workers": (*FOLDER, "data.workers=2", "augment.mixup=0.2", "train.ema=0.9", "train.epochs=3"),
    "accumulate": (*FOLDER, "data.batch_size=4", "train.accumulate=2", "augment.mixup=0.2", "train.epochs=3"),
    "pixels in memory": (*FOLDER, "data.cache=ram", "data.workers=2", "train.ema=0.9", "train.epochs=3"),
    "pixels on disk": (*FOLDER, "data.cache=disk", "data.workers=2", "augment.cutmix=1", "train.epochs=3"),
    "activations in memory": (*FOLDER, *FROZEN, "prefix.cache=ram", "train.ema=0.9", "train.epochs=4"),
    "activations on disk": (*FOLDER, *FROZEN, "prefix.cache=disk", "data.cache=disk", "train.epochs=4"),
    "shards": (*CACHES, "data.workers=2"),
}
EVERY = ("train.save_every_steps=2",)


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


def make_shards(images: Path, folder: Path) -> str:
    """The same images in four tar files, one of them cut so that it cannot be read; their `data.root`."""
    import io
    import tarfile

    folder.mkdir()
    (folder / "classes.txt").write_text("across\ndown\nflat\n")
    names = {"train-0": range(5), "train-1": range(5, 10), "val-0": range(10, 13), "test-0": range(13, 16)}
    for name, numbers in names.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in numbers:
                for label, kind in enumerate(("across", "down", "flat")):
                    data = (images / kind / f"{index}.png").read_bytes()
                    data = data[:100] if (index, label) == (2, 1) else data
                    for ending, content in (("png", data), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{kind}_{index}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return f"file://{folder}/{{{','.join(names)}}}.tar"


# --- comparing -------------------------------------------------------------------------------------------------------


def history(folder: Path) -> list[dict[str, Any]]:
    """The history without what a clock says."""
    from finetune.runs.history import timeless

    rows = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return timeless(json.loads(line) for line in rows)


def differences(one: Any, other: Any, where: str) -> list[str]:
    """Where two trees of plain types and tensors differ, to the bit."""
    import torch

    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and _bits(one) == _bits(other)
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


def _bits(tensor: Any) -> tuple[tuple[int, ...], bytes]:
    import torch

    return tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def compare(straight: Path, folder: Path) -> list[str]:
    """Every difference between two finished runs."""
    from finetune.runs.checkpoint import read_state
    from finetune.runs.epoch_files import DAMAGED_STATE
    from finetune.runs.finished import OF_THE_START, check_finished
    from finetune.runs.weights import read_weights
    from finetune.system.ours import LOCK, LOCK_HOLDER, MARKER
    from finetune.system.reading import DamagedError

    found = [] if history(straight) == history(folder) else ["history.jsonl"]
    own = ("config.yaml", "rates.json", "metrics.json", "skipped.txt", "confusion.csv", "confusion_val.csv")
    found += [name for name in own if _content(straight / name) != _content(folder / name)]
    names = [
        sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != DAMAGED_STATE)
        for run in (straight, folder)
    ]
    if names[0] != names[1]:
        found.append(f"files {names[0]} / {names[1]}")
    for name in names[0]:
        one, other = straight / "checkpoints" / name, folder / "checkpoints" / name
        if name.endswith(".safetensors") and other.exists():
            found += differences(read_weights(one), read_weights(other), name)
    for path in sorted((straight / "bad_batch").glob("*")):
        if path.suffix == ".pt":
            pair = [read_batch(run, path.name) for run in (straight, folder)]
            found += differences(*pair, path.name)
    one, other = (read_state(run / "checkpoints" / "last.pt") for run in (straight, folder))
    found += differences(one, other, "last.pt")
    # A kill in the instant after the last word leaves the lock of a dead process, which holds nobody up.
    left = [path.name for path in folder.rglob(".*") if path.name not in (MARKER, LOCK, LOCK_HOLDER)]
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (straight, folder)]
    for key in results[0]:
        if key not in (*OF_THE_START, "settings") and results[0][key] != results[1].get(key):
            found.append(f"result.json {key}: {results[0][key]} / {results[1].get(key)}")
    try:
        check_finished(folder)
    except DamagedError as error:
        found.append(str(error))
    return found + [f"left behind: {name}" for name in left]


def read_batch(run: Path, name: str) -> Any:
    """The step and the tensors of a stored batch of a run, which must be its own; None where it is missing."""
    from finetune.runs import bad_batch

    step = int(name.removesuffix(".pt").removeprefix("step_"))
    return bad_batch.load(run, step) if (run / "bad_batch" / name).exists() else None


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def compare_caches(straight: Path, folder: Path) -> list[str]:
    """What one cache holds and the other does not, and what killed processes left there."""
    one, other = (cached(cache) for cache in (straight, folder))
    found = [f"cache: {name} is missing" for name, _ in sorted(one - other)]
    return found + [f"cache: {name} is new" for name, _ in sorted(other - one)]


def cached(folder: Path) -> set[tuple[str, str]]:
    """Every file in a cache: its name without keys, which change with the place of the cache, and what it holds."""
    found = set()
    for path in (folder / "finetune-cache").rglob("*"):
        name = re.sub("[0-9a-f]{16,}", "ID", str(path.relative_to(folder)))
        is_same = name.endswith(("pixels.u8", "index.npy", "activations", "meta.json", "ID.tar", ".txt"))
        found.add((name, hashlib.sha256(path.read_bytes()).hexdigest() if is_same and path.is_file() else ""))
    return found


# --- kills -----------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """A command line, and what its folder held before it was started."""

    name: str
    words: list[str]
    straight: Path  # where it was run unbroken: a home with run/ and cache/
    before: Path | None = None  # a home to start from; None for an empty one
    code: int = 0  # with which it ends
    points: dict[str, list[int]] = field(default_factory=dict)  # see `Process.points`

    def prepare(self, home: Path) -> None:
        """Lay out the home of a run."""
        if self.before is not None:
            copy_home(self.before, home)

    def go_on(self, home: Path, dice: random.Random) -> str:
        """Continue to the end, by the same command or `resume=`; what was wrong."""
        resumes = (home / RUN / "config.yaml").exists() and self.before is None and dice.random() < 0.5
        process = Process([f"resume={RUN}"] if resumes else self.words, home)
        code = process.wait()
        if code != self.code:
            return f"refused: {' '.join(process.words[-2:])} ended with {code}: {process.output()}"
        return "; ".join(self.differences(home))

    def differences(self, home: Path) -> list[str]:
        """How a finished run differs from the unbroken one."""
        try:
            found = compare(self.straight / RUN, home / RUN)
            return found + compare_caches(self.straight / "cache", home / "cache")
        except (OSError, ValueError, KeyError) as error:
            return [f"{type(error).__name__}: {error}"]


def copy_home(source: Path, home: Path) -> None:
    """Copy a folder with its hard links and times."""
    subprocess.run(["cp", "-a", str(source), str(home)], check=True)


def unbroken(name: str, words: Sequence[str], work: Path, places: dict[str, str]) -> Course:
    """Run a command line to its end, and count its points."""
    home = work / f"straight {name}"
    own = [word.format(**places) if word.startswith("data.root=") else word for word in words]
    process = Process(own, home, counts=True)
    code = process.wait()
    status = json.loads((home / RUN / "result.json").read_text())["status"] if code in (0, 1) else ""
    if status not in ("finished", "diverged"):
        raise AssertionError(f"{name} ended with {code}:\n{process.output()}")
    import_as(process)
    return Course(name, own, home, code=code, points=process.points())


def other_course(name: str, course: Course, work: Path, prepare: Callable[[Path], None]) -> Course:
    """The same run after `prepare` in its home, with the points that it alone reaches."""
    before, home = work / f"before {name}", work / f"straight {name}"
    prepare(before)
    copy_home(before, home)
    process = Process(course.words, home, counts=True)
    if (code := process.wait()) != course.code:
        raise AssertionError(f"{name} ended with {code}:\n{process.output()}")
    new = {point: times for point, times in process.points().items() if point not in course.points}
    found = Course(name, course.words, course.straight, before, course.code, new)
    if wrong := found.differences(home):
        raise AssertionError(f"{name}: {wrong}")
    return found


def courses(work: Path, *, most: int = 5) -> list[Course]:
    """The runs that are killed at their points."""
    make_images(work / IMAGES)
    places = {IMAGES: str(work / IMAGES), SHARDS: make_shards(work / IMAGES, work / SHARDS)}
    first = unbroken("a new run", CACHES, work, places)
    saved = next(point for point in first.points if point.startswith("replace run/checkpoints/last.pt"))
    time = first.points[saved][-2]

    def stopped(home: Path) -> None:
        assert Process(first.words, home, kill=Kill(saved, time, AFTER)).wait() == -signal.SIGKILL

    def damaged(home: Path) -> None:
        stopped(home)
        path = home / RUN / "checkpoints" / "last.pt"
        path.write_bytes(path.read_bytes()[:-1000])

    def of_other_settings(home: Path) -> None:
        point = next(point for point in first.points if point.startswith("open run/checkpoints/"))
        others = [word.replace("optim.lr=0.003", "optim.lr=0.5") for word in first.words]
        assert Process(others, home, kill=Kill(point, 1, BEFORE)).wait() == -signal.SIGKILL

    found = [first]
    ways = {
        "a run that goes on": stopped,
        "one behind a damaged state": damaged,
        "one in another's place": of_other_settings,
    }
    for name, prepare in list(ways.items())[: most - 1]:
        found.append(other_course(name, first, work, prepare))
    if most > len(ways) + 1:
        bad = unbroken("bad batches", BAD_BATCHES, work, places)
        bad.points = {point: times for point, times in bad.points.items() if point not in first.points}
        found.append(bad)
    return found


@dataclass(frozen=True)
class Outcome:
    """How a run ended that was killed."""

    what: str  # of the run
    wrong: str  # empty where it is equal to the bit
    kills: int = 1
    place: str = ""  # where it was killed


def kills_of(course: Course, *, every: bool, dice: random.Random) -> list[Kill]:
    """Before and after each point and in the middle of a write; once each, or `every` time that it is reached."""
    found = []
    for point, times in course.points.items():
        # A kill after an fsync finds the same files as one before it.
        in_steps = dict.fromkeys(("write", "torch.save", "safetensors.torch.serialize_file"), MOMENTS)
        moments = {"fsync": (BEFORE,), **in_steps}.get(point.partition(" ")[0], (BEFORE, AFTER))
        for moment in moments:
            chosen = times if every else [dice.choice((times[0], times[-1], dice.choice(times)))]
            found += [Kill(point, number, moment) for number in chosen]
    return found


def kill_at(course: Course, kill: Kill, home: Path) -> Outcome:
    """Start the run, let it kill itself, continue it, compare."""
    shutil.rmtree(home, ignore_errors=True)
    course.prepare(home)
    what = f"{course.name}, killed {kill}"
    process = Process(course.words, home, kill=kill)
    if (code := process.wait()) != -signal.SIGKILL:
        return Outcome(what, f"not reached: it ended with {code}", 0, kill.point)
    wrong = course.go_on(home, random.Random(str(kill)))
    if not wrong:
        shutil.rmtree(home)
    return Outcome(what, wrong, place=kill.point)


def kill_sometime(course: Course, seconds: float, home: Path, dice: random.Random) -> Outcome:
    """Kill a run after random times, once to three times, continue it, compare."""
    kills = []
    for _ in range(dice.randint(1, 3)):
        resumes = (home / RUN / "config.yaml").exists() and dice.random() < 0.5
        process = Process([f"resume={RUN}"] if resumes else course.words, home)
        began, after = time.monotonic(), dice.uniform(0, seconds)
        while (code := process.poll()) is None and time.monotonic() - began < after:
            time.sleep(0.003)
        if code is not None:
            if code != course.code:
                return Outcome(course.name, f"refused: it ended with {code}: {process.output()}", len(kills))
            break
        if dice.random() < 0.2:
            os.kill(process.pid, signal.SIGKILL)  # its workers find out by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(f"{after:.2f}")
    what = f"{course.name}, killed after {', '.join(kills) or 'nothing'} s"
    wrong = course.go_on(home, dice)
    if not wrong:
        shutil.rmtree(home)
    return Outcome(what, wrong, len(kills))


@dataclass
class Figures:
    """How the runs ended so far."""

    ends: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    places: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        """Count a run, and print what was wrong with it."""
        known = outcome.wrong.startswith(("refused", "not reached"))
        self.ends[outcome.wrong.partition(":")[0] if known else "different" if outcome.wrong else EQUAL] += 1
        self.kills += outcome.kills
        self.places.add(outcome.place)
        if outcome.wrong:
            print(f"{outcome.what}: {outcome.wrong}", flush=True)
        elif self.ends.total() % 50 == 0:
            print(f"{self.ends.total()} runs so far, {self.ends[EQUAL]} of them equal to the bit", flush=True)

    @property
    def is_good(self) -> bool:
        """Whether every run was equal."""
        return self.ends[EQUAL] == self.ends.total()

    def __str__(self) -> str:
        """In a line, without what was looked at."""
        names = [EQUAL, "refused", "different", *(["not reached"] if self.ends["not reached"] else [])]
        return f"{self.kills} kills: " + ", ".join(f"{self.ends[name]} {name}" for name in names)


def try_all(tasks: Sequence[tuple[Any, ...]], function: Callable[..., Outcome], jobs: int) -> Figures:
    """Call `function(*task)` for each task, in `jobs` forked processes; after Ctrl-C the figures of those so far."""
    found = Figures()
    with contextlib.suppress(KeyboardInterrupt):
        if jobs == 1:
            for task in tasks:
                found.add(function(*task))
            return found
        # Its processes run nothing but forks: a process with threads cannot be forked safely.
        pool = ProcessPoolExecutor(jobs, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                found.add(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def run_points(
    work: Path, *, seed: int = 0, every: bool = False, jobs: int = 1, most: int | None = None
) -> tuple[str, bool]:
    """Kill runs at their points, at `most` of them; the line of figures, and whether all were equal."""
    found = courses(work)
    dice = random.Random(seed)
    tasks = [(course, kill) for course in found for kill in kills_of(course, every=every, dice=dice)]
    tasks = dice.sample(tasks, len(tasks) if most is None else most)
    print(f"{len(tasks)} kills", flush=True)
    homes = [work / f"killed {number}" for number in range(len(tasks))]
    seen = try_all([(*task, home) for task, home in zip(tasks, homes, strict=True)], kill_at, jobs)
    return f"{len(seen.places)} write points, {seen}", seen.is_good


def run_rounds(work: Path, rounds: int, *, seed: int = 0, jobs: int = 1) -> tuple[str, bool]:
    """Kill runs at random moments; the line of figures, and whether all were equal."""
    make_images(work / IMAGES)
    places = {IMAGES: str(work / IMAGES), SHARDS: make_shards(work / IMAGES, work / SHARDS)}
    tasks, found = [], []
    for name, words in list(ROUNDS.items())[:rounds]:
        course = unbroken(name, [*words, *EVERY], work, places)
        began = time.monotonic()
        again = Process(course.words, work / f"timed {name}")
        assert again.wait() == course.code, again.output()
        found.append((course, time.monotonic() - began))
    for number in range(rounds):
        course, seconds = found[number % len(found)]
        tasks.append((course, seconds, work / f"round {number}", random.Random(f"{seed} {number}")))
    seen = try_all(tasks, kill_sometime, jobs)
    return f"{seen.ends.total()} rounds, {seen}", seen.is_good


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", action="store_true", help="kill at each place that writes")
    parser.add_argument("--all", action="store_true", help="at each of them, each time that it is reached")
    parser.add_argument("--most", type=int, help="kill at so many places, drawn by lot")
    parser.add_argument("--rounds", type=int, default=0, help="so many runs that are killed at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    is_good, lines = True, []
    if given.points or not given.rounds:
        with tempfile.TemporaryDirectory() as folder:
            line, is_good = run_points(Path(folder), seed=given.seed, every=given.all, jobs=given.jobs, most=given.most)
            lines.append(line)
    if given.rounds:
        with tempfile.TemporaryDirectory() as folder:
            line, is_equal = run_rounds(Path(folder), given.rounds, seed=given.seed, jobs=given.jobs)
            lines.append(line)
            is_good &= is_equal
    print("\n".join(lines))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
