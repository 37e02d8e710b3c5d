"""The training curves: what to draw, what a healthy one looks like, and bokeh's description of the plots.

Bokeh, because its script is a quarter of the size of plotly's, and a report should be small enough to mail. Nothing but
numbers of the run reaches a plot; its texts are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prefold.reports.numbers import decimal, finite, percent
from prefold.reports.run_files import RunRecord, Values

CHOSEN, REJECTED, PLAIN = "#1f9d8b", "#d2713f", "#5c85d6"
MOST_POINTS = 1500
SMOOTH_FROM = 40
"""Steps from which a moving mean is drawn over the single steps."""


def library() -> str:
    """The complete script of bokeh."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    colour: str


@dataclass(frozen=True)
class CurveKind:
    """A plot, drawn if its metrics were logged. `level`: a height to compare with, drawn dashed."""

    title: str
    lines: tuple[Line, ...]
    healthy: str
    level: float | None = None
    is_share: bool = False


REWARDS = CurveKind(
    "Rewards",
    (Line("rewards/chosen", "chosen", CHOSEN), Line("rewards/rejected", "rejected", REJECTED)),
    "Healthy: the two lines part and chosen stays up. When both sink, the model is losing good answers along "
    "with bad ones.",
)
MARGINS = CurveKind(
    "Reward margin",
    (Line("rewards/margins", "margin", PLAIN),),
    "Healthy: it grows and then levels off. Growth that speeds up without end points to over-fitting or too "
    "high a learning rate.",
)
ACCURACIES = CurveKind(
    "Reward accuracy",
    (Line("rewards/accuracies", "accuracy", PLAIN),),
    "Healthy: it climbs above one half (dashed) early on and stays there. One step holds few pairs, so it jumps about.",
    level=0.5,
    is_share=True,
)
LOSS = CurveKind(
    "Loss",
    (Line("loss", "loss", PLAIN),),
    "Healthy: it falls quickly, then slowly. A jump upwards that does not come back points to too high a learning "
    "rate.",
)
LOSS_FROM_LN_2 = replace(
    LOSS,
    healthy="Healthy: it starts at ln 2 ≈ 0.693 (dashed), where the model cannot tell the answers apart, and falls. "
    "Close to 0 it has learned its pairs by heart.",
    level=math.log(2),
)
LOSS_FROM_0 = replace(
    LOSS,
    healthy="Expected: divided by completions (loss_type grpo) it starts at 0 (dashed), as they are compared with one "
    "another, and rises with the KL divergence; divided by tokens it is above 0 while the longer ones are the worse. "
    "It says nothing about success; the reward does.",
    level=0.0,
)
REWARD = CurveKind(
    "Reward",
    (Line("reward", "reward", PLAIN),),
    "Healthy: it climbs and then levels off. One step has few prompts, so it jumps about. A reward that climbs while "
    "the answers get worse is being gamed.",
)
LENGTH = CurveKind(
    "Length of completions",
    (Line("completions/mean_length", "tokens", PLAIN),),
    "Healthy: it moves only as far as the reward asks for. At the limit completions are cut off, and the model learns "
    "from those.",
)
DIVERGENCE = CurveKind(
    "KL divergence from the reference",
    (Line("kl", "nats per token", PLAIN),),
    "Healthy: it grows slowly. A jump means that the model is leaving what it knew; a larger beta holds it back.",
)
SCORES = CurveKind(
    "Scores",
    (
        Line("max_reward", "highest", CHOSEN),
        Line("mean_reward", "mean", PLAIN),
        Line("min_reward", "lowest", REJECTED),
    ),
    "Healthy: they spread out, and the mean stays put. `center_rewards_coefficient` keeps a mean from wandering off.",
)
SCORE_MARGIN = replace(MARGINS, title="Margin", lines=(Line("margin", "margin", PLAIN),))
SCORE_ACCURACY = replace(ACCURACIES, title="Accuracy", lines=(Line("accuracy", "accuracy", PLAIN),))
KINDS = (REWARDS, MARGINS, ACCURACIES, REWARD, LENGTH, DIVERGENCE, SCORES, SCORE_MARGIN, SCORE_ACCURACY)
"""All plots but the loss, in the order in which they are drawn."""
LOSSES = {"dpo": LOSS_FROM_LN_2, "grpo": LOSS_FROM_0}
"""Losses whose first value is known; every other method gets `LOSS`."""


class Curve(NamedTuple):
    """`target`: id of the element to draw in; `ends`: first and last values, formatted by `write`; `gaps`: number of
    steps without a finite value; `window`: steps of the moving mean; `plot`: bokeh's JSON."""

    kind: CurveKind
    target: str
    ends: list[tuple[Line, float, float]]
    write: Callable[[Any], str]
    gaps: int
    window: int
    plot: Any


def curves(run: RunRecord) -> list[Curve]:
    kinds = [LOSSES.get(run.method, LOSS), *KINDS]
    return [curve for number, kind in enumerate(kinds) if (curve := _curve(kind, f"curve-{number}", run.metrics))]


def _curve(kind: CurveKind, target: str, metrics: Sequence[Values]) -> Curve | None:
    steps = [finite(row.get("step")) or float(number) for number, row in enumerate(metrics, start=1)]
    values = {line.metric: [number_or_nan(row.get(line.metric)) for row in metrics] for line in kind.lines}
    known = {metric: _known(column) for metric, column in values.items()}
    ends = [(line, known[line.metric][0], known[line.metric][-1]) for line in kind.lines if known[line.metric]]
    if not ends:
        return None
    gaps = sum(any(map(math.isnan, row)) for row in zip(*values.values(), strict=True))
    window = math.ceil(len(metrics) / 20) if len(metrics) >= SMOOTH_FROM else 1
    plot = _plot(kind, target, steps, values, window)
    return Curve(kind, target, ends, percent if kind.is_share else decimal, gaps, window, plot)


def _plot(kind: CurveKind, target: str, steps: list[float], values: dict[str, list[float]], window: int) -> Any:
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool, Styles
    from bokeh.plotting import figure

    plot = figure(height=210, sizing_mode="stretch_width", tools=[], toolbar_location=None, min_border=0)
    plot.styles = Styles(width="100%")
    columns = {"step": thinned(steps)} | {line.metric: thinned(values[line.metric]) for line in kind.lines}
    columns |= {f"{line.metric}~": thinned(moving_mean(values[line.metric], window)) for line in kind.lines}
    source = ColumnDataSource(columns)
    for line in kind.lines:
        style: dict[str, Any] = {"source": source, "color": line.colour}
        if window > 1:
            plot.line("step", line.metric, line_width=1, alpha=0.35, **style)
        drawn = plot.line("step", f"{line.metric}~", line_width=2.25, line_join="round", line_cap="round", **style)
        if len(steps) < SMOOTH_FROM:
            plot.scatter("step", line.metric, size=4, **style)
    numeral = "0 %" if kind.is_share else "0.000"
    rows = [("step", "@step{0}"), *((line.label, f"@{{{line.metric}}}{{{numeral}}}") for line in kind.lines)]
    shown = "".join(f'<div><span style="opacity: 0.65">{label}</span> {value}</div>' for label, value in rows)
    plot.add_tools(HoverTool(mode="vline", renderers=[drawn], tooltips=shown, line_policy="nearest", show_arrow=False))
    if kind.level is not None:
        plot.hspan(y=[kind.level], line_dash=[5, 5], line_color="#8a8a8a", line_width=1)
    _quiet_axes(plot, kind)
    return json_item(plot, target)  # type: ignore[arg-type]


def _quiet_axes(plot: Any, kind: CurveKind) -> None:
    from bokeh.models import BasicTicker, NumeralTickFormatter

    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.xgrid.visible = False
    plot.yaxis.axis_line_color = None
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=6, min_interval=1)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=4)
    for axis in (plot.xaxis, plot.yaxis):
        axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.major_label_text_font = "system-ui, sans-serif"
        axis.major_label_text_font_size = "12px"
    if kind.is_share:
        plot.y_range.update(start=-0.03, end=1.05)
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")


def number_or_nan(value: Any) -> float:
    """`value`, or NaN if it is no finite number: there bokeh breaks the line."""
    number = finite(value)
    return math.nan if number is None else number


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of the last `window` up to it, gaps left out; a gap stays a gap."""
    recent = (_known(values[max(0, end - window) : end]) for end in range(1, len(values) + 1))
    return [value if math.isnan(value) else statistics.fmean(last) for value, last in zip(values, recent, strict=True)]


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """At most `most` values: means of as many neighbours as it takes."""
    size = max(math.ceil(len(values) / most), 1)
    groups = (_known(values[start : start + size]) for start in range(0, len(values), size))
    return [float(f"{statistics.fmean(group):.6g}") if group else math.nan for group in groups]
