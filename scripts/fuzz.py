"""Start `finetune` with random configurations, good and bad, and see that each ends as it should.

    python scripts/fuzz.py --examples 1000

A third of them are yaml files of a person's, in ./conf or in a folder given with --config-dir; the others are words of
the command line. Whatever they hold: exit code 0, 1 or 2 in time, errors of one line each, which name the setting, the
file or the word that is wrong, no stack trace, and either no run directory or one in which every file is whole. Runs
that turn out valid are really trained, for an epoch on 48 small images. Ends with one line of figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from kill_test import make_images  # noqa: E402

from finetune.__main__ import main as finetune  # noqa: E402
from finetune.config.words.settings import SETTINGS  # noqa: E402
from finetune.system.ours import MARKER  # noqa: E402

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
INTS = ["0", "1", "2", "-1", "7", "1000000", "x", "1.5", "null", "", "9" * 30, "${seed}", "${oc.env:FUZZ_ONE}"]
FLOATS = ["0", "0.1", "0.5", "1", "-1", "nan", "inf", "1e30", "1e-30", "1e400", "x", "null", "1,2", "${optim.lr}"]
TEXTS = [
    "a",
    "",
    "null",
    "a photo of a {}.",
    "\x1b[31m",
    "${seed}",
    "[",
    "ä/ö",
    "'",
    "${oc.env:FUZZ_NOT}",
    "${seed",
    r"\${x}",
]
# Values that stand in yaml files alone: lists, mappings, references, dates, numbers in odd notations, tabs, tags.
YAML_VALUES = [
    *("[]", "[1, 2]", "[a, [b]]", "{}", "{a: 1}", "~", "yes", "'yes'", "0x1F", "0o17", "1_000", "1:30", "2026-01-31"),
    *(".inf", "-.inf", ".nan", "1e5", "1e400", "9" * 5000, "'${seed}'", "${oc.env:FUZZ_NOT}", "${oc.env:FUZZ_ONE,1}"),
    *(
        "${seed}",
        "${model}",
        "${..seed}",
        "???",
        "&a 1",
        "*a",
        "!!python/name:os.system",
        "!!binary aGk=",
        "|\n    a\n",
    ),
    *(
        "\tx",
        '"\\u0000"',
        "'\\x1b[31m'",
        "@x",
        "`x`",
        "%x",
        "a: b",
        "- a",
        "'unclosed",
        "[" * 2000,
        "ä/ö",
        "\u202e",
        "",
    ),
]
# Nine lists of nine lists of nine lists ..., by aliases: two thousand million words once they are written out.
LAUGHS = "x: &x [a]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else '*x'] * 9)}]\n" for i in range(9))
YAML_FILES = [
    "", "null", "[]", "- a", "1", "text", "{", "\t", "a: 1\na: 2", "\ufeffseed: 1", "--- \nseed: 1\n---\nseed: 2\n",
    "defaults: x", "defaults: [no]", "defaults: [{model: no}]", "defaults:\n- mine",
    "defaults: [{override /optim: sgd}]",
    "x: &x [*x]", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", "? [a]\n: 1", "1: 2", "optim.lr: 1", "<<: {seed: 1}",
    "seed: !!python/object/apply:os.system [true]", "# @package _global_\nseed: 1", "hydra: {run: {dir: elsewhere}}",
    LAUGHS,
]  # fmt: skip
LONGEST = 4_100  # letters of an error
LIMIT_S = 120  # for one configuration; the slowest that trains takes a few seconds
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


def yaml_files() -> st.SearchStrategy[tuple[str, str]]:
    """A yaml file of a person's: (group, text)."""
    sections = sorted({name.partition(".")[0] for name in SETTINGS if "." in name})
    whole = st.tuples(st.sampled_from([*sections, "experiment", "mine"]), st.sampled_from(YAML_FILES))
    return st.one_of(whole, *(st.just(section).flatmap(_of_section) for section in sections))


def _of_section(section: str) -> st.SearchStrategy[tuple[str, str]]:
    """Lines `key: value` of one section, some of them wrong."""
    names = [name for name in SETTINGS if name.startswith(f"{section}.") and name not in LEFT_OUT]
    value = st.sampled_from(YAML_VALUES)
    line = st.sampled_from(names).flatmap(
        lambda name: st.one_of(values(name), values(name), value).map(
            lambda text: f"{name.partition('.')[2]}: {text}\n"
        )
    )
    odd = st.sampled_from(["lrr: 1\n", "\tlr: 1\n", f"{section}: {{}}\n", "- 1\n", "seed: 1\n", "\udc80: 1\n"])
    lines = st.lists(st.one_of(line, line, line, line, odd), min_size=1, max_size=4)
    return lines.map(lambda found: (section, "".join(found)))


def configurations() -> st.SearchStrategy[tuple[list[str], tuple[str, str], bool]]:
    """(words, yaml file, whether it lies in a folder of --config-dir); every third is tried with its file."""
    return st.tuples(override_sets(), yaml_files(), st.booleans())


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in the main thread after so many seconds."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it ran for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write_file(work: Path, file: tuple[str, str], is_elsewhere: bool) -> list[str]:
    """Put a yaml file into `work`; the words that choose it."""
    group, text = file
    folder = work / ("elsewhere" if is_elsewhere else "conf") / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    chosen = f"{'+' * (group == 'mine')}{group}=mine"
    return [chosen, *(["--config-dir", "elsewhere"] if is_elsewhere else [])]


def unnamed_errors(text: str, line: list[str]) -> list[str]:
    """The errors that name neither a setting, nor a file, nor a word that was typed."""
    known = {*SETTINGS, *(name.partition(".")[0] for name in SETTINGS), "experiment", "mine.yaml", "--", "hydra"}
    typed = {word.partition("=")[0].lstrip("+~") for word in line} | set(line)
    errors = [found for found in text.splitlines() if found.startswith("error: ")]
    named = {name for name in known | typed if name}
    return [f"names nothing: {error}" for error in errors if not any(name in error for name in named)]


def problems_of(
    words: list[str], file: tuple[str, str] | None, is_elsewhere: bool, work: Path, counts: Counter[str]
) -> list[str]:
    """Run it in `work`, which holds images/; everything that should not be."""
    for folder in ("conf", "elsewhere"):
        shutil.rmtree(work / folder, ignore_errors=True)
    if file is not None:
        words = [*write_file(work, file, is_elsewhere), *words]
        counts["yaml"] += 1
    base = ["data=folder", f"data.root={work / 'images'}", "train.epochs=1", "data.batch_size=16", "data.workers=0"]
    folder, found = work / "run", []
    out, err = io.StringIO(), io.StringIO()
    given = {word.partition("=")[0] for word in words}
    line = [*(word for word in base if word.partition("=")[0] not in given), *words, f"hydra.run.dir={folder}"]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(LIMIT_S):
            code = finetune(line)
    except BaseException as error:  # the very thing that must not happen
        found.append(f"{type(error).__name__}: {error}")
        code = -1
    if any(isinstance(item, str) and f"it ran for {LIMIT_S} s" in item for item in [*found, err.getvalue()]):
        found.append("a hang")
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, 1, 2):
        found.append(f"exit code {code}")
    counts["finished" if code == 0 else f"exit code {code}"] += 1
    text = out.getvalue() + err.getvalue()
    found += [f"output has {word!r}" for word in ("Traceback", "finetune is at fault") if word in text]
    if code != 0 and "error:" not in err.getvalue():
        found.append("an exit code without a reason")
    found += unnamed_errors(err.getvalue(), line)
    found += [f"a line of {len(one):,} letters" for one in err.getvalue().splitlines() if len(one) > LONGEST]
    if folder.exists():
        found += _unwhole(folder, code)
        shutil.rmtree(folder)
    return [f"{item}\n{text[-1500:]}" for item in found]


def _unwhole(folder: Path, code: int) -> list[str]:
    from finetune.runs.checkpoint import read_state
    from finetune.runs.weights import read_weights

    found = [f"left behind: {path.name}" for path in folder.rglob(".*") if path.name != MARKER]
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
    os.environ["FUZZ_ONE"] = "1"
    os.environ.pop("FUZZ_NOT", None)
    os.environ["XDG_CACHE_HOME"] = str(work / "home")
    wrong, counts = [], Counter[str]()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(configurations())
    def try_all(configuration: tuple[list[str], tuple[str, str], bool]) -> None:
        words, file, is_elsewhere = configuration
        has_file = counts["sets"] % 3 == 0
        counts["sets"] += 1
        # A file is tried with at most one word beside it, so that its own mistakes are met.
        if has_file:
            found = problems_of(words[: counts["sets"] % 2], file, is_elsewhere, work, counts)
        else:
            found = problems_of(words, None, False, work, counts)
        if found:
            wrong.append(f"{ascii(configuration)[:1500]}: {'; '.join(found)}")
            print(wrong[-1], flush=True)

    before = os.getcwd()
    os.chdir(work)
    try:
        try_all()
    except KeyboardInterrupt:
        counts["sets"] -= 1  # the one that Ctrl-C broke off; the figures are of the others
    finally:
        os.chdir(before)
    return wrong, counts


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong, counts = run_examples(given.examples, given.seed, Path(folder))
    codes = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()) if name.startswith("exit"))
    print(
        f"{counts['sets'] - len(wrong)} of {counts['sets']} configurations ended as they should, {counts['yaml']}"
        f" of them with a yaml file: {counts['finished']} finished runs, {codes}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
