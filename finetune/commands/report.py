"""`finetune report FOLDER`: draw the pictures of a run again, or sum up a sweep again. No torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.report.jobs import read_jobs
from finetune.report.run_figures import plot_curves, plot_rates
from finetune.report.sweep import summarize
from finetune.system.log import say
from finetune.system.terminal import printable


def main(words: Sequence[str]) -> int:
    """Redraw the pictures of a run, or sum up a sweep again; the exit code, 0."""
    text = "Redraw lr.png and curves.png of a run, or the summary of a sweep."
    parser = argparse.ArgumentParser(prog="finetune report", description=text)
    parser.add_argument("folder", type=Path, help="a run directory, or the folder of a sweep")
    folder: Path = parser.parse_args(words).folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{printable(str(folder))} is no folder: give a run or a sweep under outputs/")
    has_rates, has_history = (folder / "rates.json").exists(), (folder / "history.jsonl").exists()
    if has_rates:
        plot_rates(folder)
        say(str(folder / "lr.png"))
    if has_history:
        plot_curves(folder)
        say(str(folder / "curves.png"))
    if has_rates or has_history:
        return 0
    if not read_jobs(folder):
        raise FileNotFoundError(f"{printable(str(folder))} holds neither a run (history.jsonl) nor a sweep (0, 1, ...)")
    summarize(folder)
    return 0
