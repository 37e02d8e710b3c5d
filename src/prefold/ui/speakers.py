"""The models that are talked to, each in a process of its own: begun when it is asked first, ended when nobody asks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from threading import Lock, Thread
from typing import Any

IDLE = 300.0
"""Seconds without a question after which a model is let go."""
MOST = 2
"""Models that are kept at a time."""
WRITTEN = {"before": "recipe.yaml", "after": "merge.json"}
"""By a file of the run it is known whether the model is another one by now; a checkpoint's is in it."""
COMMAND = (sys.executable, "-m", "prefold.ui.speaker")
ENDED = "The process of the model has ended, as it does where memory runs out. Ask again to load it anew."


class Speaker:
    """A model of a run, as `speaker.py` has it."""

    def __init__(self, run: Path, which: str):
        self.command = [*COMMAND, str(run), which]
        self.process: Popen[str] | None = None
        self.asking, self.number, self.used = Lock(), 0, time.monotonic()
        self.file, self.written = run / WRITTEN.get(which, f"checkpoints/{which}/prefold.json"), 0

    @property
    def is_loaded(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ask(
        self, messages: list[dict[str, Any]], settings: dict[str, Any], attempt: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """What `speaker.py` writes, from `{"loading"}` or the first `{"text"}` to the end of the answer. Closed before
        that, the answer is stopped."""
        with self.asking:
            if not self.is_loaded or self.written != self._last_written():
                yield {"loading": True}
                if error := self._load():
                    yield {"error": error}
                    return
            self.number += 1
            number, is_over = self.number, False
            try:
                asked = {"number": number, "messages": messages, "settings": settings, "attempt": attempt}
                self._send(asked)  # a process that has ended shows in what is received
                while not is_over:
                    values = self._receive()
                    if values.pop("number", number) == number:  # an answer that was stopped may still be in the pipe
                        is_over = "answer" in values or "error" in values
                        yield values
            finally:
                self.used = time.monotonic()
                if not is_over:
                    self._send({"stop": number})

    def stop(self) -> None:
        """End the answer that is being given."""
        self._send({"stop": self.number})

    def end(self) -> None:
        """Let go of the model."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe and pipe.close()

    def _load(self) -> str:
        """Why the model cannot be had; empty where it is there. One is loaded after the other, since each takes of the
        memory that the one before leaves; where that is not enough, the others are let go."""
        self.end()
        with _LOADING:
            self.written = self._last_written()
            answer = self._begin()
            if answer.get("too_large") and _let_others_go(self):
                answer = self._begin()
        return str(answer.get("error", ""))

    def _begin(self) -> dict[str, Any]:
        self.process = Popen(self.command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, encoding="utf-8")
        answer = self._receive()
        if "error" in answer:
            self.end()
        return answer

    def _last_written(self) -> int:
        try:
            return self.file.stat().st_mtime_ns
        except OSError:
            return 0

    def _send(self, values: dict[str, Any]) -> None:
        with suppress(OSError, ValueError, AssertionError):
            assert self.process is not None and self.process.stdin is not None
            self.process.stdin.write(json.dumps(values) + "\n")
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        line = ""
        with suppress(OSError, ValueError, AssertionError):
            assert self.process is not None and self.process.stdout is not None
            line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.end()
        return {"error": ENDED}


_LOADING = Lock()
_SPEAKERS: dict[tuple[Path, str], Speaker] = {}
_CHANGING = Lock()


def speaker_of(run: Path, which: str) -> Speaker:
    """The model of that name, kept from now on; the one that was asked longest ago is let go where there are many."""
    with _CHANGING:
        if not _SPEAKERS:
            Thread(target=_let_go, daemon=True).start()
        speaker = _SPEAKERS.setdefault((run, which), Speaker(run, which))
        idle = [
            other
            for other in _SPEAKERS.values()
            if other is not speaker and other.is_loaded and not other.asking.locked()
        ]
        for other in sorted(idle, key=lambda other: other.used)[: len(idle) + 1 - MOST]:
            other.end()
    return speaker


def _let_others_go(speaker: Speaker) -> bool:
    """Whether any other model was kept; one that answers is waited for."""
    others = [other for other in list(_SPEAKERS.values()) if other is not speaker and other.is_loaded]
    for other in others:
        while other.is_loaded:
            if other.asking.acquire(timeout=0.1):
                other.end()
                other.asking.release()
    return bool(others)


def _let_go() -> None:
    while True:
        time.sleep(min(IDLE / 4, 15))
        for speaker in list(_SPEAKERS.values()):
            if time.monotonic() - speaker.used > IDLE and speaker.asking.acquire(blocking=False):
                speaker.end()
                speaker.asking.release()
