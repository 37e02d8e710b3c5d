"""Results appended to a file as they come, so that interrupted work can be continued."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Lock
from typing import Any


class Journal:
    """JSON values by key, one line each. A key covers everything that its value depends on (`key_of`).

    The last line of a process that was killed may be cut short: it is skipped. Threads may add at the same time.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, Lock()
        written = path.read_bytes() if path.is_file() else b""
        self._values = dict(filter(None, map(_entry, written.split(b"\n"))))
        self._start = b"\n" if written and not written.endswith(b"\n") else b""

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        line = json.dumps([key, value]).encode() + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(self._start + line)
            self._start = b""
            self._values[key] = value


def _entry(line: bytes) -> tuple[str, Any] | None:
    try:
        key, value = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (key, value) if isinstance(key, str) else None


def key_of(*parts: Any) -> str:
    """The same for equal values, and for those alone; values that JSON lacks count by their text."""
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
