"""The sides of a benchmark: each works in a process of its own, and waits while the other one does.

Nothing of prefold is imported here, since a side may be of another source tree.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DOES_NOT_FIT = "does not fit"


# ---- here: starting, asking, ending -----------------------------------------------------------------------------


class SideFailed(Exception):
    def __init__(self, name: str, why: str, out_of_memory: bool, output: str):
        super().__init__(f"{name}: {why}")
        self.name, self.why, self.out_of_memory, self.output = name, why, out_of_memory, output


class Failure(NamedTuple):
    """What a side sends when it cannot go on."""

    why: str
    out_of_memory: bool


@dataclass
class Side:
    """One process, which calls `target` ("module:function") with its end of the connection and with `work`.

    `source`: the folder that prefold is imported from. `plain`: threads wait as OpenMP has them wait by default, which
    prefold changes when it is imported.
    """

    name: str
    target: str
    work: Any
    source: Path = SOURCE
    plain: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[Side]:
        self.connection, there = Pipe()
        with tempfile.TemporaryFile() as self.output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from benchmarks.sides import perform; perform()", str(there.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=[there.fileno()],
                env=self._environment(),
            )
            there.close()
            try:
                self._send((self.target, self.work))
                yield self
            finally:
                self.process.kill()
                self.process.wait()
                self.connection.close()

    def _environment(self) -> dict[str, str]:
        found = {**os.environ, **self.environment}
        paths = [str(ROOT), str(self.source.resolve()), found.get("PYTHONPATH", "")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.plain:
            found.pop("OMP_WAIT_POLICY", None)
            found["GOMP_SPINCOUNT"] = "300000"
        return found

    def ask(self, question: Any = "go") -> Any:
        """What the side answers.

        Raises:
            SideFailed: it has ended, or says that it cannot go on.
        """
        self._send(question)
        return self.receive()

    def receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._failed(self._ended()) from None
        if isinstance(answer, Failure):
            raise self._failed(answer)
        return answer

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except ConnectionError:
            self.receive()  # why it has ended

    def _ended(self) -> Failure:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return Failure("was killed, as a system does that runs out of memory", True)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Failure(how, False)

    def _failed(self, failure: Failure) -> SideFailed:
        self.output.seek(0)
        return SideFailed(self.name, *failure, self.output.read().decode(errors="replace"))


@contextmanager
def running(*sides: Side) -> Iterator[None]:
    """Every side runs; when one fails, the others are ended and the program ends with status 1: what failed and why on
    stderr, and a last line of JSON on stdout."""
    try:
        with ExitStack() as stack:
            for side in sides:
                stack.enter_context(side.running())
            yield
    except SideFailed as failed:
        outcome = {"failed": failed.name, "why": failed.why}
        print(json.dumps({"ratio": DOES_NOT_FIT, **outcome} if failed.out_of_memory else outcome))
        sys.stderr.write(failed.output)
        raise SystemExit(f"{failed}{f' ({DOES_NOT_FIT})' if failed.out_of_memory else ''}") from None


# ---- there: in the process of a side ----------------------------------------------------------------------------


def perform() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        target, work = connection.recv()
        module, function = target.split(":")
        getattr(import_module(module), function)(connection, work)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        lacking = ("out of memory", "can't allocate memory", "not enough memory")
        connection.send(Failure(text, isinstance(error, MemoryError) or any(one in text.lower() for one in lacking)))
        sys.exit(1)


class Stopwatch:
    """Adds up the time that it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        synchronize()
        self.seconds += time.perf_counter() - self._started


class TakenStep(NamedTuple):
    seconds: float
    rollout_seconds: float
    peak_bytes: int


class Turns:
    """Waits before each optimizer step of this process until the side is asked for it, and answers when it is done.

    A step lasts from the end of the one before, or from the start, to the end of `Optimizer.step`.
    """

    def __init__(self, connection: Connection):
        self.connection, self.rollouts = connection, Stopwatch()

    def start(self) -> None:
        self._hook = register_optimizer_step_post_hook(self._after_step)
        self._answer("ready")

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if sum(len(group["params"]) for group in optimizer.param_groups) == 1:
            return  # the plan of a run takes a step with one matrix, to see what the optimizer keeps
        synchronize()
        self._answer(TakenStep(time.perf_counter() - self._started, self.rollouts.seconds, peak_bytes()))

    def _answer(self, answer: Any) -> None:
        self.connection.send(answer)
        self.connection.recv()
        self.rollouts.seconds, self._started = 0.0, time.perf_counter()

    def end(self, logged: Sequence[dict[str, Any]]) -> None:
        """Answer with what the trainer has logged, a dictionary for each step."""
        self._hook.remove()
        self.connection.send(list(logged))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Largest memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
