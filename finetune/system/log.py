"""What a run says: console lines, `run.log`, progress bars and plain tables.

Standard library and tqdm only, so that the tools for finished runs (report, sweep) need no torch.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.system.terminal import printable

T = TypeVar("T")

LOGGER = logging.getLogger("finetune")

# How often a bar shows new numbers: each redraw waits for the device, a person reads no faster.
REDRAW_S = 0.2
# Columns of a bar beside its title and its numbers; and the numbers that a narrow terminal goes without, the first of
# them first: tqdm would cut the line off at its end.
BESIDE = len(" 100%|#| 1:00:00 left, ")
GIVE_WAY = ("lr", "top1", "kept", "wait")


_open_bars: list[Bar] = []  # on the screen now
_state_before: dict[str, Any] = {}  # of the logger, while `start_log` holds it


def say(text: str) -> None:
    """Print lines to stdout, above the bars if there are any; control characters but line breaks are escaped.

    A console that lacks a letter shows its escape. One that has gone away (`| head`) is left alone from then on: the
    run goes on, and `run.log` has it all.
    """
    text = printable(text, keep="\n\t")
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if _open_bars:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # As Python's manual has it: without this, the interpreter's last flush fails too, with exit code 120.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


# --- console and run.log ---------------------------------------------------------------------------------------------


class _Console(logging.Handler):
    """Plain lines on stdout; warnings and errors say so. Tracebacks are for `run.log`."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            _close_bars()  # the bar of an epoch that broke must not stay under its error
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(prefix + record.getMessage())


class _FileFormatter(logging.Formatter):
    """Time, level, message, traceback; what names contain stays visible and on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def start_log(run_dir: Path, *, quiet: bool = False) -> None:
    """Send the logger `finetune` to the console and to `run.log` in `run_dir`, which is continued if it is there.

    The handlers are this run's own: `stop_log` takes them away again, so that the jobs of a sweep, which share a
    process, write each into its own folder and say each line once.

    Args:
        run_dir: An existing folder.
        quiet: Leave the console out.

    Raises:
        OSError: `run.log` cannot be written.
    """
    stop_log()
    file = logging.FileHandler(run_dir / "run.log", encoding="utf-8", errors="backslashreplace")
    file.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: no stack trace for every line
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
    file.setLevel(logging.DEBUG)
    _state_before.update(level=LOGGER.level, propagate=LOGGER.propagate)
    LOGGER.addHandler(file)
    if not quiet:
        console = _Console(logging.INFO)
        LOGGER.addHandler(console)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False  # Hydra puts handlers on the root logger: every line would come twice


def stop_log() -> None:
    """Close what `start_log` opened, and any bar left open by an error; does nothing where there is nothing."""
    _close_bars()
    if not _state_before:
        return
    for handler in list(LOGGER.handlers):
        if isinstance(handler, (_Console, logging.FileHandler)):
            LOGGER.removeHandler(handler)
            handler.close()
    LOGGER.setLevel(_state_before["level"])
    LOGGER.propagate = _state_before["propagate"]
    _state_before.clear()


def _close_bars() -> None:
    for bar in list(_open_bars):
        bar.close()


# --- progress --------------------------------------------------------------------------------------------------------


class Bar:
    """A progress bar over the batches of one pass, on stderr; nothing at all where stderr is no terminal.

    Asking the device for a loss stalls it, so the caller gives numbers only when `due()`:

        with Bar("train 3/15", total=len(loader), images=loader.num_images) as bar:
            for batch in bar.wrap(batches):
                ...
                if bar.due():
                    bar.set(loss=..., top1=..., lr=...)
    """

    def __init__(self, title: str, *, total: int, images: int, start: int = 0) -> None:
        """Draw it, if somebody can see it.

        Args:
            title: Such as `train 3/15`.
            total: Micro-batches of the whole pass.
            images: Images of the whole pass.
            start: Micro-batches already done, in a pass that was interrupted.
        """
        self._images_a_batch = images / max(total, 1)
        self._start = start
        self._began = self._asked = self._drawn = time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar: Any = None
        if total > 0 and sys.stderr.isatty():
            # tqdm puts a comma ahead of the postfix.
            layout = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=printable(title),
                leave=False,  # the epoch's line takes its place
                bar_format=layout,
                **_terminal_size(),
                file=sys.stderr,
            )
            _open_bars.append(self)

    def __enter__(self) -> Bar:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away, whatever happened."""
        self.close()

    def wrap(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, counted one by one as the caller comes back from each; the bar goes with the last."""
        try:
            for batch in batches:
                yield batch
                if self._bar is not None:
                    self._bar.update()
                    if time.monotonic() - self._drawn >= REDRAW_S:
                        self._draw()
        finally:
            self.close()

    def due(self) -> bool:
        """Whether to read numbers off the device now: a few times a second, never where no bar is shown."""
        return self._bar is not None and time.monotonic() - self._asked >= REDRAW_S

    def set(self, **values: float) -> None:
        """Show these numbers beside the images a second so far.

        Such as `loss`, `top1` and `lr` (the head's rate); as shares `wait` (for data), `kept` (activations) and `mfu`.
        """
        if self._bar is not None:
            self._asked = time.monotonic()
            self._shown = {name: _SHOWN_AS.get(name, _metric)(value) for name, value in values.items()}
            self._draw()

    @property
    def images_per_s(self) -> float:
        """Of the pass so far; 0 before its first batch is done, and where no bar is shown."""
        done = 0 if self._bar is None else self._bar.n - self._start
        return done * self._images_a_batch / max(time.monotonic() - self._began, 1e-9)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        shown = {name: f"{name} {text}" for name, text in self._shown.items()}
        if self.images_per_s:
            shown["img/s"] = f"{self.images_per_s:,.0f} img/s"
        room = (self._bar.format_dict["ncols"] or 80) - len(self._bar.desc) - BESIDE
        for name in GIVE_WAY:
            if len(" ".join(shown.values())) > room:
                shown.pop(name, None)
        self._bar.set_postfix_str(" ".join(shown.values()))

    def close(self) -> None:
        """Take the bar away; harmless when it is gone."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            _open_bars.remove(self)


def _terminal_size() -> dict[str, Any]:
    """What tqdm is told of the terminal's size: as it changes, or the classic one where a terminal does not tell."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}  # of 0 columns tqdm would draw nothing


def epoch_line(
    row: Mapping[str, Any],
    num_epochs: int,
    *,
    best: float | None = None,
    best_epoch: int = 0,
    monitor: str = "val/top1",
) -> str:
    """An epoch in one line: `epoch 7/20  lr 9.1e-05  train/loss 0.412  val/top1 0.931 (best 0.934 @ 6)  412 img/s`.

    Args:
        row: As in `history.jsonl`; `lr` is what the layer `head` began the epoch with.
        num_epochs: Of the whole run.
        best: Best value of `monitor` so far; None: not yet.
        best_epoch: The epoch of it, from 1.
        monitor: The metric that picks the best epoch; shown beside loss and top1 where it is another.
    """
    head_rate = next(rate for name, rate in row["lr"].items() if layer_of(name) == "head")
    averaged = monitor.replace("val/", "val_ema/", 1)  # the moving average of the weights, where a run keeps one
    shown = list(dict.fromkeys(["train/loss", "val/top1", monitor, *([averaged] if averaged in row else [])]))
    parts = [f"epoch {row['epoch']:>{len(str(num_epochs))}}/{num_epochs}", f"lr {_rate(head_rate)}"]
    for name in shown:
        note = f" (best {_metric(best)} @ {best_epoch})" if name == monitor and best is not None else ""
        parts.append(f"{name} {_metric(row[name])}{note}")
    notes = [("data_wait", "waiting for data"), ("prefix_hits", "from kept activations"), ("mfu", "MFU")]
    shares = [f"{_share(row[name])} {words}" for name, words in notes if row.get(name, 0) >= 0.005]
    speed = f"{row['images_per_s']:,.0f} img/s"
    return "  ".join([*parts, f"{speed} ({', '.join(shares)})" if shares else speed])


def layer_of(group_name: str) -> str:
    """The layer of a parameter group by its name: `block.7` of `block.7.no_decay`."""
    return group_name.removesuffix(".muon").removesuffix(".no_decay").removesuffix(".decay")


def _rate(value: float) -> str:
    return f"{value:.1e}"


def _share(value: float) -> str:
    return f"{value:.0%}"


_SHOWN_AS: dict[str, Callable[[float], str]] = {"lr": _rate, "wait": _share, "kept": _share, "mfu": _share}


def _metric(value: float | None) -> str:
    """Three decimals, or two digits where three decimals would show nothing; None as stored for NaN."""
    if value is None:
        return "nan"
    return f"{value:.3f}" if not 0 < abs(value) < 0.01 else f"{value:.2g}"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Rows as aligned plain text with a heading; columns of numbers lean right.

    Whole numbers get thousands separators, floats four digits, truth values yes or no, and None is a dash.

    Args:
        rows: One mapping a row, which holds every column.
        columns: Keys to show, in order; they are the heading.
    """
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(columns))]
    leans_right = [bool(cells) and all(_is_number(line[i]) for line in cells) for i in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        padded = []
        for text, width, right in zip(line, widths, leans_right, strict=True):
            space = " " * (width - _width(text))
            padded.append(space + text if right else text + space)
        return "  ".join(padded).rstrip()

    rule = "  ".join(("-" if column else " ") * width for column, width in zip(columns, widths, strict=True))
    return "\n".join([aligned(lines[0]), rule, *map(aligned, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _is_number(text: str) -> bool:
    """Whether a cell leans right; a dash goes with either kind."""
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True


def _width(text: str) -> int:
    """Columns of a terminal: East Asian letters take two, marks that sit on another letter none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
