"""Whether two formulas are mathematically equal, by the package math-verify.

What a model writes is treated as hostile: a formula can take years to simplify. So formulas are compared in a process
of its own with bounded memory, which is killed when it takes too long; that works in every thread and on every system.
The package cannot be made to run code from a text: LaTeX goes through a grammar, and sympy's `parse_expr`, which
evaluates, is only given digits, operators and brackets.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from weakref import finalize

from prefold.errors import StageError, UserError
from prefold.recipe import rewards as settings

PACKAGE = "math_verify"
STARTING_SECONDS = 120.0


class SymbolicEquality:
    """1 where the completion's last formula equals that of the column `answer`, else 0; None where the answer has none.

    `0.5`, `1/2` and `\\frac{1}{2}` are equal, and so are `(x+1)^2` and `x^2+2x+1`. A formula is what follows the last
    `####`, is in `\\boxed{}` or between dollars, or a number or calculation in the text; an answer without any of these
    marks is a formula as a whole. Needs the package math-verify (`pip install 'prefold[math]'`).
    """

    def __init__(self, wanted: settings.SymbolicEquality):
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError("`symbolic_equality` needs the package math-verify", advice="pip install 'prefold[math]'")
        self._seconds, self._comparer = wanted.seconds, Comparer()

    def __call__(self, completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
        return [
            self._comparer.compare(str(right), completion, self._seconds)
            for completion, right in zip(completions, answer, strict=True)
        ]


class Comparer:
    """A process that compares formulas, started when it is first needed, and again after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._replies: SimpleQueue[str] = SimpleQueue()

    def compare(self, answer: str, completion: str, seconds: float) -> float | None:
        """1 or 0; 0 too if comparing takes longer than `seconds` or more memory than the process may use; None if the
        answer holds no formula."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps([answer, completion]) + "\n")
        process.stdin.flush()
        if (reply := self._reply(seconds)) is None:
            self._stop()
            return 0.0
        return json.loads(reply)  # type: ignore[no-any-return]

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P: the modules beside the worker must not shadow installed ones.
        command, pipe = [sys.executable, "-P", str(Path(__file__).with_name("formula_worker.py"))], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8")
        replies: SimpleQueue[str] = SimpleQueue()
        self._process, self._replies = process, replies

        def forward() -> None:
            for line in process.stdout or ():
                replies.put(line)
            replies.put("")

        finalize(self, process.kill)
        Thread(target=forward, daemon=True).start()
        if self._reply(STARTING_SECONDS) is None:
            self._stop()
            raise StageError("math-verify cannot be started in a process of its own")
        return process

    def _reply(self, seconds: float) -> str | None:
        """The next line from the process; None if there is none in time, or the process has ended."""
        try:
            return self._replies.get(timeout=seconds) or None
        except Empty:
            return None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
