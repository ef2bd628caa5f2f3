"""`finetune replay RUN_DIR [--step N]`: compute a step that was not finite again, and print where it went wrong."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.config.words.saved import read_conf
from finetune.system.log import say


def main(words: Sequence[str]) -> int:
    """Run a command line; 0 if the step is not finite again, 1 if it is finite this time."""
    text = "Compute a step that was not finite again: which layer, and which image, gave the first NaN."
    parser = argparse.ArgumentParser(prog="finetune replay", description=text)
    parser.add_argument("run_dir", type=Path, help="a run directory that holds bad_batch/")
    parser.add_argument("--step", type=int, help="which step; by default the first one stored")
    given = parser.parse_args(words)
    from finetune.app.replay import replay  # only now: it imports torch

    lines, is_bad = replay(read_conf(given.run_dir), given.run_dir, given.step)
    say("\n".join(lines))
    return 0 if is_bad else 1
