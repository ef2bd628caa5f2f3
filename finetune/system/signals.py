"""Clean stops: a signal sets a flag; the loop finishes its step, saves, and ends with the signal's exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

# These ask for a stop: Ctrl-C, a scheduler's SIGTERM, its warning ahead of a time limit (SIGUSR1, SIGUSR2), and the end
# of a terminal (SIGHUP).
STOPPING: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
if sys.platform != "win32":
    STOPPING += (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(SystemExit):
    """The run was asked to stop, and its state is saved. Ends the program with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        """Exit code 130 for Ctrl-C, 143 for SIGTERM, 138 and 140 for SIGUSR1 and SIGUSR2 on Linux."""
        super().__init__(128 + signum)
        self.signal_name = signal.Signals(signum).name


class StopSignals:
    """Within it the signals in `STOPPING` ask for a stop instead of ending the process where it stands.

    The first signal decides the exit code. A second Ctrl-C leaves at once, without a save. `pass_on` calls an earlier
    handler once everything is saved: submitit's, for example, queues the job again.
    """

    def __init__(self) -> None:
        """No signal seen yet."""
        self.signum: int | None = None
        self._frame: FrameType | None = None
        self._before: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StopSignals:
        """Install the handlers; under nohup, which ignores the end of a terminal, that signal stays ignored."""
        self._before = {signum: signal.getsignal(signum) for signum in STOPPING}
        caught = [s for s in STOPPING if s == signal.SIGINT or self._before[s] is not signal.SIG_IGN]
        self._stack.enter_context(_handled_by(self._handle, caught))
        return self

    def __exit__(self, *_: object) -> None:
        """Put the earlier handlers back."""
        self._stack.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None or signum == signal.SIGINT:
            self.signum, self._frame = signum, frame

    @property
    def is_set(self) -> bool:
        """Whether a signal has asked for a stop."""
        return self.signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal has asked for a stop."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def pass_on(self) -> None:
        """Call the handler that the signal had before, if it had one; that handler may end the program."""
        frame, self._frame = self._frame, None
        if self.signum is None or self.signum == signal.SIGINT:
            return  # Python's own handler of Ctrl-C has nothing to add
        earlier = self._before.get(self.signum)
        if callable(earlier):
            earlier(self.signum, frame)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Within it SIGTERM and its like end the program with exit code 128 + the signal's number, without a traceback."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    with _handled_by(leave, [signum for signum in STOPPING if signal.getsignal(signum) == signal.SIG_DFL]):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Within it a stop signal calls its earlier handler and raises `Interrupted`: for work that loses nothing by it."""
    before = {signum: signal.getsignal(signum) for signum in STOPPING}

    def leave(signum: int, frame: FrameType | None) -> None:
        earlier = before[signal.Signals(signum)]
        if callable(earlier):
            earlier(signum, frame)
        raise Interrupted(signum)

    with _handled_by(leave, [signum for signum in STOPPING if before[signum] is not signal.SIG_IGN]):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], signums: Iterable[signal.Signals]) -> Iterator[None]:
    """Within it `handler` gets these signals; afterwards the earlier handlers do. Only the main thread can do this."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in signums} if is_main else {}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
