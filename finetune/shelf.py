"""What the runs of one process hand on to each other: the jobs of a sweep, one after the other. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Shelf:
    """Things in memory that outlive a run, by name."""

    def __init__(self) -> None:
        """Empty."""
        self._things: dict[str, Any] = {}

    def get(self, name: str) -> Any | None:
        """What was put there under that name."""
        return self._things.get(name)

    def put(self, name: str, thing: Any) -> None:
        """Keep it."""
        self._things[name] = thing

    def keep(self, beginning: str) -> None:
        """Let go of everything whose name does not begin so: another run needs the memory."""
        self._things = {name: thing for name, thing in self._things.items() if name.startswith(beginning)}


_open: list[Shelf] = []


@contextmanager
def shared_between_runs() -> Iterator[None]:
    """Within it, runs of this process with the same frozen layers, images and views compute them once."""
    shelf = Shelf()
    _open.append(shelf)
    try:
        yield
    finally:
        _open.remove(shelf)


def open_shelf() -> Shelf:
    """That of the sweep around this run; without one, a fresh one for this run alone."""
    return _open[-1] if _open else Shelf()


def is_shared() -> bool:
    """Whether other runs of this process may take what this one keeps."""
    return bool(_open)
