"""How soon `prefold ui` paints its pages, with many runs and a long file, and what its server holds.

    python -m benchmarks.pages

Makes 500 run folders and a file of 200,000 pairs in a temporary folder, serves them, and opens each page in Chromium
(`chromium` on PATH) once, and then five times more: milliseconds from the request to the first contentful paint, as
the browser reports it. Memory is the server's own pages, without a model loaded. Prints a table and, as its last line,
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, save
from benchmarks.sides import ROOT
from prefold.memory import held

WORDS = ["answer", "better", "clear", "first", "give", "good", "model", "question", "read", "short", "train", "why"]
PAGES = {
    "runs": "/runs",
    "runs, by text": "/runs?text=run-49",
    "a run": "/runs/run?run=runs/run-7",
    "two runs": "/runs/compare?run=runs/run-1&run=runs/run-2",
    "new run": "/runs/new",
    "files": "/data",
    "rows, the first": "/data/rows?path=pairs.jsonl",
    "rows, in the middle": "/data/rows?path=pairs.jsonl&after=100000",
    "rows, by text": "/data/rows?path=pairs.jsonl&text=needle",
    "a row": "/data/row?path=pairs.jsonl&row=150000",
    "samples": "/samples",
    "samples of a run": "/samples?run=runs/run-7",
    "talk": "/talk",
    "vote": "/vote",
}
PAINTED = """() => new Promise((give) => {
  const look = () => {
    const [entry] = performance.getEntriesByName("first-contentful-paint");
    entry ? give(entry.startTime) : requestAnimationFrame(look);
  };
  look();
})"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the result is written to")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), options.runs, options.rows)
        with served(Path(folder)) as (address, process):
            first, later = painted(address, options.repeats)
            memory = held(process)
    table = Table("page", "first time, ms", "median, ms", "most, ms")
    for name, times in later.items():
        table.add_row(name, f"{first[name]:.0f}", f"{statistics.median(times):.0f}", f"{max(times):.0f}")
    Console().print(table)
    outcome = {"first_ms": first, "later_ms": later, "server_mb": memory and round(memory / 1e6)}
    save("pages", options, outcome)
    print(json.dumps({"median_ms": {name: statistics.median(times) for name, times in later.items()}, **outcome}))


def make_files(folder: Path, runs: int, rows: int) -> None:
    write_run = runpy.run_path(str(ROOT / "tests" / "unit" / "reports" / "fake_run.py"))["write_run"]
    made = write_run(folder / "runs" / "run-0")
    for number in range(1, runs):
        shutil.copytree(made, folder / "runs" / f"run-{number}")
    noise = random.Random(0)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt, chosen, rejected = (" ".join(noise.choices(WORDS, k=length)) for length in (30, 60, 60))
            needle = " needle" if number == rows - 1 else ""
            row = {"prompt": f"{prompt} {number}", "chosen": chosen + needle, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The address and the process of the server."""
    command = [sys.executable, "-m", "prefold", "ui", str(folder), "--no-browser"]
    environment = {**os.environ, "PREFOLD_CACHE": str(folder / ".cache")}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.terminate()


def painted(address: str, repeats: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Milliseconds to the first paint of each page: opened once, and then `repeats` times in turn with the others."""
    base = address.partition("/?")[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page: Any = browser.new_context(base_url=base).new_page()
        page.goto(address)

        def paint(path: str) -> float:
            page.goto(path, wait_until="commit")
            return round(float(page.evaluate(PAINTED)), 1)

        first = {name: paint(path) for name, path in PAGES.items()}
        rounds = [{name: paint(path) for name, path in PAGES.items()} for _ in range(repeats)]
        browser.close()
    return first, {name: [each[name] for each in rounds] for name in PAGES}


if __name__ == "__main__":
    main()
