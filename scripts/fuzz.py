"""Start `finetune` with random override sets, good and bad, and see that each ends as it should.

    python scripts/fuzz.py --examples 500

Whatever a person types: exit code 0, 1 or 2, errors of one line each, no stack trace, and either no run directory or
one in which every file is whole. Runs that turn out valid are really trained, for an epoch on 48 small images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from enum import Enum
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from kill_test import make_images  # noqa: E402

from finetune.__main__ import main as finetune  # noqa: E402
from finetune.config.words.settings import SETTINGS  # noqa: E402

# Would go to the network, take long, or make the run endless.
LEFT_OUT = (
    "data.source",
    "data.name",
    "data.subset",
    "data.download",
    "data.root",
    "model.library",
    "resume",
    "device",
)
OWN: dict[str, list[str]] = {
    "model.name": ["glyph_clip", "glyph_vit", "glyph"],
    "model.pretrained": ["bundled", "none", "nowhere.safetensors"],
    "model.family": ["clip", "vit", "resnet"],
    "model.image_size": ["0", "32", "33", "64", "-1"],
    "train.epochs": ["1", "2", "0", "1.5"],
    "augment.repeats": ["1", "2", "0"],
    "data.workers": ["0", "1", "auto", "-1", "two"],
    "data.batch_size": ["auto", "1", "7", "0", "-3", "x"],
    "data.classes": ["[across,flat]", "[across]", "[no,flat]", "[]", "across"],
    "data.cache_dir": ["cache", "images/flat/0.png"],
}
INTS = ["0", "1", "2", "-1", "7", "1000000", "x", "1.5", "null", ""]
FLOATS = ["0", "0.1", "0.5", "1", "-1", "nan", "inf", "1e30", "1e-30", "x", "null", "1,2"]
TEXTS = ["a", "", "null", "a photo of a {}.", "\x1b[31m", "${seed}", "[", "ä/ö", "'"]
CHOICES = [
    "model=clip",
    "model=vit",
    "model=",
    "sched=cosine",
    "augment=none",
    "augment=light",
    "optim=sgd",
    "experiment=x",
]


def values(name: str) -> st.SearchStrategy[str]:
    """What might be typed behind `name=`."""
    key = SETTINGS[name]
    if name in OWN:
        return st.sampled_from(OWN[name])
    if key.kind is bool:
        return st.sampled_from(["true", "false", "1", "maybe"])
    if key.kind is int:
        return st.sampled_from(INTS)
    if key.kind is float:
        return st.sampled_from(FLOATS)
    if isinstance(key.kind, type) and issubclass(key.kind, Enum):
        return st.sampled_from([*(str(member.value) for member in key.kind), "nonsense"])
    return st.sampled_from(TEXTS)


def override_sets() -> st.SearchStrategy[list[str]]:
    """One to four overrides, each mostly of a key that exists."""
    names = [name for name in SETTINGS if name not in LEFT_OUT]
    setting = st.sampled_from(names).flatmap(lambda name: values(name).map(lambda value: f"{name}={value}"))
    odd = st.sampled_from(
        [*CHOICES, "optim.lrr=1", "seed", "=3", "+seed=1", "~optim.lr", "seed=1,2", "hydra.job.name=a"]
    )
    return st.lists(st.one_of(setting, setting, setting, setting, odd), min_size=1, max_size=4)


def problems_of(words: list[str], work: Path, counts: Counter[str]) -> list[str]:
    """Run it in `work`, which holds images/; everything that should not be."""
    base = ["data=folder", f"data.root={work / 'images'}", "train.epochs=1", "data.batch_size=16", "data.workers=0"]
    folder, found = work / "run", []
    out, err = io.StringIO(), io.StringIO()
    given = {word.partition("=")[0] for word in words}
    line = [*(word for word in base if word.partition("=")[0] not in given), *words, f"hydra.run.dir={folder}"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = finetune(line)
    except BaseException as error:  # the very thing that must not happen
        found.append(f"{type(error).__name__}: {error}")
        code = -1
    if code not in (0, 1, 2):
        found.append(f"exit code {code}")
    counts["finished"] += code == 0
    text = out.getvalue() + err.getvalue()
    found += [f"output has {word!r}" for word in ("Traceback", "finetune is at fault") if word in text]
    if code != 0 and "error:" not in err.getvalue():
        found.append("an exit code without a reason")
    if folder.exists():
        found += _unwhole(folder, code)
        shutil.rmtree(folder)
    return [f"{item}\n{text[-1500:]}" for item in found]


def _unwhole(folder: Path, code: int) -> list[str]:
    from finetune.runs.checkpoint import read_state
    from finetune.runs.weights import read_weights

    found = [f"left behind: {path.name}" for path in folder.rglob(".*")]
    try:
        for path in folder.rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.jsonl"):
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.rglob("*.safetensors"):
            read_weights(path)
        for path in folder.glob("checkpoints/*.pt"):
            read_state(path)
        status = json.loads((folder / "result.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError) as error:
        return [*found, f"not whole: {error}"]
    return found if (status == "finished") == (code == 0) else [*found, f"status {status} with exit code {code}"]


def run_examples(examples: int, number: int, work: Path) -> tuple[list[str], Counter[str]]:
    """All of them; what went wrong, and how often a run finished."""
    (work / "home").mkdir(parents=True)
    make_images(work / "images")
    os.environ["XDG_CACHE_HOME"] = str(work / "home")
    wrong, counts = [], Counter[str]()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(override_sets())
    def try_all(words: list[str]) -> None:
        found = problems_of(words, work, counts)
        counts["sets"] += 1
        if found:
            wrong.append(f"{words}: {'; '.join(found)}")
            print(wrong[-1], flush=True)

    before = os.getcwd()
    os.chdir(work)
    try:
        try_all()
    finally:
        os.chdir(before)
    return wrong, counts


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong, counts = run_examples(given.examples, given.seed, Path(folder))
    print(
        f"{counts['sets'] - len(wrong)} of {counts['sets']} override sets ended as they should,"
        f" {counts['finished']} of them with a finished run"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
