"""Progress bars over the batches of one pass, drawn on stderr where stderr is a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from finetune.system.terminal import printable

T = TypeVar("T")

REDRAW_S = 0.2  # between two redraws: new numbers stall the device, and a person reads no faster
LAYOUT_COLUMNS = len(" 100%|#| 1:00:00 left, ")  # that a bar needs beside its title and its numbers

open_bars: list[Bar] = []  # on the screen now; `log.say` must print above them


class Bar:
    """A progress bar over the batches of one pass; nothing is drawn where stderr is no terminal.

    Reading a loss from the device stalls the device, so the caller should `show` numbers only when they are `due`.
    """

    def __init__(self, title: str, *, total: int, images: int, start: int = 0) -> None:
        """Draw the bar of a pass of `total` micro-batches, of which `start` were done before an interruption."""
        self._images_a_batch = images / max(total, 1)
        self._start = start
        self._began = self._asked = self._drawn = time.monotonic()
        self._texts: Mapping[str, str] = {}
        self._dropped_first: Sequence[str] = ()
        self._bar: Any = None
        if total > 0 and sys.stderr.isatty():
            try:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
            except OSError:
                columns = 0
            # Follow the terminal's size; of 0 columns, where the terminal tells none, tqdm would draw nothing.
            size: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}
            # tqdm puts a comma ahead of the postfix. The line of the epoch takes the bar's place, so it does not stay.
            style = {"leave": False, "file": sys.stderr, **size}
            style["bar_format"] = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
            self._bar = tqdm(total=total, initial=start, desc=printable(title), **style)
            open_bars.append(self)

    def wrap(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the same batches, and counts each when the caller asks for the next; the bar ends with the last."""
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
        """Whether to read new numbers off the device now: a few times a second, and never where no bar is drawn."""
        return self._bar is not None and time.monotonic() - self._asked >= REDRAW_S

    def show(self, texts: Mapping[str, str], *, dropped_first: Sequence[str] = ()) -> None:
        """Show `texts`, by name, beside the images a second; a narrow terminal goes without `dropped_first`."""
        if self._bar is not None:
            self._asked = time.monotonic()
            self._texts, self._dropped_first = texts, dropped_first
            self._draw()

    @property
    def images_per_s(self) -> float:
        """Images a second of the pass so far; 0 before its first batch is done, and where no bar is drawn."""
        done = 0 if self._bar is None else self._bar.n - self._start
        return done * self._images_a_batch / max(time.monotonic() - self._began, 1e-9)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        shown = {name: f"{name} {text}" for name, text in self._texts.items()}
        if self.images_per_s:
            shown["img/s"] = f"{self.images_per_s:,.0f} img/s"
        # tqdm would cut the end off a long line, so whole numbers are left out instead.
        room = (self._bar.format_dict["ncols"] or 80) - len(self._bar.desc) - LAYOUT_COLUMNS
        for name in self._dropped_first:
            if len(" ".join(shown.values())) > room:
                shown.pop(name, None)
        self._bar.set_postfix_str(" ".join(shown.values()))

    def close(self) -> None:
        """Take the bar away; does nothing where it is gone."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            open_bars.remove(self)


def close_bars() -> None:
    """Take all bars away, such as that of an epoch that ended with an error."""
    for bar in list(open_bars):
        bar.close()
