"""The tables of `docs/gpus.md` are the plan's."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "gpus.md").read_text(encoding="utf-8")
TABLE: dict[str, Any] = runpy.run_path(str(DOCS / "gpus_table.py"))


def test_a_row_of_each_table() -> None:
    for row in ("gpu_row", "cpu_row"):
        assert TABLE[row]("SmolLM2 135M") in PAGE, "run: python docs/gpus_table.py"
    assert TABLE["GPU_HEAD"] in PAGE and TABLE["CPU_HEAD"] in PAGE
    assert len(PAGE.split()) <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLE["MODELS"])
def test_every_row(model: str) -> None:
    for row in ("gpu_row", "cpu_row"):
        assert TABLE[row](model) in PAGE, "run: python docs/gpus_table.py"
