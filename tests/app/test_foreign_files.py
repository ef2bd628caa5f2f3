"""Every foreign byte in a folder is still there after every command, whatever lies there under whatever name.

Three worlds: folders of others with our names (every command refuses them), folders of others without, and folders of
ours into which somebody puts files, or which came from elsewhere with links in them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune.__main__ import main
from finetune.data.caches.entries import cache_folder
from finetune.system.ours import MARKER, OWN, FolderKind, OwnNames

State = dict[str, tuple[int, object]]


def state_of(paths: Sequence[Path]) -> State:
    """The type of each path, and its bytes, its target or its names."""
    found: State = {}
    for path in paths:
        mode = path.lstat().st_mode if os.path.lexists(path) else 0
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path)] = (mode, content)
    return found


def below(folder: Path) -> list[Path]:
    return [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


def own_names(own: OwnNames) -> list[str]:
    names = [*own.replaced, *own.in_place, *own.folders]
    names += [name for name in ("epoch_0001.safetensors", "step_3.pt") if own.has_pattern(name)]
    return names + [f"{folder}/{name}" for folder, inside in own.folders.items() for name in own_names(inside)]


def others_names(dice: random.Random, names: Sequence[str]) -> list[str]:
    """Names that look like ours: temporaries and locks of other ids, copies, hidden files, other cases."""
    hexes = ["".join(dice.choices("0123456789abcdef", k=count)) for count in (16, 32, 32)]
    entry = f"{hexes[1]}-float32-{hexes[2]}-0"
    found = [f".{dice.choice(names)}.{dice.randint(1, 9999)}.tmp".replace("/", "_") for _ in range(3)]
    found += [f".{name}.{hexes[0]}-{dice.randint(1, 9999)}.tmp".replace("/", "_") for name in dice.sample(names, 2)]
    found += [f"{name} (copy)".replace("/", "_") for name in dice.sample(names, 2)] + ["notes.txt", ".hidden", "ünï\n"]
    found += ["my.lock", "best.pending", "best.before", "epoch_0099.safetensors", "epoch_0003 (copy).safetensors"]
    found += ["epoch_7.safetensors", "my_best.safetensors", "step_x.pt", "step_3 (copy).pt", "data.csv", "RUN.LOG"]
    found += [hexes[1], entry, f"{hexes[0]}-x.tar", f"{hexes[0]}-x.tar.part", f"{hexes[1]}.77.tmp", f"{hexes[1]}.lock"]
    return [*found, f"{hexes[0]}.npz", f"..finetune.json.{hexes[0]}-7.tmp", "entry.json", "finetune.log", "config.yml"]


MAKERS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "file": lambda path, victim, dice: path.write_bytes(dice.randbytes(dice.randint(1, 40))),
    "empty": lambda path, victim, dice: path.write_bytes(b"-" * path.name.startswith("..finetune")),
    "link": lambda path, victim, dice: path.symlink_to(victim / "letter.txt"),
    "link to a folder": lambda path, victim, dice: path.symlink_to(victim),
    "dangling": lambda path, victim, dice: path.symlink_to(victim / "new.txt"),
    "hard link": lambda path, victim, dice: os.link(victim / "letter.txt", path),
    "fifo": lambda path, victim, dice: os.mkfifo(path),
    "folder": lambda path, victim, dice: (path.mkdir(), (path / "in it.txt").write_bytes(dice.randbytes(9))),
}


class World:
    """Folders of a person: images, a victim that links lead to, and those that commands write into."""

    def __init__(self, root: Path, images: Path, seed: int) -> None:
        self.root, self.images, self.dice = root, images, random.Random(seed)
        self.victim = root / "victim"
        self.victim.mkdir(parents=True)
        (self.victim / "letter.txt").write_text("somebody's")
        self.foreign: list[Path] = []

    def put(self, folder: Path, names: Sequence[str], sorts: Sequence[str] = tuple(MAKERS)) -> None:
        """Make something random under each name that is free."""
        for name in sorted(names, key=lambda name: -name.count("/")):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                MAKERS[self.dice.choice(sorts)](path, self.victim, self.dice)
                self.foreign += [path, *below(path)]

    def snapshot(self) -> State:
        return state_of([*self.foreign, self.victim, *below(self.victim), *below(self.images)])

    def words(self, *words: str) -> list[str]:
        return [
            *("model=vit", "data=folder", f"data.root={self.images}", "train.epochs=1", "data.batch_size=8"),
            *("data.workers=0", "augment=none", f"data.cache_dir={self.root / 'caches'}", *words),
        ]

    def commands(self) -> dict[str, list[str]]:
        """Each command that writes, with the folders `run`, `disk`, `sweep` and `check`."""
        return {
            "run": self.words("data.cache=disk", f"hydra.run.dir={self.root / 'run'}"),
            "disk": self.words("prefix.cache=disk", "optim.fix_layer=2", f"hydra.run.dir={self.root / 'disk'}"),
            "sweep": ["-m", *self.words("seed=1,2"), f"hydra.sweep.dir={self.root / 'sweep'}"],
            "check": ["check", *self.words(), f"hydra.run.dir={self.root / 'check'}"],
        }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name in "ab":
        (root / name).mkdir()
        for number in range(10):
            pixels = np.random.default_rng([ord(name), number]).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A folder with a run, a sweep, a check and caches that are ours."""
    world = World(tmp_path_factory.mktemp("made") / "world", images, 0)
    for words in world.commands().values():
        assert main(words) == 0
    return world.root


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are written as tables are, and take half of the time."""

    def save(figure: object, path: Path) -> None:
        from finetune.system.files import write_atomic

        write_atomic(path, lambda temporary: temporary.write_bytes(b"a picture"))

    monkeypatch.setattr("finetune.report.look.save_figure", save)


@pytest.mark.parametrize("seed", range(3))
def test_folders_of_others_with_our_names_are_refused(
    tmp_path: Path, images: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path / "world", images, seed)
    sorts = ["file"] if seed == 0 else list(MAKERS)
    of_kind = {"run": FolderKind.run, "disk": FolderKind.run, "sweep": FolderKind.sweep, "check": FolderKind.check}
    for name, kind in of_kind.items():
        names = own_names(OWN[kind])
        world.put(world.root / name, names if seed == 0 else world.dice.sample(names, 2), sorts)
    # As another program's sweep looks to one that does not ask: numbered folders with results.
    world.put(world.root / "sweep", ["0/result.json", "0/history.jsonl", "1/rates.json", "1/notes"], ["file"])
    before, everything = world.snapshot(), {path: sorted(below(world.root / path)) for path in of_kind}
    for name, words in world.commands().items():
        assert main(words) == 1, name
        error = capsys.readouterr().err
        assert "so finetune did not make it; nothing was changed" in error and str(world.root / name) in error, error
    for name in of_kind:
        assert main(["report", str(world.root / name)]) == 1
        assert f"has no {MARKER}" in capsys.readouterr().err
    assert world.snapshot() == before
    assert {path: sorted(below(world.root / path)) for path in of_kind} == everything


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_what_others_have_beside_our_files_stays(
    tmp_path: Path, images: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first start and in folders of ours, at their top and deep inside, through every command again."""
    world = World(tmp_path / "world", images, 100 + seed)
    ours = [name for kind in OWN for name in own_names(OWN[kind])]
    for name in ("run", "sweep", "check", "caches", "disk"):
        world.put(world.root / name, others_names(world.dice, ours))
    world.put(world.root / "sweep", ["7/result.txt", "letters/0/notes"], ["file"])
    world.put(world.root / "caches", ["pixels/photo.png", f"pixels/{'0' * 32}/pixels.u8", "shards/x.tar"], ["file"])
    before = world.snapshot()
    for words in world.commands().values():
        assert main(words) == 0
    assert world.snapshot() == before

    cache = cache_folder(str(world.root / "caches"))
    inside = [world.root / "run", *(world.root / place for place in ("run/checkpoints", "run/bad_batch", "sweep/1"))]
    inside += [world.root / place for place in ("sweep", "sweep/1/checkpoints", "check", "caches")]
    inside += [cache, *(cache / kind for kind in OWN[FolderKind.cache].folders)]
    for folder in inside:
        names = others_names(world.dice, ours)
        by_pattern = ["epoch_0099.safetensors"]  # a link there is refused, see below
        world.put(folder, [name for name in names if name not in by_pattern or folder.name != "checkpoints"])
        world.put(folder, by_pattern, ["file", "empty", "hard link"])
    for epoch in (2, 3, 4):  # with our names, and of another program
        path = world.root / "run" / "checkpoints" / f"epoch_{epoch:04d}.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={"epoch": str(epoch)} if epoch > 2 else None)
        world.foreign.append(path)
    entries = [path for kind in ("pixels", "activations") for path in (cache / kind).iterdir() if path.is_dir()]
    entries = [path for path in entries if (path / "entry.json").exists() and path not in world.foreign]
    assert len(entries) >= 3
    world.put(entries[0], ["letter.txt"], ["file"])  # so that this entry is no more ours alone
    before = world.snapshot()
    run = str(world.root / "run")
    forced = [f"resume={run}", "train.epochs=2", "optim.lr=1e-4", "train.keep=2", "resume_force=true"]
    assert main(forced) == 1  # it would write the weights of epoch 2
    assert "epoch_0002.safetensors holds no weights of epoch 2" in capsys.readouterr().err
    taken = world.root / "run" / "checkpoints" / "epoch_0002.safetensors"
    assert world.snapshot() == before
    world.foreign.remove(taken)
    taken.unlink()
    before = world.snapshot()
    assert main(forced) == 0
    for name, words in world.commands().items():
        assert main(words) == (1 if name == "run" else 0)  # its settings are others by now
    assert main([f"resume={run}"]) == 0
    for words in (["report", run], ["report", str(world.root / "sweep")], ["cache", "clear"], ["replay", run]):
        assert main(words) == (1 if words[0] == "replay" else 0)
    assert main(["cache", "clear", f"data.cache_dir={world.root / 'caches'}"]) == 0
    assert world.snapshot() == before
    assert entries[0].exists() and not any(entry.exists() for entry in entries[1:])


LINKED = [
    *(("run", f"run/{name}") for name in ("run.log", "history.jsonl", "skipped.txt", ".lock", "result.json", "lr.png")),
    *(("run", f"run/{name}") for name in ("checkpoints", "bad_batch", "checkpoints/epoch_0003.safetensors")),
    *(("sweep", f"sweep/{name}") for name in ("jobs.jsonl", "multirun.yaml", "summary.csv", "1", "1/run.log")),
    *(("report", f"run/{name}") for name in ("lr.png", "curves.png", "history.jsonl")),
    *(("report sweep", f"sweep/{name}") for name in ("summary.csv", "sweep.png")),
    *(("check", f"check/{name}") for name in ("data.txt", "contact_sheet.png", "duplicates.txt")),
    *(("cache", "caches/finetune-cache/pixels"), ("clear", "caches/finetune-cache/pixels")),
    ("plot", "rates.png"),
]


@pytest.mark.parametrize(("command", "place"), LINKED)
def test_a_folder_from_elsewhere_leads_nowhere(
    tmp_path: Path, images: Path, made: Path, command: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path / "world", images, LINKED.index((command, place)))
    shutil.copytree(made, world.root, dirs_exist_ok=True)
    path = world.root / place
    words = {
        "run": [f"resume={world.root / 'run'}", "train.epochs=2", "resume_force=true"],
        "sweep": world.commands()["sweep"],
        "report": ["report", str(world.root / "run")],
        "report sweep": ["report", str(world.root / "sweep")],
        "check": world.commands()["check"],
        "cache": [*world.words("data.cache=disk"), f"hydra.run.dir={world.root / 'new'}"],
        "clear": ["cache", "clear", f"data.cache_dir={world.root / 'caches'}"],
        "plot": ["describe", "model=vit", "--plot", str(path)],
    }[command]
    other = world.dice.choice(["link to a folder", "dangling", "fifo"])
    for sort in ("link", "link to a folder" if path.is_dir() else other):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        world.foreign.clear()
        world.put(path.parent, [path.name], [sort])
        before = world.snapshot()
        assert main(words) == 1, sort
        assert str(path) in capsys.readouterr().err
        assert world.snapshot() == before
