"""A side that fails ends the others and the benchmark, and says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import Ratio
from benchmarks.sides import DOES_NOT_FIT, Side, running

HERE = {"PYTHONPATH": str(Path(__file__).parent)}


def outcome_of(failing: str, work: Any, capfd: pytest.CaptureFixture[str]) -> tuple[str, dict[str, str], int]:
    """What the program ends with, its last line, and the process of the other side."""
    broken = Side("broken", f"failing_sides:{failing}", work, environment=HERE)
    other = Side("other", "failing_sides:answers", None, environment=HERE)
    with pytest.raises(SystemExit) as ended, running(other, broken):
        pid = other.receive()
        assert other.ask("still there?") == "still there?"
        broken.receive()
        broken.ask()
    assert isinstance(ended.value.code, str)  # which makes the exit status 1
    return ended.value.code, json.loads(capfd.readouterr().out.splitlines()[-1]), pid


@pytest.mark.parametrize(
    ("failing", "work", "why", "fits"),
    [
        ("raises", "cannot import name", "RuntimeError: cannot import name", True),
        ("raises", "CUDA out of memory. Tried to allocate 2 GiB", "RuntimeError: CUDA out of memory", False),
        ("is_killed", None, "was killed, as a system does that runs out of memory", False),
    ],
)
def test_a_side_that_fails(failing: str, work: Any, why: str, fits: bool, capfd: pytest.CaptureFixture[str]) -> None:
    message, summary, other = outcome_of(failing, work, capfd)
    assert message.startswith(f"broken: {why}")
    assert summary["failed"] == "broken"
    assert summary["why"].startswith(why)
    assert summary.get("ratio") == (None if fits else DOES_NOT_FIT)
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_ratios_are_of_the_same_step() -> None:
    """Steps of different sizes; the ratio of the medians would be 3."""
    ratio = Ratio.of([10.0, 30.0, 80.0], [10.0, 15.0, 5.0])
    assert ratio.median == 2.0
    assert ratio.spread == [1.0, 2.0, 16.0]
    assert str(ratio) == "2.00 (1.00-16.00)"
