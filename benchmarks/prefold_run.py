"""prefold's side as `prefold train` in a process of its own, of any source tree that has the Python API."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import prefold
from benchmarks.sides import Turns


def train(connection: Connection, recipe: dict[str, Any]) -> None:
    """The first step lasts from the start: it reads the data, checks the engine and computes the reference."""
    turns = Turns(connection)
    file = Path(recipe["output_dir"]).with_suffix(".yaml")
    file.write_text(json.dumps(recipe))  # which is YAML
    turns.start()
    folder = prefold.train(file)
    turns.end([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
