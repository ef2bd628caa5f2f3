"""Runs of a second or two, in this process or as a person starts them, and what two equal runs have in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune.app.run import run
from finetune.config import Conf, DataConf, SourceKind
from finetune.runs.history import timeless

ROOT = Path(__file__).parent.parent


def finetune(*words: str, cwd: Path, wait: bool = True) -> subprocess.Popen[str]:
    """`python -m finetune WORDS` in `cwd`, as a person types it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_as_from_a_terminal,
    )
    if wait:
        process.out, process.err = process.communicate(timeout=300)  # type: ignore[attr-defined]
    return process


def _as_from_a_terminal() -> None:
    """Under nohup, or in the background of a script, the tests ignore these, and so would their children."""
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


def small(stripes: Path, **changes: object) -> Conf:
    """A run of two epochs that takes a second or two."""
    conf = Conf(data=DataConf(source=SourceKind.folder, root=str(stripes), batch_size=8))
    conf.train.epochs = 2
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        setattr(getattr(conf, part) if part else conf, name, value)
    return conf


def go(conf: Conf, folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    return run(conf, folder, [], quiet=True)


def history(folder: Path) -> list[dict]:
    """The rows, without what a clock says."""
    return timeless(json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines())


def assert_same_run(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    for name in ("best", "last"):
        ours, theirs = (load_file(folder / "checkpoints" / f"{name}.safetensors") for folder in (one, other))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
