"""Curves of one run, or of several in the same chart, as lines for the template `charts.html.j2` to draw.

The kinds of curves, what a healthy one looks like, smoothing and thinning are those of the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefold.reports.curves import KINDS, LOSS, LOSSES, SMOOTH_FROM, CurveKind, moving_mean, number_or_nan, thinned
from prefold.reports.numbers import decimal, finite, percent
from prefold.reports.run_files import RunRecord

WIDTH, HEIGHT = 560, 190
"""Size of the area that lines are drawn in, in units of the SVG."""
MOST_POINTS = 280


@dataclass(frozen=True)
class Line:
    """A metric of a run. `colour` and `dash`: numbers of styles; `ends`: the first and the last value; `means`: moving
    means of the values."""

    label: str
    colour: int
    dash: int
    ends: tuple[float, float]
    steps: list[float]
    values: list[float]
    means: list[float]


class Scale(NamedTuple):
    """The values at the ends of an axis, and those that are written beside it."""

    low: float
    high: float
    marks: list[float]


@dataclass(frozen=True)
class Chart:
    kind: CurveKind
    lines: list[Line]
    across: Scale
    up: Scale
    write: Callable[[Any], str]

    def x(self, step: float) -> float:
        return round(WIDTH * (step - self.across.low) / (self.across.high - self.across.low), 1)

    def y(self, value: float) -> float:
        """The distance from the top."""
        return round(HEIGHT * (self.up.high - value) / (self.up.high - self.up.low), 1)

    def points(self, line: Line, values: Sequence[float]) -> list[str]:
        """Points of SVG polylines, one for each part between gaps (NaN)."""
        parts: list[list[str]] = [[]]
        for step, value in zip(line.steps, values, strict=True):
            if math.isnan(value):
                parts.append([])
            else:
                parts[-1].append(f"{self.x(step)},{self.y(value)}")
        return [" ".join(part) for part in parts if part]


def charts(runs: Mapping[str, RunRecord]) -> list[Chart]:
    """A chart for each kind of curve that any of the runs has logged."""
    methods = {run.method for run in runs.values()}
    loss = LOSSES.get(methods.pop(), LOSS) if len(methods) == 1 else LOSS
    return [chart for kind in (loss, *KINDS) if (chart := _chart(kind, runs))]


def _chart(kind: CurveKind, runs: Mapping[str, RunRecord]) -> Chart | None:
    lines = [line for number, name in enumerate(runs) for line in _lines(kind, name, number, runs)]
    if not lines:
        return None
    values = [value for line in lines for value in (*line.values, *line.means) if not math.isnan(value)]
    values += [] if kind.level is None else [kind.level]
    up = Scale(-0.03, 1.03, [0.0, 0.5, 1.0]) if kind.is_share else _scale(min(values), max(values))
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    across = Scale(first, max(last, first + 1), [mark for mark in _scale(first, last).marks if mark == int(mark)])
    return Chart(kind, lines, across, up, percent if kind.is_share else decimal)


def _lines(kind: CurveKind, name: str, number: int, runs: Mapping[str, RunRecord]) -> list[Line]:
    """The lines of a run. Of several runs each has a colour, and dashes tell its metrics apart; of a single run each
    metric has a colour."""
    metrics, lines = runs[name].metrics, []
    steps = thinned([finite(row.get("step")) or float(number) for number, row in enumerate(metrics, 1)], MOST_POINTS)
    window = math.ceil(len(metrics) / 20) if len(metrics) >= SMOOTH_FROM else 1
    for nth, line in enumerate(kind.lines):
        values = [number_or_nan(row.get(line.metric)) for row in metrics]
        known = [value for value in values if not math.isnan(value)]
        if not known:
            continue
        label = line.label if len(runs) == 1 else name if len(kind.lines) == 1 else f"{name}, {line.label}"
        colour, dash = (number, nth) if len(runs) > 1 else (nth, 0)
        shown, means = thinned(values, MOST_POINTS), thinned(moving_mean(values, window), MOST_POINTS)
        lines.append(Line(label, colour, dash, (known[0], known[-1]), steps, shown, means))
    return lines


def _scale(low: float, high: float) -> Scale:
    """An axis from a little below `low` to a little above `high`, with two to six round numbers in between."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step * power for step in (0.2, 0.5, 1.0, 2.0) if span / (step * power) <= 5)
    low, high = low - 0.04 * span, high + 0.04 * span
    marks = range(math.ceil(low / step), math.floor(high / step) + 1)
    return Scale(low, high, [round(number * step, 12) for number in marks])
