"""Stop cleanly: a signal sets a flag, the loop finishes its step, saves, and leaves with the signal's exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """The run was asked to stop, and its state is saved. Ends the program with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        """Exit code 130 for Ctrl-C, 143 for SIGTERM."""
        super().__init__(128 + signum)
        self.signal_name = signal.Signals(signum).name


class StopSignals:
    """While entered, SIGINT and SIGTERM ask for a stop instead of ending the process where it stands.

    A second Ctrl-C leaves at once, unsaved. An earlier handler of SIGTERM (a cluster's launcher) is called on. Outside
    the main thread signals cannot be caught, and nothing changes.
    """

    def __init__(self) -> None:
        """No signal seen yet."""
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
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
        self.signum = signum
        earlier = self._before[signum]
        if signum != signal.SIGINT and callable(earlier):
            earlier(signum, frame)

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
