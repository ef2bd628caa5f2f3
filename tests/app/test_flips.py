"""A short form of scripts/flip_test.py: no damaged file of a run or its cache gives another result, or a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import flip_test  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flip_test.World]:
    with flip_test.restorable():
        yield flip_test.make_world(tmp_path_factory.mktemp("flips"))


@pytest.mark.parametrize("damage", [flip_test.flipped, flip_test.otherwise_damaged])
def test_damage_of_any_file_is_refused_mended_or_changes_nothing(
    world: flip_test.World, damage: flip_test.Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: flip_test.Counter[str] = flip_test.Counter()
    flip_test.run_readers(world, 120, random.Random(1), damage, seen)
    assert not [outcome for outcome in flip_test.BAD if seen[outcome]], capsys.readouterr().out
    assert min(seen["refused by name"], seen["rebuilt"], seen["without effect"]) > 0
    assert flip_test.figures("flips", seen).startswith("120 flips: ")


def test_damage_under_whole_commands(world: flip_test.World, capsys: pytest.CaptureFixture[str]) -> None:
    seen: flip_test.Counter[str] = flip_test.Counter()
    flip_test.run_commands(world, 3, random.Random(1), seen)
    assert seen.total() == 3 and not [outcome for outcome in flip_test.BAD if seen[outcome]], capsys.readouterr().out


def test_the_test_finds_what_it_looks_for(world: flip_test.World) -> None:
    """A reader that believes everything, one that fails without the file's name, and one that does not end."""
    path = world.done / "config.yaml"
    content = path.read_bytes()
    right = [flip_test.digest(1)]

    def fails() -> object:
        raise KeyError("x")

    def nameless() -> object:
        raise flip_test.UserError("something is damaged")

    cases = [(lambda: 2, "another result"), (fails, "trace"), (nameless, "unnamed"), (lambda: 1, "without effect")]
    for read, outcome in cases:
        assert flip_test.try_reader(path, read, right, content)[0] == outcome
