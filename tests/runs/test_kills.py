"""A short form of scripts/kill_test.py: a run that is killed where it writes, and continued, ends as if nobody had."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import kill_points  # noqa: E402
import kill_test  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> kill_test.Course:
    return kill_test.courses(tmp_path_factory.mktemp("kills"), most=1)[0]


def test_no_file_is_written_unseen(course: kill_test.Course) -> None:
    """Each file of the run and its caches has come to its name at a point, and each is killed before and after."""
    seen = {point.split(" by ")[0].partition(" ")[2] for point in course.points}
    found = set()
    for folder in ("run", "cache"):
        for path in (course.straight / folder).rglob("*"):
            name = str(path.relative_to(course.straight))
            for pattern, mask in kill_points.MASKS:
                name = re.sub(pattern, mask, name)
            found.add(re.sub(r"/entry.json$|/pixels.uN$|/index.npy$|/activations$|/meta.json$", "", name))
    assert {"run/checkpoints/last.pt", "run/config.yaml", "run/history.jsonl", "run/run.log"} < found
    kinds = ("pixels/ID", "shards/ID-train-N.tar", "checks/ID-ID.npz", "activations/ID-floatN-ID-N")
    assert {f"cache/finetune-cache/{kind}" for kind in kinds} < found
    assert not {name for name in found - seen if name not in ("run", "cache") and "matplotlib" not in name}
    kills = kill_test.kills_of(course, every=False, dice=random.Random(0))
    assert {kill.point for kill in kills} == set(course.points) and len(kills) > 1.5 * len(course.points)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_where_it_writes_ends_like_an_unbroken_one(
    course: kill_test.Course, tmp_path: Path, seed: int
) -> None:
    """Three points, drawn by lot: in a checkpoint, in another file of the run, in a cache."""
    dice = random.Random(seed)
    place = ("run/checkpoints/", "run/", "cache/")[seed]
    kills = [kill for kill in kill_test.kills_of(course, every=False, dice=dice) if f" {place}" in kill.point]
    outcome = kill_test.kill_at(course, dice.choice(kills), tmp_path / "home")
    assert (outcome.wrong, outcome.kills) == ("", 1), outcome


def test_the_test_finds_what_it_looks_for(course: kill_test.Course, tmp_path: Path) -> None:
    """Another bit, a file that is left, a file that is gone, a point that is never reached."""
    home = tmp_path / "home"
    kill_test.copy_home(course.straight, home)
    assert course.differences(home) == []
    (home / "run" / ".last.pt.0-1.tmp").touch()
    (home / "cache" / "finetune-cache" / "checks" / ".a.tmp").touch()
    activations = next(home.rglob("activations/*/activations"))
    activations.write_bytes(activations.read_bytes()[:-1] + b"?")
    (home / "run" / "history.jsonl").write_text((home / "run" / "history.jsonl").read_text().replace("0.", "1."))
    wrong = " ".join(course.differences(home))
    for words in ("history.jsonl", "left behind: .last.pt", "checks/.a.tmp is new", "activations is missing"):
        assert words in wrong
    (home / "run" / "checkpoints" / "best.safetensors").unlink()
    assert "files [" in " ".join(course.differences(home))
    never = kill_points.Kill("open run/never by nobody", 1, kill_points.BEFORE)
    assert kill_test.kill_at(course, never, tmp_path / "other").wrong == "not reached: it ended with 0"


@pytest.mark.parametrize("moment", kill_points.MOMENTS)
def test_a_process_is_killed_at_the_moment_that_was_asked_for(tmp_path: Path, moment: str) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            where = "write file.txt by another program"
            kill_points.install(tmp_path, kill_points.Kill(where, 2, moment))
            with open(tmp_path / "file.txt", "w") as file:
                for text in ("one ", "and ", "more"):
                    file.write(text)
                    file.flush()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "file.txt").read_text() == {"before": "one ", "half": "one an", "after": "one and "}[moment]


@pytest.mark.slow
def test_kills_at_many_points_and_at_random_moments() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--points", "--most", "40", "--rounds", "7"]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert " write points, 40 kills: 40 bitwise equal, 0 refused, 0 different" in process.stdout
    assert "7 rounds, " in process.stdout and ": 7 bitwise equal, 0 refused, 0 different" in process.stdout
