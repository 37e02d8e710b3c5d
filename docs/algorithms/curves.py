"""Curves and figures of the short runs in `benchmarks/results/`, for the pages: `python docs/algorithms/curves.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 300, 190, 44, 30, 12, 44
COLOURS = ("#0f766e", "#9a8f83")
HELD_OUT = "eval_"
BEGIN, END = "<!-- run: by curves.py -->\n", "<!-- end of the run -->"


class Panel(NamedTuple):
    """A plot: its title, the metrics that it draws, and a height that means something, drawn dashed."""

    title: str
    metrics: Sequence[str]
    level: float | None = None


PAIRS = (
    Panel("Loss", ["loss", "eval_loss"], math.log(2)),
    Panel("Implicit rewards", ["rewards/chosen", "rewards/rejected"]),
    Panel("Accuracy", ["rewards/accuracies", "eval_rewards/accuracies"], 0.5),
)
PANELS: dict[str, Sequence[Panel]] = {
    "dpo": PAIRS,
    "orpo": (
        Panel("NLL, nats per token", ["nll_loss", "eval_nll_loss"]),
        Panel("Log odds ratio", ["log_odds_ratio", "eval_log_odds_ratio"]),
        Panel("Accuracy", ["rewards/accuracies", "eval_rewards/accuracies"], 0.5),
    ),
    "kto": (
        Panel("Loss", ["loss", "eval_loss"], 0.5),
        Panel("Implicit rewards", ["rewards/chosen", "rewards/rejected"]),
        Panel("KL estimate, nats", ["kl"]),
    ),
    "reward": (
        Panel("Loss", ["loss", "eval_loss"], math.log(2)),
        Panel("Margin", ["margin", "eval_margin"]),
        Panel("Accuracy", ["accuracy", "eval_accuracy"], 0.5),
    ),
    "grpo": (
        Panel("Reward", ["reward"]),
        Panel("Length, tokens", ["completions/mean_length"]),
        Panel("KL, nats per token", ["kl"]),
    ),
}


def drawn(panels: Sequence[Panel], lines: Sequence[dict[str, Any]]) -> str:
    """The plots side by side; values on held-out data are dots."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({WIDTH * number} 0)">', *_plot(panel, lines), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _plot(panel: Panel, lines: Sequence[dict[str, Any]]) -> list[str]:
    series = {name: [(line["step"], line[name]) for line in lines if name in line] for name in panel.metrics}
    values = [value for points in series.values() for _, value in points]
    values += [] if panel.level is None else [panel.level]
    low, high = min(values), max(values)
    spread, last = (high - low) or 1.0, lines[-1]["step"]

    def at(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(1, last - 1)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / spread

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold" fill="#1c1917">{escape(panel.title)}</text>']
    for value in (high, low):
        y = at(1, value)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e7e5e4"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#57534e">{value:.3g}</text>')
    if panel.level is not None:
        y = at(1, panel.level)[1]
        dashed = f'y1="{y:.1f}" y2="{y:.1f}" stroke="#a8a29e" stroke-dasharray="4 3"'
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" {dashed}/>')
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        places = [at(*point) for point in points]
        if name.startswith(HELD_OUT):
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    parts += _legend(list(series))
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end" fill="#57534e">step 1 to {last}</text>')
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    shown = [name.removeprefix(HELD_OUT) + ", held-out" if name.startswith(HELD_OUT) else name for name in names]
    return [
        f'<text x="{LEFT}" y="{HEIGHT - BOTTOM + 18 + 14 * number}" fill="{colour}">{escape(name)}</text>'
        for number, (name, colour) in enumerate(zip(shown, COLOURS, strict=False))
    ]


def section(name: str, result: Mapping[str, Any] | None) -> str:
    """What the page of a method shows of its run."""
    command = f"    python -m benchmarks.short_runs {name}\n"
    if result is None:
        return f"None is recorded yet; this makes one, in minutes on a CPU:\n\n{command}"
    lines, train = result["metrics"], result["recipe"]["train"]
    rate, batch = train["learning_rate"], train["batch_size"]
    held_out = {metric for panel in PANELS[name] for metric in panel.metrics if metric.startswith(HELD_OUT)}
    about = f"SmolLM2-135M-Instruct in float32 on a CPU, LoRA of rank 16, {len(lines)} steps of {batch}, rate {rate:g}"
    about += "; dots are held-out data." if held_out else "."
    about += f" {result['note']}" if "note" in result else ""
    rows = [f"| `{metric}` | {_ends(lines, metric)} |" for panel in PANELS[name] for metric in panel.metrics]
    table = "| | first | last |\n|---|---|---|\n" + "\n".join(rows)
    return f"{command}\n{about}\n\n![Curves of the run](../images/curve-{name}.svg)\n\n{table}\n"


def _ends(lines: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [line[metric] for line in lines if metric in line]
    return f"{values[0]:.3g} | {values[-1]:.3g}"


def files() -> dict[Path, str]:
    """The drawing of each run, and the pages with their runs."""
    contents = {}
    for name, panels in PANELS.items():
        path = RESULTS / f"run-{name}-cpu.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if result is not None:
            contents[IMAGES / f"curve-{name}.svg"] = drawn(panels, result["metrics"])
        page = ROOT / "docs" / "algorithms" / f"{name}.md"
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        contents[page] = f"{before}{BEGIN}\n{section(name, result)}\n{END}{rest.split(END)[1]}"
    return contents


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
