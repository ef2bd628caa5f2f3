"""What the runs of one process hand on to each other: the jobs of a sweep, one after the other. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Shelf:
    """Things in memory that outlive a run, by name."""

    def __init__(self) -> None:
        """Empty."""
        self._things: dict[str, tuple[Any, int]] = {}

    def get(self, name: str) -> Any | None:
        """What was put there under that name."""
        return self._things.get(name, (None, 0))[0]

    def put(self, name: str, thing: Any, num_bytes: int) -> None:
        """Keep it."""
        self._things[name] = thing, num_bytes

    def spare(self, where: str, *beginnings: str) -> int:
        """Bytes of everything that lies `where`, as its name begins, but for what begins with one of these."""
        return sum(
            size
            for name, (_, size) in self._things.items()
            if name.startswith(where) and not name.startswith(beginnings)
        )

    def keep(self, *beginnings: str) -> None:
        """Let go of everything but what begins with one of these names; of all of it where none is given."""
        self._things = {name: kept for name, kept in self._things.items() if name.startswith(beginnings)}


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
