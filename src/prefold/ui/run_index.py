"""The runs below some folders: where they are, what each is and what became of it.

Folders are scanned again every few seconds. The facts of a run are cached until its files change; those for which there
is no time are read in a thread, and are there the next time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread

from prefold.errors import UserError
from prefold.files import is_locked
from prefold.reports.numbers import finite
from prefold.reports.run_files import read_run
from prefold.reports.verdict import overall

DEEPEST = 5
MOST_FOLDERS = 20_000
SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages"})
OF_A_RUN = ("run.log", "data.json", "metrics.jsonl")
"""A folder with `recipe.yaml` and any of these is a run folder."""
READ = (
    *("recipe.yaml", "timing.jsonl", "metrics.jsonl", "run.log", "merged/README.md", "publish.json"),
    *(f"evaluation/{name}.json" for name in ("heldout", "rewards", "tasks", "win_rate")),
)
"""The files that `facts_of` depends on."""
AT_ONCE = 0.05
"""Seconds that a request spends on reading facts; the rest are read in a thread."""
BETWEEN_LOOKS = 2.0
"""Seconds between scans of the folders."""


@dataclass(frozen=True)
class Facts:
    """What the files of a run say. `stages`: those that are done, with their seconds."""

    method: str = ""
    model: str = ""
    description: str = ""
    outcome: str = "missing"
    verdict: str = ""
    stages: tuple[tuple[str, float], ...] = ()
    is_done: bool = False


@dataclass(frozen=True)
class RunRow:
    """`changed`: when its files last changed, in seconds of the epoch. `facts`: None until they are read."""

    folder: Path
    changed: float
    state: str
    facts: Facts | None

    @property
    def seconds(self) -> float | None:
        return sum(seconds for _, seconds in self.facts.stages) if self.facts and self.facts.stages else None


def run_folders(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """The run folders in a folder, itself included; links are not followed."""
    pending, seen = [(folder, 0)], 0
    while pending and seen < MOST_FOLDERS:
        here, level = pending.pop()
        seen += 1
        try:
            entries = list(os.scandir(here))
        except OSError:
            continue
        names = {entry.name for entry in entries if not entry.is_symlink()}
        if "recipe.yaml" in names and names.intersection(OF_A_RUN):
            yield here
        elif level < depth:
            inner = [entry for entry in entries if entry.name[0] != "." and entry.name not in SKIPPED]
            pending += [(Path(entry.path), level + 1) for entry in inner if entry.is_dir(follow_symlinks=False)]


def facts_of(folder: Path) -> Facts:
    """The facts of a run, without reading what it logs at every step."""
    try:
        run = read_run(folder, growing=())
        verdict, stages = overall(run), tuple(_stages(folder / "timing.jsonl").items())
    except (UserError, OSError, ValueError) as error:
        return Facts(verdict=str(error).partition("\n")[0])
    last = "publish.json" if run.recipe.get("publish") else "merged/README.md"
    headline = "" if verdict.outcome == "missing" else verdict.headline
    is_done = (folder / last).is_file()
    return Facts(run.method, run.model, run.description, verdict.outcome, headline, stages, is_done)


def _stages(timing: Path) -> dict[str, float]:
    costs: dict[str, float] = {}
    for line in timing.read_bytes().splitlines() if timing.is_file() else ():
        if line.startswith(b'{"stage"'):
            row = json.loads(line)
            costs[str(row["stage"])] = costs.get(str(row["stage"]), 0.0) + (finite(row.get("seconds")) or 0.0)
    return costs


Stamp = tuple[int, ...]


@dataclass
class RunIndex:
    folders: tuple[Path, ...]
    known: dict[Path, tuple[Stamp, Facts]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    thread: Thread | None = None
    listed: tuple[float, list[Path]] = (0.0, [])

    def rows(self) -> list[RunRow]:
        """All runs, the latest first."""
        if time.monotonic() - self.listed[0] > BETWEEN_LOOKS:
            runs = dict.fromkeys(run for folder in self.folders for run in run_folders(folder))
            self.listed = (time.monotonic(), list(runs))
        stamps = {folder: _stamp(folder) for folder in self.listed[1]}
        stamps = dict(sorted(stamps.items(), key=lambda item: max(item[1]), reverse=True))
        pending = [folder for folder, stamp in stamps.items() if self.known.get(folder, ((),))[0] != stamp]
        until = time.monotonic() + AT_ONCE
        while pending and time.monotonic() < until:
            self._read(pending.pop(0))
        with self.lock:
            if pending and not (self.thread and self.thread.is_alive()):
                self.thread = Thread(target=self._read_all, args=(pending,), daemon=True)
                self.thread.start()
        return [self._row(folder, stamp) for folder, stamp in stamps.items()]

    def row(self, folder: Path) -> RunRow:
        """A single run, read now."""
        stamp = _stamp(folder)
        if self.known.get(folder, ((),))[0] != stamp:
            self._read(folder)
        return self._row(folder, stamp)

    def _read_all(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            self._read(folder)

    def _read(self, folder: Path) -> None:
        stamp = _stamp(folder)
        self.known[folder] = stamp, facts_of(folder)

    def _row(self, folder: Path, stamp: Stamp) -> RunRow:
        facts = self.known[folder][1] if folder in self.known else None
        state = "running" if is_locked(folder) else "done" if facts and facts.is_done else "stopped"
        return RunRow(folder, max(stamp) / 1e9, state if facts or state == "running" else "", facts)


def _stamp(folder: Path) -> Stamp:
    return tuple(_changed(f"{folder}/{name}") for name in READ)


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
