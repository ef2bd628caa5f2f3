"""Stop cleanly: a signal sets a flag, the loop finishes its step, saves, and leaves with the signal's exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# What asks for a stop: Ctrl-C, schedulers' SIGTERM, and the warnings ahead of a time limit (SLURM --signal, submitit).
STOPPING: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
if sys.platform != "win32":
    STOPPING += (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # the last: a terminal that was closed


class Interrupted(SystemExit):
    """The run was asked to stop, and its state is saved. Ends the program with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        """Exit code 130 for Ctrl-C, 143 for SIGTERM, 138 and 140 for SIGUSR1 and SIGUSR2 on Linux."""
        super().__init__(128 + signum)
        self.signal_name = signal.Signals(signum).name


class StopSignals:
    """While entered, these signals ask for a stop instead of ending the process where it stands.

    The first one decides the exit code. A second Ctrl-C leaves at once, unsaved. An earlier handler (a launcher's, such
    as submitit's, which asks for the job to be queued again) is called by `pass_on`, once everything is saved. Outside
    the main thread signals cannot be caught, and nothing changes.
    """

    def __init__(self) -> None:
        """No signal seen yet."""
        self.signum: int | None = None
        self._frame: FrameType | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                # Under nohup a closed terminal is to be ignored, and so it is.
                if signum == signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handlers back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None or signum == signal.SIGINT:
            self.signum, self._frame = signum, frame

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum is not None

    def check(self) -> None:
        """Leave here if a stop was asked for.

        Raises:
            Interrupted: With the signal's exit code.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)

    def pass_on(self) -> None:
        """Call the handler that was there before ours, if a signal came that had one; it may end the program."""
        frame, self._frame = self._frame, None
        if self.signum is None or self.signum == signal.SIGINT:
            return  # Python's own handler of Ctrl-C has nothing to add
        earlier = self._before.get(self.signum)
        if callable(earlier):
            earlier(self.signum, frame)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Outside a run too, SIGTERM ends the program with exit code 143 and without a trace."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [signum for signum in STOPPING if signum != signal.SIGINT and signal.getsignal(signum) == signal.SIG_DFL]
    for signum in ours:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)


@contextmanager
def at_once() -> Iterator[None]:
    """Within it a stop signal ends the work where it stands: for what takes long and loses nothing by it.

    Raises:
        Interrupted: With the signal's exit code, after the handler that was there before was called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in STOPPING}

    def leave(signum: int, frame: FrameType | None) -> None:
        earlier = before[signal.Signals(signum)]
        if callable(earlier):
            earlier(signum, frame)
        raise Interrupted(signum)

    try:
        for signum, earlier in before.items():
            if earlier is not signal.SIG_IGN:
                signal.signal(signum, leave)
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)
