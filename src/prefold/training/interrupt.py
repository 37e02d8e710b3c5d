"""Ctrl-C and SIGTERM end training after the step at hand, with a checkpoint. A second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from prefold import ranks
from prefold.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """To be entered around training, and added to its callbacks.

    Signals that the process was started to ignore, and all of them outside the main thread, are left as they are.

    Args:
        every: steps between which a checkpoint can be written.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.caught: int | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in SIGNALS}
            self.before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}
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

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self.every:
            return
        # One process alone must not stop, and signals do not reach all of them in the same step.
        self.caught = next((caught for caught in ranks.gather(self.caught) if caught is not None), None)
        if self.caught is not None:
            control.should_save = control.should_training_stop = True

    def leave(self) -> None:
        """Once the trainer has come back.

        Raises:
            KeyboardInterrupt: Ctrl-C was caught.
            SystemExit: SIGTERM was caught; the code is the one of a process that it ended.
        """
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught is not None:
            raise SystemExit(128 + self.caught)
