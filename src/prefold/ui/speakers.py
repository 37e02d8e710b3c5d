"""Models that answer, each in a process of its own: started by the first question, ended after a while without one."""

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
"""Seconds without a question after which a model's process is ended."""
MOST = 2
"""Models that are kept loaded at a time."""
WRITTEN = {"before": "recipe.yaml", "after": "merge.json"}
"""The file of a run whose modification time tells whether the model has been replaced; a checkpoint has one in it."""
COMMAND = (sys.executable, "-m", "prefold.ui.speaker")
ENDED = "The process of the model has ended, as it does when memory runs out. Ask again to load the model anew."


class Speaker:
    """A model of a run, in a process of `speaker.py`."""

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
        """What `speaker.py` writes about an answer, after `{"loading": true}` if the model has to be loaded. Closing
        the generator early stops the answer."""
        with self.asking:
            if not self.is_loaded or self.written != self._last_written():
                yield {"loading": True}
                if error := self._load():
                    yield {"error": error}
                    return
            self.number += 1
            number, is_over = self.number, False
            try:
                request = {"number": number, "messages": messages, "settings": settings, "attempt": attempt}
                self._send(request)  # `_receive` notices a process that has ended
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
        """End the process, and so free the model's memory."""
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
        """Load the model. Returns why it cannot be loaded, or an empty text. Models are loaded one after the other, so
        that each sees the memory that the others leave; if that is not enough, the others are ended."""
        self.end()
        with _LOADING:
            self.written = self._last_written()
            answer = self._begin()
            if answer.get("too_large") and _end_others(self):
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
    """The speaker of a model. Of more than `MOST` loaded models, the idle ones that were used longest ago are ended."""
    with _CHANGING:
        if not _SPEAKERS:
            Thread(target=_end_idle, daemon=True).start()
        speaker = _SPEAKERS.setdefault((run, which), Speaker(run, which))
        idle = [
            other
            for other in _SPEAKERS.values()
            if other is not speaker and other.is_loaded and not other.asking.locked()
        ]
        for other in sorted(idle, key=lambda other: other.used)[: len(idle) + 1 - MOST]:
            other.end()
    return speaker


def _end_others(speaker: Speaker) -> bool:
    """End all other models, after the answers that they are giving. Returns whether there were any."""
    others = [other for other in list(_SPEAKERS.values()) if other is not speaker and other.is_loaded]
    for other in others:
        while other.is_loaded:
            if other.asking.acquire(timeout=0.1):
                other.end()
                other.asking.release()
    return bool(others)


def _end_idle() -> None:
    while True:
        time.sleep(min(IDLE / 4, 15))
        for speaker in list(_SPEAKERS.values()):
            if time.monotonic() - speaker.used > IDLE and speaker.asking.acquire(blocking=False):
                speaker.end()
                speaker.asking.release()
