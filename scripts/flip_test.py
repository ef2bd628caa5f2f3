"""Flip bits in every file that a run or its cache holds, read the files again, and see that no result changes.

    python scripts/flip_test.py --flips 10000 --commands 200

Each flip goes through the reader of its file in this process; `--commands` of them go through a whole command (resume,
the same run again, report, cache, replay, describe, a run that starts from the weights). It has to be refused with the
file's name, or made anew, or to change nothing. `--others` more trials cut a file, fill a part of it with zeros, empty
it, append to it or remove it. Ends with 1 if there was another result, a trace, an error without the name, or a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from finetune.__main__ import main as finetune  # noqa: E402
from finetune.app.build import Run, build_run  # noqa: E402
from finetune.app.feeds import Feeds  # noqa: E402
from finetune.config import recorded  # noqa: E402
from finetune.config.words.saved import base_of, read_conf  # noqa: E402
from finetune.core.finite import StepRecord  # noqa: E402
from finetune.core.freezing import set_up_layers  # noqa: E402
from finetune.data import open_source  # noqa: E402
from finetune.data.checks.known_images import KnownImages  # noqa: E402
from finetune.data.checks.start import SkippedList  # noqa: E402
from finetune.data.sources import stores  # noqa: E402
from finetune.models.upstream.weight_files import read_metadata, read_state_dict  # noqa: E402
from finetune.runs import bad_batch  # noqa: E402
from finetune.runs.checkpoint import read_state  # noqa: E402
from finetune.runs.earlier import NOT_OF_THE_RUN, EarlierRun  # noqa: E402
from finetune.runs.epoch_files import latest_state  # noqa: E402
from finetune.runs.finished import OF_THE_START, check_finished  # noqa: E402
from finetune.runs.history import History, timeless  # noqa: E402
from finetune.runs.records import read_rates, read_result  # noqa: E402
from finetune.runs.saver import Saver  # noqa: E402
from finetune.runs.weights import read_weights  # noqa: E402
from finetune.system.errors import EXPECTED_ERRORS, UserError  # noqa: E402
from finetune.system.locks import holder  # noqa: E402
from finetune.system.ours import read_marker  # noqa: E402

WORDS = (
    *("model=vit", "optim.fix_layer=4", "train.ema=0.9", "train.keep=2", "data=webdataset", "data.download=true"),
    *("data.cache=disk", "prefix.cache=disk", "augment=none", "train.epochs=3", "data.batch_size=8", "device=cpu"),
)
SHARDS = {"train-0": 8, "train-1": 8, "val-0": 6, "test-0": 6}
LIMIT_S = 60
DENSE = 256  # bytes at both ends of a file, where headers and checksums stand: half of the flips go there
BAD = ("another result", "trace", "unnamed", "hang")
OUTCOMES = ("refused by name", "rebuilt", "without effect", *BAD)
# No reader: logs, pictures and tables for people, and locks, whose content is not looked at.
UNREAD = (".lock", ".log", ".png", ".csv", ".txt.lock", "duplicates.txt")


class HangError(BaseException):
    """A trial took too long; no handler of errors may catch it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a HangError in the block after some seconds."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def digest(value: object) -> str:
    """A hash of plain types, tensors and bytes, in any nesting."""
    state = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode())
            state.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                add(key)
                add(part[key])
        elif isinstance(part, (list, tuple)):
            state.update(f"[{len(part)}".encode())
            for item in part:
                add(item)
        else:
            state.update(repr(part).encode("utf-8", "surrogateescape"))

    add(value)
    return state.hexdigest()


class Snapshot:
    """All files of some folders: what they held, so that a trial can be undone."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read everything."""
        self._folders = folders
        self.content = {path: path.read_bytes() for path in self._files()}
        self._seen = {path: self._mark(path) for path in self.content}

    def _files(self) -> list[Path]:
        return [path for folder in self._folders for path in folder.rglob("*") if path.is_file()]

    @staticmethod
    def _mark(path: Path) -> tuple[int, ...]:
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def restore(self) -> None:
        """Undo every change; times are as they were, too, since names in the cache depend on them."""
        for path in set(self._files()) - self.content.keys():
            path.unlink()
        for path, mark in self._seen.items():
            if path.exists() and self._mark(path) == mark:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(self.content[path])
            os.utime(path, ns=(mark[2], mark[2]))
            self._seen[path] = self._mark(path)


@dataclass
class World:
    """A finished run, one that was stopped, their cache, and what each reader finds in an undamaged file."""

    folder: Path
    words: list[str]
    expected: dict[str, str] = field(default_factory=dict)  # reader or command -> digest
    fallback: str = ""  # digest of the checkpoint before the last

    def __post_init__(self) -> None:
        """Name the folders."""
        self.done, self.stopped = self.folder / "done", self.folder / "stopped"
        self.caches = self.folder / "cache"
        self.new = self.folder / "new"

    def run_words(self, run_dir: Path) -> list[str]:
        """The command line of the run, in another folder."""
        return [*self.words, f"hydra.run.dir={run_dir}"]


def make_shards(folder: Path) -> None:
    """Small shards of two classes, and the list of their names."""
    folder.mkdir(parents=True)
    for number, (name, count) in enumerate(SHARDS.items()):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in range(count):
                pixels = np.random.default_rng([number, index]).integers(0, 200, (36, 36, 3)).astype(np.uint8)
                pixels[:, :, index % 2] = 220
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                for ending, data in (("png", image.getvalue()), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "classes.txt").write_text("ant\nbee\n")


def command(words: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of `python -m finetune WORDS`, in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = finetune(list(words))
        except SystemExit as error:
            code = int(error.code or 0) if not isinstance(error.code, str) else 1
    return code, output.getvalue()


def restorable() -> AbstractContextManager[object]:
    """While it is open, names in the cache do not depend on ctime: no program can put that back, see `Snapshot`."""
    return patch.object(stores, "_changed_ns", lambda status: 0)


def make_world(folder: Path) -> World:
    """Train the runs, and note what an undamaged file gives."""
    make_shards(folder / "served")
    shards = ",".join(SHARDS)
    words = [*WORDS, f"data.root=file://{folder}/served/{{{shards}}}.tar", f"data.cache_dir={folder / 'cache'}"]
    world = World(folder, words)
    code, text = command(world.run_words(world.done))
    assert code == 0, text
    stop_after_epoch(2, world.run_words(world.stopped))
    record = StepRecord(epoch=0, step=1, batch=0, ids=torch.tensor([0, 1]))
    batch = (torch.full((2, 3, 32, 32), float("nan")), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for run_dir in (world.done, world.stopped):
        bad_batch.store(run_dir, record, [batch], names=["a", "b"], rates={"head": 0.1})
    assert (world.stopped / "checkpoints" / "previous.pt").exists()
    return world


def stop_after_epoch(epoch: int, words: Sequence[str]) -> None:
    """Start a run and interrupt it, as Ctrl-C does, once some epochs are saved."""
    save, count = Saver.save_epoch, iter(range(1, 100))

    def save_and_stop(*args: Any, **kwargs: Any) -> bool:
        is_saved = save(*args, **kwargs)
        if next(count) == epoch:
            os.kill(os.getpid(), signal.SIGINT)
        return is_saved

    Saver.save_epoch = save_and_stop  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            command(words)
    finally:
        Saver.save_epoch = save  # type: ignore[method-assign]


# --- readers in this process -----------------------------------------------------------------------------------------


class Readers:
    """For each kind of file what its reader gives, as a value that `digest` takes."""

    def __init__(self, world: World) -> None:
        """Build the model and open the images once; readers of caches use them."""
        self.world = world
        self.conf = read_conf(world.done)
        self.run = self._built()
        state = latest_state(world.stopped / "checkpoints")
        assert state is not None
        self.state = state[0]
        self.names = sorted(read_result(world.done / "result.json").keys() - {*OF_THE_START})

    def _built(self) -> Run:
        with tempfile.TemporaryDirectory() as scratch:
            run = build_run(self.conf, Path(scratch))
        set_up_layers(run.model, self.conf.optim, train=self.conf.train)
        return run

    def of(self, path: Path) -> tuple[str, Callable[[], object]] | None:
        """Name and function of the reader of a file; None if nothing reads it."""
        name, folder = path.name, path.parent
        if name.endswith(UNREAD):
            return None
        if self.world.caches in path.parents:
            kind = path.relative_to(self.world.caches).parts[1]
            found = {"pixels": self.pixels, "activations": self.activations, "shards": self.shards}
            return (kind, found[kind]) if kind in found else ("checks", self.checks)
        run_dir = self.world.done if self.world.done in path.parents else self.world.stopped
        readers: dict[str, Callable[[], object]] = {
            "last.pt": lambda: self.latest(folder),
            "previous.pt": lambda: read_state(path),
            "config.yaml": lambda: self.settings(run_dir),
            "history.jsonl": lambda: self.history(run_dir),
            "skipped.txt": lambda: SkippedList(run_dir).from_start(),
            ".lock.json": lambda: holder(run_dir),
            ".finetune.json": lambda: self.marker(run_dir),
        }
        if run_dir == self.world.done:
            numbers = ("result.json", "history.jsonl", "rates.json", "metrics.json")
            readers |= dict.fromkeys(numbers, lambda: self.numbers(run_dir))
        if name in readers:
            return f"{run_dir.name} {name}", readers[name]
        if name.endswith(".safetensors"):
            return f"{run_dir.name} {name}", lambda: self.weights(path)
        return ("bad_batch", lambda: bad_batch.load(run_dir, None)) if name.endswith(".pt") else None

    def latest(self, folder: Path) -> object:
        """The state that a run continues from; it may be the one before the last."""
        found = latest_state(folder)
        return None if found is None else found[0]

    def marker(self, run_dir: Path) -> object:
        """What the marker of a folder says; its id is for the names of temporary files alone."""
        marker = read_marker(run_dir)
        return None if marker is None else (marker.kind, marker.format)

    def settings(self, run_dir: Path) -> object:
        """The settings, and how they differ from those of the checkpoint: a change has to be seen."""
        settings = recorded(base_of(run_dir))
        earlier = EarlierRun(None, []).since_state(self.state["notes"]["settings"], settings, force=False)
        if earlier.changes:
            raise UserError(f"config.yaml: {earlier.changes[0]}")  # shown, and allowed as on the command line
        return {name: value for name, value in settings.items() if name not in NOT_OF_THE_RUN}

    def history(self, run_dir: Path) -> object:
        """The rows, brought in line with the checkpoint."""
        history = History(run_dir / "history.jsonl")
        history.restore(self.state["history"], history.readable_rows())
        return timeless(history.rows())

    def numbers(self, run_dir: Path) -> object:
        """What a report shows of a finished run."""
        check_finished(run_dir)
        result = read_result(run_dir / "result.json")
        result = {name: result.get(name) for name in self.names}  # an entry of another name is shown nowhere
        rows = History(run_dir / "history.jsonl").rows()
        return [result, timeless(rows), read_rates(run_dir / "rates.json")]

    def weights(self, path: Path) -> object:
        """Tensors and metadata, as a run and as `model.pretrained` read them."""
        metadata = read_metadata(path)
        return [read_weights(path), read_state_dict(path), dict(metadata.named), str(metadata.preprocess)]

    def pixels(self) -> object:
        """An epoch of each split out of the decoded images."""
        batches = []
        for split in ("train", "val", "test"):
            loader = self.run.loader(split, train=False)
            batches += list(loader.epoch(0))
            loader.close()
        return batches

    def activations(self) -> object:
        """An epoch of each split out of the cached activations."""
        feeds = Feeds(self.run, lambda: None)
        batches = []
        for feed in (*feeds.train_and_val(), feeds.test()):
            feed.fill(0)
            batches += list(feed.epoch(0))
            feed.close()
        return batches

    def shards(self) -> object:
        """Every image of the shards with its label and name."""
        source = open_source(self.conf.data)
        splits = source.splits.values()
        parts = [
            (
                split.labels,
                [split.name_of(i) for i in range(len(split))],
                [split.store.read(int(r)) for r in split.rows],
            )
            for split in splits
        ]
        return [source.classes, parts]

    def checks(self) -> object:
        """What is known of images; nothing is as good, since they are read again then."""
        known = KnownImages(self.conf.data.cache_dir, self.run.source.location)
        return [known.records.tobytes(), known.reasons] if len(known.records) else "read again"


# --- damage ----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, dice: random.Random) -> bytes:
    """One bit changed, in every second case near an end."""
    place = dice.randrange(len(data))
    if dice.random() < 0.5:
        place = place % DENSE if dice.random() < 0.5 else len(data) - 1 - place % DENSE
        place = min(max(place, 0), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def otherwise_damaged(data: bytes, dice: random.Random) -> bytes:
    """Cut, with a part of zeros, empty, or longer."""
    start = dice.randrange(len(data))
    kind = dice.choice(["cut", "zeros", "zeros", "empty", "longer", "moved"])
    if kind == "zeros":
        size = dice.choice([64, 512, 4096])
        return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]
    if kind == "moved":
        return data[:start] + data[start + 1 :]
    return {"cut": data[:start], "empty": b"", "longer": data + dice.randbytes(dice.choice([1, 28, 4096]))}[kind]


@contextlib.contextmanager
def damaged(path: Path, content: bytes, snapshot: Snapshot) -> Iterator[None]:
    """The file with another content and the same times, as a bad disk leaves it; everything is undone at the end."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.truncate(len(content))
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        yield
    finally:
        silence()
        snapshot.restore()


def silence() -> None:
    """Drop the handlers of a broken off run, and print no warning of a reader."""
    logging.getLogger("finetune").handlers[:] = [logging.NullHandler()]


def is_named(path: Path, text: str) -> bool:
    """Whether a message names the file, or its entry in a cache."""
    return path.name in text or path.parent.name in text


def try_reader(path: Path, read: Callable[[], object], right: Sequence[str], content: bytes) -> tuple[str, str]:
    """Outcome of reading a damaged file, and details; `right` are digests, the first that of the undamaged file."""
    try:
        with time_limit(LIMIT_S):
            found = digest(read())
    except HangError:
        return "hang", ""
    except EXPECTED_ERRORS as error:
        return ("refused by name" if is_named(path, str(error)) else "unnamed"), str(error)
    except Exception:
        return "trace", traceback.format_exc()
    if found not in right:
        return "another result", ""
    is_mended = found != right[0] or not path.exists() or path.read_bytes() != content
    return ("rebuilt" if is_mended else "without effect"), ""


# --- whole commands --------------------------------------------------------------------------------------------------


def outcome_of(run_dir: Path) -> object:
    """Everything that a run has found out, without what clocks and folders say."""
    result = json.loads((run_dir / "result.json").read_text())
    for name in OF_THE_START:
        result.pop(name, None)
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    weights = [read_weights(run_dir / "checkpoints" / f"{name}.safetensors") for name in ("best", "last")]
    return [result, timeless(rows), weights]


Command = tuple[list[str], Callable[[str], object], list[Path]]  # words, what to compare of its output, files to damage


def commands_of(world: World) -> dict[str, Command]:
    """Whole commands."""

    def run_of(folder: Path) -> Callable[[str], object]:
        return lambda text: outcome_of(folder)

    def files(*folders: Path) -> list[Path]:
        return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]

    best = world.done / "checkpoints" / "best.safetensors"
    new = world.run_words(world.new)
    return {
        "resume": ([f"resume={world.stopped}"], run_of(world.stopped), files(world.stopped, world.caches)),
        "the same again": (new, run_of(world.new), files(world.caches)),
        "from its weights": ([*new, f"model.pretrained={best}"], run_of(world.new), [best]),
        "nothing to do": (world.run_words(world.done), lambda text: "", files(world.done)),
        "report": (["report", str(world.done)], lambda text: text, files(world.done)),
        "replay": (["replay", str(world.done)], lambda text: text, files(world.done)),
        "describe": (["describe", *world.words], lambda text: text, files(world.caches)),
        "cache": (["cache", f"data.cache_dir={world.caches}"], lambda text: "", files(world.caches)),
    }


def try_command(path: Path, do: Command, right: str, content: bytes) -> tuple[str, str]:
    """Outcome of a whole command over a damaged file, and details."""
    words, compared, _ = do
    try:
        with time_limit(LIMIT_S):
            code, text = command(words)
    except HangError:
        return "hang", " ".join(words)
    except BaseException:
        return "trace", traceback.format_exc()
    if "Traceback" in text or "is at fault" in text:
        return "trace", text
    if code:
        return ("refused by name" if is_named(path, text) else "unnamed"), text
    if digest(compared(text)) != right:
        return "another result", text
    is_mended = not path.exists() or path.read_bytes() != content
    return ("rebuilt" if is_mended else "without effect"), ""


# --- all of it -------------------------------------------------------------------------------------------------------


def run_readers(
    world: World, trials: int, dice: random.Random, damage: Callable[..., bytes], seen: Counter[str]
) -> None:
    """`trials` damaged files, equally many of each, through their readers."""
    readers, snapshot = Readers(world), Snapshot([world.done, world.stopped, world.caches])
    files = [(path, found) for path in sorted(snapshot.content) if (found := readers.of(path)) is not None]
    files = [(path, found) for path, found in files if snapshot.content[path]]
    right: dict[str, list[str]] = {}
    for path, (name, read) in files:
        if name not in right:
            right[name] = [digest(read())]
            assert digest(read()) == right[name][0], f"{name} differs from time to time"
            if name.endswith("last.pt"):
                before = path.with_name("previous.pt")
                right[name] += [digest(read_state(before))] if before.exists() else []
            right[name] += [digest("read again")] if name == "checks" else []
    snapshot = Snapshot([world.done, world.stopped, world.caches])
    for number in range(trials):
        path, (name, read) = files[number % len(files)]
        content = damage(snapshot.content[path], dice)
        with damaged(path, content, snapshot):
            note(seen, path, name, *try_reader(path, read, right[name], content))


def run_commands(world: World, trials: int, dice: random.Random, seen: Counter[str]) -> None:
    """`trials` flipped bits through whole commands in turn."""
    snapshot = Snapshot([world.folder])
    commands, right = commands_of(world), {}
    for name, do in commands.items():
        if trials < len(commands) and len(right) == trials:
            break
        code, text = command(do[0])
        assert code == 0, (name, text)
        right[name] = digest(do[1](text))
        clean(world, snapshot)
    for number in range(trials):
        name = list(right)[number % len(right)]
        do = commands[name]
        path = dice.choice([path for path in do[2] if snapshot.content[path] and not path.name.endswith(UNREAD)])
        content = flipped(snapshot.content[path], dice)
        with damaged(path, content, snapshot):
            note(seen, path, name, *try_command(path, do, right[name], content))
        clean(world, snapshot)


def clean(world: World, snapshot: Snapshot) -> None:
    """Undo what a command did."""
    snapshot.restore()
    shutil.rmtree(world.new, ignore_errors=True)


def note(seen: Counter[str], path: Path, name: str, outcome: str, detail: str) -> None:
    """Count an outcome; print a bad one, and now and then how far the test is."""
    seen[outcome] += 1
    if seen.total() % 1000 == 0:
        print(figures("so far", seen), flush=True)
    if outcome in BAD:
        print(f"{outcome}: {name}, {path}\n{detail[-2000:]}", flush=True)


def figures(title: str, seen: Counter[str]) -> str:
    """One line: how many trials ended in which way."""
    return f"{seen.total():,} {title}: " + ", ".join(f"{seen[outcome]:,} {outcome}" for outcome in OUTCOMES)


def run(folder: Path, *, flips: int, commands: int, others: int, seed: int) -> bool:
    """All trials in a folder; whether every one of them went well. Prints a line of figures for each kind."""
    world, is_well = make_world(folder), True
    silence()
    for title, trials, damage in (("flips", flips, flipped), ("other damages", others, otherwise_damaged)):
        seen: Counter[str] = Counter()
        if trials:
            run_readers(world, trials, random.Random(f"{seed} {title}"), damage, seen)
            print(figures(title, seen), flush=True)
        is_well &= not any(seen[outcome] for outcome in BAD)
    if commands:
        seen = Counter()
        run_commands(world, commands, random.Random(f"{seed} commands"), seen)
        print(figures("flips through whole commands", seen), flush=True)
        is_well &= not any(seen[outcome] for outcome in BAD)
    return is_well


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--others", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, restorable():
        is_well = run(
            Path(folder).resolve(), flips=given.flips, commands=given.commands, others=given.others, seed=given.seed
        )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
