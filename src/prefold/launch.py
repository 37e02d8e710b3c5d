"""Running one command in several processes of this machine, which start and end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

LIFELINE = "PREFOLD_LIFELINE"
"""Environment variable: a file descriptor that reaches its end when the process that started this one has ended."""
HANDED_ON = (signal.SIGINT, signal.SIGTERM)
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that was asked to stop, and may save its work before."""
GRACE = 3.0
"""Seconds in which the other processes may end by themselves when one has failed."""


def launch(command: Sequence[str], number: int) -> int:
    """Run a command in that many processes; returns the exit code of the first one that fails, else 0.

    Ctrl-C and SIGTERM are passed on to them. When one fails the others are ended, and when this process is killed they
    end as well.
    """
    lifeline, end = os.pipe()
    port = free_port()
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment(rank, number, port), LIFELINE: str(lifeline)},
            pass_fds=(lifeline,),
            start_new_session=True,  # so that a terminal's Ctrl-C reaches them once, from here
        )
        for rank in range(number)
    ]
    os.close(lifeline)
    with _handing_on(children):
        code = _wait(children)
    os.close(end)
    return code


def launched() -> int:
    """How many processes were started to work together, by torchrun or by `--nproc`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def shards(fsdp: bool | str) -> int:
    """Over how many of them the setting `train.fsdp` divides the weights: all, with `hybrid` those of each machine."""
    return launched_here() if fsdp == "hybrid" else launched() if fsdp else 1


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, number: int, port: int) -> dict[str, str]:
    """Environment variables that torch and accelerate read, named as by torchrun."""
    threads = str(max(1, (os.cpu_count() or 1) // number))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }


@contextmanager
def _handing_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While open, signals that would end this process go to the children instead."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.getsignal(number) for number in HANDED_ON}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended; returns the exit code as `launch` does."""
    failures: list[int] = []  # exit codes, in the order in which the processes failed
    waiting, last = set(range(len(children))), time.monotonic()
    while waiting:
        for rank in [rank for rank in waiting if children[rank].poll() is not None]:
            waiting.remove(rank)
            if code := children[rank].returncode:
                last = time.monotonic() if not failures else last
                failures.append(code if code > 0 else 128 - code)
                _tell_killed(rank, code)
        if failures and failures[0] not in STOPPED and time.monotonic() > last + GRACE:
            return _kill([children[rank] for rank in waiting], failures[0])
        time.sleep(0.02)
    return failures[0] if failures else 0


def _kill(children: Sequence[subprocess.Popen[bytes]], code: int) -> int:
    for child in children:
        child.kill()
        child.wait()
    return code


def _tell_killed(rank: int, code: int) -> None:
    """Report that a process was killed, which it could not do itself."""
    if code == -signal.SIGKILL:
        print(f"prefold: process {rank} was killed; the system may be out of memory", file=sys.stderr)
