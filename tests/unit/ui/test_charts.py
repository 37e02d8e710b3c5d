"""Where lines go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import FAKE_RUN

from prefold.reports.curves import LOSS
from prefold.reports.run_files import RunRecord, read_run
from prefold.ui.charts import HEIGHT, WIDTH, _scale, charts


def run_of(folder: Path, metrics: list[dict[str, Any]], method: str = "orpo") -> RunRecord:
    FAKE_RUN["write_run"](folder, metrics=metrics, recipe=f"method: {method}\n")
    return read_run(folder)


def test_a_line_goes_from_its_first_to_its_last_step(tmp_path: Path) -> None:
    [chart] = charts({"a": run_of(tmp_path, [{"step": i, "loss": 3.0 - i} for i in (1, 2, 3)])})
    [line] = chart.lines
    assert line.ends == (2.0, 0.0) and chart.kind == LOSS
    [points] = chart.points(line, line.values)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in places] == [0, WIDTH / 2, WIDTH]
    assert places[0][1] < places[1][1] < places[2][1] <= HEIGHT and places[1][1] == pytest.approx(HEIGHT / 2, abs=0.1)


def test_a_gap_begins_a_new_line(tmp_path: Path) -> None:
    values = [1.0, math.nan, 2.0, 3.0]
    [chart] = charts({"a": run_of(tmp_path, [{"step": i, "loss": value} for i, value in enumerate(values, 1)])})
    parts = chart.points(chart.lines[0], chart.lines[0].values)
    assert [part.count(",") for part in parts] == [1, 2]


def test_runs_have_colours_and_their_metrics_dashes(tmp_path: Path) -> None:
    rows = [{"step": 1, "rewards/chosen": 1.0, "rewards/rejected": 0.0, "loss": 1.0}]
    runs = {name: run_of(tmp_path / name, rows) for name in "ab"}
    loss, rewards = charts(runs)
    assert [(line.label, line.colour, line.dash) for line in loss.lines] == [("a", 0, 0), ("b", 1, 0)]
    assert [(line.label, line.colour, line.dash) for line in rewards.lines] == [
        *(("a, chosen", 0, 0), ("a, rejected", 0, 1), ("b, chosen", 1, 0), ("b, rejected", 1, 1)),
    ]
    assert [line.colour for line in charts({"a": runs["a"]})[1].lines] == [0, 1]


def test_a_run_that_has_taken_no_step_has_no_curve(tmp_path: Path) -> None:
    assert charts({"a": run_of(tmp_path, [])}) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 0.01), (0.69, 0.70), (5, 5), (0, 0), (-1e-9, 1e-9), (1e6, 3e6)])
def test_a_scale_has_a_few_round_marks_within(low: float, high: float) -> None:
    scale = _scale(low, high)
    assert scale.low < low and scale.high > high and 1 <= len(scale.marks) <= 8
    assert all(scale.low <= mark <= scale.high for mark in scale.marks)
