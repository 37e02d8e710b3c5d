"""Ctrl-C and SIGTERM end training after the current step, with a checkpoint. A second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from prefold.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context manager around training, which reads `caught`: the number of the signal, or None.

    Signals that the process ignores keep being ignored. Outside the main thread, no signal is caught.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self.before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
            for number in self.before:
                signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()
        say("  stopping after this step, with a checkpoint; once more stops at once")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def leave(self) -> None:
        """Exit as the caught signal demands, after training has ended.

        Raises:
            KeyboardInterrupt: Ctrl-C was caught.
            SystemExit: SIGTERM was caught; the exit code is that of a process ended by it.
        """
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is not None:
            raise SystemExit(128 + self.caught)
