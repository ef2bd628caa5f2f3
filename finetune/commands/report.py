"""`finetune report FOLDER`: draw the pictures of a run again, or sum up a sweep again. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.report.jobs import read_jobs
from finetune.report.run_figures import plot_curves, plot_rates
from finetune.report.sweep import summarize
from finetune.system.log import say
from finetune.system.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraw the pictures of a run, or sum up a sweep again.

    Returns:
        The exit code, 0.

    Raises:
        FileNotFoundError: The folder does not exist, or holds neither a run nor a sweep.
        UserError: A file in it is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="finetune report",
        description="Redraw lr.png and curves.png of a run, or the summary of a sweep.",
    )
    parser.add_argument("folder", type=Path, help="a run directory, or the folder of a sweep")
    folder: Path = parser.parse_args(arguments).folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{printable(str(folder))} is no folder: give a run or a sweep under outputs/")
    if (folder / "rates.json").exists() or (folder / "history.jsonl").exists():
        _redraw(folder)
        return 0
    if not read_jobs(folder):
        raise FileNotFoundError(f"{printable(str(folder))} holds neither a run (history.jsonl) nor a sweep (0, 1, ...)")
    summarize(folder)
    return 0


def _redraw(run_dir: Path) -> None:
    """Draw each picture whose file is there."""
    if (run_dir / "rates.json").exists():
        plot_rates(run_dir)
        say(str(run_dir / "lr.png"))
    if (run_dir / "history.jsonl").exists():
        plot_curves(run_dir)
        say(str(run_dir / "curves.png"))
