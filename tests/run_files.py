"""Files of a run folder, read by tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefold.files import read_jsonl


def lines(path: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Of a .jsonl file, or of one in a run folder."""
    return read_jsonl(path / name if path.is_dir() else path)
