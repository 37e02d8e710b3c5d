"""Ctrl-C and SIGTERM end training after the step at hand, with a checkpoint. A second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from prefold.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """To be entered around training, which looks at `caught`: the number of the signal, if there was one.

    Signals that the process was started to ignore, and all of them outside the main thread, are left as they are.
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
        """Once training has come to its end.

        Raises:
            KeyboardInterrupt: Ctrl-C was caught.
            SystemExit: SIGTERM was caught; the code is the one of a process that it ended.
        """
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is not None:
            raise SystemExit(128 + self.caught)
