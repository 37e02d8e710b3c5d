"""Sides that come to nothing, for the process of a benchmark's side."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection


def raises(connection: Connection, work: str) -> None:
    raise RuntimeError(work)


def is_killed(connection: Connection, work: None) -> None:
    connection.send("ready")
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def answers(connection: Connection, work: None) -> None:
    connection.send(os.getpid())
    while True:
        connection.send(connection.recv())
