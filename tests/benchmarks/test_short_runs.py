"""The runs whose curves the pages of the methods show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import short_runs


def test_the_metrics_of_each_step_are_kept(long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    whole = short_runs.RUNS["dpo"]
    monkeypatch.setitem(short_runs.RUNS, "dpo", {**whole, "train": {**whole["train"], "max_steps": 2}})
    short_runs.main(["dpo", "--model", str(long_model), "--results", str(tmp_path)])
    result = json.loads((tmp_path / "run-dpo-cpu.json").read_text(encoding="utf-8"))
    assert [line["step"] for line in result["metrics"]] == [1, 2]
    assert result["recipe"]["dpo"] == {"beta": 0.5}
