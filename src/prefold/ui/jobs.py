"""Runs that were started from a page: `prefold run` as a process of its own, which goes on when the page is closed or
`prefold ui` ends. The cache has a record of each, and its output. Those that were started elsewhere can be stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from prefold.errors import UserError
from prefold.files import cache_folder, holder_of, is_locked, write_text

SHOWN = 40_000
"""Bytes at the end of a log that are shown."""
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Job:
    """`created`: when its process was created, which tells it from a later process with the same id."""

    folder: str
    pid: int
    created: float
    log: str

    @property
    def is_running(self) -> bool:
        if self.pid in _children:
            return _children[self.pid].poll() is None
        with suppress(psutil.Error):
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < 1)
        return False

    @property
    def code(self) -> int | None:
        """The exit code of its process; None if it is running, or if the code is not known."""
        return _children[self.pid].poll() if self.pid in _children else None

    def stop(self) -> None:
        """Interrupt it like Ctrl-C: it stops after the current step, or at once if interrupted again."""
        if self.is_running:
            os.kill(self.pid, signal.SIGINT)

    def said(self) -> str:
        """The end of its output."""
        with suppress(OSError), Path(self.log).open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - SHOWN))
            return log.read().decode("utf-8", "replace")
        return ""


def start(folder: Path, arguments: Sequence[str], start_in: Path) -> Job:
    """Start `prefold run` with `arguments`, whose run folder is `folder`. Raises UserError: a process works there."""
    before = job_of(folder)
    if is_locked(folder) or (before and before.is_running):
        raise UserError("another process is at work in this folder", where=str(folder), advice="wait for it or stop it")
    record = _record_of(folder)
    log = record.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefold", "run", *arguments]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=start_in, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    _children[child.pid] = child
    job = Job(str(folder), child.pid, psutil.Process(child.pid).create_time(), str(log))
    write_text(record, json.dumps(asdict(job)))
    return job


def job_of(folder: Path) -> Job | None:
    """The last job that was started for a run folder."""
    with suppress(OSError, ValueError, TypeError):
        return Job(**json.loads(_record_of(folder).read_text(encoding="utf-8")))
    return None


def started_elsewhere(folder: Path) -> psutil.Process | None:
    """The process of `prefold run`, `train` or `sweep` that works in a run folder; None if it is not known."""
    with suppress(psutil.Error, ValueError):
        if holder := holder_of(folder):
            words = [Path(word).name for word in holder.cmdline()]
            command = words[words.index("prefold") + 1 :][:2]  # an option may come first
            return None if {"run", "train", "sweep"}.isdisjoint(command) else holder
    return None


def _record_of(folder: Path) -> Path:
    return cache_folder() / "ui" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.json"
