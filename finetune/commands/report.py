"""`finetune report FOLDER`: draw the pictures of a run again, or sum up a sweep again. No torch."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from finetune.report.run_figures import plot_curves, plot_rates
from finetune.report.scores import plot_confusion
from finetune.report.sweep import summarize
from finetune.runs.finished import check_finished
from finetune.system.locks import InUseError, working_in
from finetune.system.log import say
from finetune.system.ours import COPIED, MARKER, FolderKind, RefusedError, look, read_marker
from finetune.system.terminal import printable

PATIENCE_S = 5.0  # a report takes less, so whoever holds the lock for longer trains the run


def main(words: Sequence[str]) -> int:
    """Redraw the pictures of a run, or sum up a sweep again; the exit code, 0."""
    text = "Redraw lr.png, curves.png and confusion.png of a run, or the summary of a sweep."
    parser = argparse.ArgumentParser(prog="finetune report", description=text)
    parser.add_argument("folder", type=Path, help="a run directory, or the folder of a sweep")
    folder: Path = parser.parse_args(words).folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{printable(str(folder))} is no folder: give a run or a sweep under outputs/")
    marker, shown = read_marker(folder), printable(str(folder))
    if marker is None or marker.kind not in (FolderKind.run, FolderKind.sweep):
        what = f"holds a {marker.kind}" if marker else f"has no {MARKER}, so finetune did not make it"
        mend = "give a run or a sweep under outputs/" + ("" if marker else f"; {COPIED}")
        raise RefusedError(f"{shown} {what}; nothing was changed: {mend}")
    look(folder, marker.kind)  # refuses links
    if marker.kind == FolderKind.sweep:
        summarize(folder, is_picture_asked=True)
        return 0
    has_rates, has_history = (folder / "rates.json").exists(), (folder / "history.jsonl").exists()
    if not (has_rates or has_history):
        raise FileNotFoundError(f"{shown} has neither rates.json nor history.jsonl yet: its run never began to train")
    with contextlib.ExitStack() as stack:
        # A run at work swept its folder when it began, and its curves are worth a look. A second report waits.
        with contextlib.suppress(InUseError):
            stack.enter_context(working_in(folder, FolderKind.run, PATIENCE_S))
        _draw(folder, has_rates=has_rates, has_history=has_history)
    return 0


def _draw(folder: Path, *, has_rates: bool, has_history: bool) -> None:
    if (folder / "result.json").exists():
        check_finished(folder)
    if has_rates:
        plot_rates(folder)
        say(str(folder / "lr.png"))
    if has_history:
        plot_curves(folder)
        say(str(folder / "curves.png"))
    if (folder / "confusion.csv").exists():
        plot_confusion(folder)
        say(str(folder / "confusion.png"))
