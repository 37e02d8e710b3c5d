"""The report of a run: one HTML file that needs nothing but itself.

Every text of the run is data that a model or a stranger wrote. It reaches the page through
two doors only: autoescaped template values, and numbers in a JSON block. Behind that stands a content security policy
which allows the page's own scripts by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefold.errors import UserError
from prefold.files import write_text
from prefold.reports import run_record as read
from prefold.reports.curves import DRAW_CURVES, curves, library
from prefold.reports.plan import change_title, memory_headings, memory_rows, plan_lines
from prefold.reports.rollouts import sampled
from prefold.reports.run_record import Number, RunRecord, Values, finite, interval, read_run, section
from prefold.reports.tasks import score_table, task_table, win_rate_view
from prefold.reports.verdict import overall

REPORT = "report.html"


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder from what the run has written so far, and return its path.

    Raises:
        UserError: the folder holds no recipe, or one of its files cannot be read.
    """
    path = run_folder / REPORT
    write_text(path, render(read_run(run_folder)))
    return path


def write_check(path: Path, recipe: str, facts: Values) -> None:
    """What `prefold check` found as a page of its own.

    Raises:
        UserError: the page cannot be written there.
    """
    try:
        write_text(path, render_check(recipe, facts))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from None


def render_check(recipe: str, facts: Values) -> str:
    counts = [(one, sum(finding["severity"] == one for finding in facts["findings"])) for one in SEVERITIES]
    said = [f"{number} {severity}{'' if number == 1 else 's'}" for severity, number in counts if number]
    page = templates().get_template("check.html.j2")
    shown = read.cleaned({"recipe": recipe, "summary": ", ".join(said) or "Nothing odd was found."})
    plan = plan_tables(read.cleaned(facts["plan"]))
    return page.render(**shown, ok=facts["ok"], data=data_tables(read.cleaned(facts)), plan=plan)


def plan_tables(plan: Values) -> Values:
    """What the page shows of a plan."""
    change = plan["change"] and {"title": change_title(plan), "yaml": plan["change"]["yaml"]}
    phases = memory_headings(plan)[1:]
    return {"phases": phases, "parts": list(memory_rows(plan)), "lines": plan_lines(plan), "change": change}


def render(run: RunRecord) -> str:
    drawn = curves(run)
    scripts = [script_safe(text) for text in (library(), DRAW_CURVES)] if drawn else []
    page = templates().get_template("report.html.j2")
    return page.render(
        run=run,
        verdict=overall(run),
        accuracy_bars=accuracy_bars(run.heldout),
        comparisons=read.comparisons_of(run),
        columns=read.columns_of(run),
        held_out="prompts" if run.recipe.get("rewards") and not run.heldout else "pairs",
        tasks=task_table(run.tasks),
        others=score_table(section(run.compared, "models")),
        win_rate=win_rate_view(run.win_rate),
        system=shared_system(run.samples),
        exchanges=exchanges(run.samples),
        curves=drawn,
        metric_rows=metric_rows(run.metrics),
        rollouts=sampled(run),
        steps=len(run.metrics),
        guarded=run.guards is not None,
        sightings=sightings(run.guards),
        data=data_tables(run.data) if run.data else None,
        merge=merge_check(run.merge) if run.merge else None,
        stages=stage_costs(run.timing),
        step_facts=step_facts(run.timing),
        environment=environment_rows(run.environment) if run.environment else [],
        plots=script_safe_json([curve.plot for curve in drawn]),
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
    )


def templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# ---- scripts ----------------------------------------------------------------------------------------------------


def script_safe(script: str) -> Markup:
    """Code that cannot close its own element. Code holds `</` and `<!--` in strings and regular expressions only."""
    return Markup(script.replace("</", "<\\/").replace("<!--", "<\\!--"))


def script_safe_json(value: Any) -> Markup:
    """JSON that holds no `<`, `>` or `&`, so that it can neither close its element nor open another."""
    text = json.dumps(value, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---- verdict ----------------------------------------------------------------------------------------------------


class AccuracyBar(NamedTuple):
    """A dot with its interval on a scale from 0 to 100, in percent of the width."""

    label: str
    value: Number
    dot: float
    low: float
    high: float


def accuracy_bars(heldout: Values | None) -> list[AccuracyBar]:
    bars = []
    for name in ("after",) if "chance" in (heldout or {}) else ("before", "after"):
        side = section(heldout, name)
        accuracy = finite(side.get("accuracy"))
        if heldout is None or accuracy is None:
            return []
        low, high = interval(side.get("accuracy_ci"))
        ends = [accuracy if end is None else end for end in (low, high)]
        dot, start, stop = (round(100 * min(max(value, 0.0), 1.0), 2) for value in (accuracy, *ends))
        value = read.percent(accuracy, read.accuracy_digits(heldout))
        bars.append(AccuracyBar(name.capitalize(), value, dot, start, stop))
    return bars


# ---- answers ----------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """A prompt as (role, text) messages, and its answers as (before, after); None where one is missing."""

    prompt: list[tuple[str, str]]
    answers: list[tuple[str | None, str | None]]


def exchanges(samples: Sequence[Values]) -> list[Exchange]:
    skipped = 1 if shared_system(samples) else 0
    return [
        Exchange(_prompt(sample)[skipped:], list(zip_longest(_answers(sample, "before"), _answers(sample, "after"))))
        for sample in samples
    ]


def shared_system(samples: Sequence[Values]) -> str:
    """The system message that every prompt begins with, to be shown once; empty if there is none."""
    firsts = {tuple(_prompt(sample)[:1]) for sample in samples}
    first = firsts.pop() if len(firsts) == 1 else ()
    return first[0][1] if first and first[0][0] == "system" else ""


def _prompt(sample: Values) -> list[tuple[str, str]]:
    return read.turns(sample.get("prompt"))


def _answers(sample: Values, when: str) -> list[str]:
    return [str(answer) for answer in read.as_list(sample.get(when))]


# ---- tables -----------------------------------------------------------------------------------------------------


class MetricRow(NamedTuple):
    name: str
    first: Number
    last: Number
    lowest: Number
    highest: Number


def metric_rows(metrics: Sequence[Values]) -> list[MetricRow]:
    """Every metric that was logged, by name."""
    names = sorted({name for row in metrics for name in row} - {"step"})
    rows = []
    for name in names:
        known = [value for row in metrics if (value := finite(row.get(name))) is not None]
        numbers = (known[0], known[-1], min(known), max(known)) if known else (None,) * 4
        rows.append(MetricRow(name, *map(read.decimal, numbers)))
    return rows


CONSEQUENCES = {
    "warn": "",
    "stop": "Training stopped.",
    "roll_back": "Training went back to step {after}, and on from there at half the rate.",
    "lower_rate": "The rate was halved from there on.",
}


class Sighting(NamedTuple):
    """What a guard saw while training."""

    guard: str
    step: str
    message: str
    rows: str
    advice: str
    consequence: str


def sightings(guards: Values | None) -> list[Sighting]:
    return [_sighting(event) for event in read.objects((guards or {}).get("events"))]


def _sighting(event: Values) -> Sighting:
    words = {name: str(event.get(name, "")) for name in ("step", "message", "rows", "advice")}
    consequence = CONSEQUENCES.get(str(event.get("action")), "").format(after=read.count(event.get("after")).text)
    return Sighting(guard=str(event.get("guard", "")).replace("_", " "), consequence=consequence, **words)


SEVERITIES = ("error", "warning", "note")
ROWS_SHOWN = 8


class Finding(NamedTuple):
    severity: str
    kind: str
    number: Number
    message: str
    advice: str
    rows: str


class Source(NamedTuple):
    """`counts` are rows, under the headings `DataTables.counted`."""

    path: str
    shape: str
    counts: list[Number]


class Shown(NamedTuple):
    """A row as it is trained on: completions are (label, text, tokens)."""

    row: str
    prompt: str
    completions: list[tuple[str, str, Number]]


class MarginBar(NamedTuple):
    """`width` in percent of the widest."""

    range: str
    against: bool
    width: float
    pairs: Number


class Separation(NamedTuple):
    accuracy: Number
    pairs: Number
    bars: list[MarginBar]


class DataTables(NamedTuple):
    """`tokens` has one row per kind of count: its name and a number for each of the `splits`."""

    sources: list[Source]
    counted: list[str]
    separation: Separation | None
    examples: list[Shown]
    findings: list[Finding]
    splits: list[str]
    tokens: list[tuple[str, list[Number]]]
    fingerprints: list[tuple[str, str]]


ROW_COUNTS = {
    "rows_in": "Rows",
    "rows_filtered": "Filtered by where",
    "rows_not_drawn": "Not drawn",
    "rows_used": "Used",
}
TOKEN_COUNTS = {
    "trees": "rows",
    "prompt": "tokens of prompts, each written once",
    "completions": "tokens of completions",
    "plain": "tokens if every completion brought its own prompt",
    "packed": "tokens computed",
    "longest": "tokens of the longest conversation",
}
OF_COMPLETIONS = ("completions", "plain", "packed")
"""Counts that say nothing where completions are yet to be sampled."""


def data_tables(data: Values) -> DataTables:
    tokens = section(data, "tokens")
    splits = [name for name in tokens if section(tokens, name)]
    sampled = all(section(tokens, split).get("completions") == 0 for split in splits)
    counts = [
        (label, [read.count(section(tokens, split).get(name)) for split in splits])
        for name, label in TOKEN_COUNTS.items()
        if any(name in section(tokens, split) for split in splits) and not (sampled and name in OF_COMPLETIONS)
    ]
    if counts and not sampled and any("shared_share" in section(tokens, split) for split in splits):
        saved = [read.percent(section(tokens, split).get("shared_share")) for split in splits]
        counts.append(("saved by encoding each prompt once", saved))
    sources = read.objects(data.get("sources"))
    counted = {name: label for name, label in ROW_COUNTS.items() if any(finite(row.get(name)) for row in sources)}
    return DataTables(
        sources=[_source(source, list(counted)) for source in sources],
        counted=list(counted.values()),
        separation=_separation(section(data, "separation")),
        examples=[_shown(shown) for shown in read.objects(data.get("examples"))],
        findings=sorted(map(_finding, read.objects(data.get("findings"))), key=_severity),
        splits=[split.replace("_", " ") for split in splits],
        tokens=counts,
        fingerprints=[(name.replace("_", " "), str(value)) for name, value in section(data, "fingerprint").items()],
    )


def _source(source: Values, counted: Sequence[str]) -> Source:
    numbers = [read.count(source.get(name)) for name in counted]
    return Source(str(source.get("path", "")), str(source.get("shape", "")), numbers)


def _shown(shown: Values) -> Shown:
    row = section(shown, "row")
    texts, tokens = read.as_list(shown.get("completions")), read.as_list(shown.get("tokens"))
    labels = ("chosen", "rejected") if len(texts) == 2 else ("completion",)
    completions = [
        (label, str(text), read.count(number)) for label, text, number in zip(labels, texts, tokens[1:], strict=False)
    ]
    return Shown(f"{row.get('source', '')}, row {row.get('row', '')}", str(shown.get("prompt", "")), completions)


def _separation(found: Values) -> Separation | None:
    histogram = section(found, "histogram")
    counts, edges = histogram.get("counts"), histogram.get("edges")
    if not isinstance(counts, list) or not isinstance(edges, list):
        return None
    most = max((finite(count) or 0.0 for count in counts), default=0.0) or 1.0
    bars = [
        MarginBar(
            f"{read.decimal(low).text} to {read.decimal(high).text}",
            (finite(low) or 0.0) < 0,
            round(100 * (finite(count) or 0.0) / most, 1),
            read.count(count),
        )
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
    return Separation(read.percent(found.get("accuracy")), read.count(found.get("pairs")), bars)


def _finding(finding: Values) -> Finding:
    rows = read.objects(finding.get("rows"))
    by_source: dict[str, list[str]] = {}
    for row in rows[:ROWS_SHOWN]:
        by_source.setdefault(str(row.get("source", "")), []).append(str(row.get("row", "")))
    words = {source: "row" if len(places) == 1 else "rows" for source, places in by_source.items()}
    shown = [f"{source}, {words[source]} {', '.join(places)}" for source, places in by_source.items()]
    total = finite(finding.get("count"))
    left = (len(rows) if total is None else int(total)) - min(len(rows), ROWS_SHOWN)
    return Finding(
        severity=str(finding.get("severity", "")),
        kind=str(finding.get("kind", "")).replace("_", " "),
        number=read.count(finding.get("count")),
        message=str(finding.get("message", "")),
        advice=str(finding.get("advice") or ""),
        rows="; ".join(shown) + (f"; and {left} more" if shown and left > 0 else ""),
    )


def _severity(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity) if finding.severity in SEVERITIES else len(SEVERITIES)


class MergeCheck(NamedTuple):
    """`difference`, `tolerance`, `effect` and `drift` are shares of the size of the logits."""

    passed: bool
    dtype: str
    difference: Number
    tolerance: Number
    facts: list[tuple[str, Number]]


def merge_check(merge: Values) -> MergeCheck:
    difference, tolerance = finite(merge.get("relative_difference")), finite(merge.get("tolerance"))
    facts = [
        ("largest difference of a logit", read.scientific(merge.get("max_logit_difference"))),
        ("what the adapter changes", read.scientific(merge.get("adapter_effect"))),
        ("from the quantised model that was trained", read.scientific(merge.get("difference_from_quantised"))),
        ("tokens compared", read.count(merge.get("tokens_compared"))),
        ("answers compared", read.count(merge.get("answers_compared"))),
        ("of them equal", read.count(merge.get("answers_equal"))),
    ]
    return MergeCheck(
        passed=difference is not None and tolerance is not None and difference <= tolerance,
        dtype=str(merge.get("dtype", "")),
        difference=read.scientific(difference),
        tolerance=read.scientific(tolerance),
        facts=[(name, value) for name, value in facts if value.text != read.NO_VALUE],
    )


class StageCost(NamedTuple):
    """`share` is the stage's part of the run's time, in percent."""

    name: str
    time: Number
    share: float
    memory: Number


def stage_costs(timing: Sequence[Values]) -> list[StageCost]:
    """Time and peak memory by stage, in the order in which they ran; a stage that was resumed counts as one."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for row in timing:
        if "stage" in row:
            name = str(row["stage"])
            seconds[name] = seconds.get(name, 0.0) + (finite(row.get("seconds")) or 0.0)
            peaks[name] = max(peaks.get(name, 0.0), finite(row.get("peak_memory_mb")) or 0.0)
    total = sum(seconds.values()) or 1.0
    return [
        StageCost(name, read.duration(spent), round(100 * spent / total, 2), read.memory(peaks[name] or None))
        for name, spent in seconds.items()
    ]


def step_facts(timing: Sequence[Values]) -> list[tuple[str, Number]]:
    steps = [row for row in timing if "step" in row]
    seconds = [value for row in steps if (value := finite(row.get("seconds"))) is not None]
    tokens = [value for row in steps if (value := finite(row.get("tokens"))) is not None]
    if not seconds:
        return []
    facts = [("optimizer steps", read.count(len(steps))), ("median step", read.duration(statistics.median(seconds)))]
    if len(tokens) == len(seconds) and sum(seconds) > 0:
        facts.append(("tokens per second", read.count(sum(tokens) / sum(seconds))))
    return facts


def environment_rows(environment: Values) -> list[tuple[str, str]]:
    packages = section(environment, "packages")
    rows = [(name, value) for name, value in environment.items() if name != "packages" and value is not None]
    return [(name.replace("_", " "), str(value)) for name, value in [*rows, *packages.items()]]
