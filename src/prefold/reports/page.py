"""The report of a run: one self-contained HTML file.

Every text of the run is data that a model or a stranger wrote. Data reach the page in two ways only: as autoescaped
template values, and as numbers in a JSON block. In addition, a content security policy allows the page's own scripts
by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefold.errors import UserError
from prefold.files import write_text
from prefold.reports.curves import curves, library
from prefold.reports.data_tables import SEVERITIES, data_tables
from prefold.reports.each_pair import each_pair
from prefold.reports.held_out import accuracies_of, accuracy_digits, columns_of, comparison_of, rows_of
from prefold.reports.numbers import count, counted, duration, finite
from prefold.reports.plan import LINES, PARTS, change_title, memory_rows, plan_lines
from prefold.reports.run_files import RunRecord, Values, as_list, cleaned, objects, read_run, section, turns
from prefold.reports.tasks import judge_of, score_table, task_table
from prefold.reports.templates import page_template
from prefold.reports.verdict import overall

REPORT = "report.html"


def write_report(run_folder: Path, stopped: str = "") -> Path:
    """Write `report.html` into the run folder from what the run has written so far, and return its path. `stopped`:
    where and why the run stopped early. Raises UserError: see `read_run`."""
    path = run_folder / REPORT
    write_text(path, render(read_run(run_folder), cleaned(stopped)))
    return path


def write_check(path: Path, recipe: str, facts: Values) -> None:
    """Write the result of `prefold check` as a page of its own. Raises UserError if it cannot be written there."""
    write_page(path, render_check(recipe, facts))


def write_page(path: Path, text: str) -> None:
    """Raises UserError if it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from None


def render_check(recipe: str, facts: Values) -> str:
    return page_template("check.html.j2")(**check_values(recipe, facts))


def check_values(recipe: str, facts: Values) -> Values:
    """Values for `check.html.j2`, from the result of `prefold check`."""
    facts = cleaned({**facts, "recipe": recipe})
    severities = [finding["severity"] for finding in facts["findings"]]
    numbers = [counted(severities.count(severity), severity) for severity in SEVERITIES if severity in severities]
    plan, splits = facts["plan"], {name: counts.get("trees", 0) for name, counts in facts["tokens"].items()}
    held_out = f", {splits['held_out']:,} more held out" if splits.get("held_out") else ""
    return {
        "recipe": facts["recipe"],
        "method": facts["method"],
        "model": facts["model"],
        "summary": f"{facts['trains']} on {counted(splits.get('train', 0), 'row')}{held_out}, in "
        f"{counted(plan['optimizer_steps'], 'step')}. {', '.join(numbers)}",
        "ok": facts["ok"],
        "data": data_tables(facts) | {"opened": True},
        "phases": list(plan["memory"]),
        "memory": list(memory_rows(plan)),
        "parts": PARTS,
        "lines": [(label, text, LINES[label]) for label, text in plan_lines(plan)],
        "change": plan["change"] and {"title": change_title(plan), **plan["change"]},
    }


def render(run: RunRecord, stopped: str = "") -> str:
    return page_template("report.html.j2")(
        run=run,
        stopped=stopped,
        verdict=overall(run),
        accuracies=accuracies_of(run),
        accuracy_digits=accuracy_digits(comparison_of(run)),
        rows=rows_of(run),
        columns=columns_of(run),
        each=each_pair(run),
        tasks=task_table(run.tasks),
        other_models=list(section(run.compared, "models")),
        other_scores=score_table(section(run.compared, "models")),
        judge=judge_of(run.win_rate or {}),
        system=shared_system(run.samples),
        exchanges=exchanges(run.samples),
        stages=stage_costs(run.timing),
        step_facts=step_facts(run.timing),
        **of_training(run),
    )


def render_live(run: RunRecord, **state: Any) -> str:
    """The page of a run that is going; `state`: further values for `live.html.j2`."""
    return page_template("live.html.j2")(run=run, **state, **of_training(run, "live.js"))


def of_training(run: RunRecord, *own_scripts: str) -> Values:
    """Values for the sections about training and its data, and for the page's scripts."""
    drawn, folder = curves(run), Path(__file__).parent
    files = [*(["draw_curves.js"] if drawn else []), *own_scripts]
    texts = [*([library()] if drawn else []), *((folder / file).read_text(encoding="utf-8") for file in files)]
    scripts = [script_safe(text) for text in texts]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return {
        "curves": drawn,
        "metrics": metric_rows(run.metrics),
        "rollouts": sampled(run),
        "data": data_tables(run.data) if run.data else None,
        "plots": script_safe_json([curve.plot for curve in drawn]),
        "scripts": scripts,
        "script_hashes": [f"sha256-{digest}" for digest in digests],
    }


def script_safe(script: str) -> Markup:
    """A script that cannot close its own element. Scripts hold `</` and `<!--` only in strings and regular expressions,
    where the backslash changes nothing."""
    return Markup(script.replace("</", "<\\/").replace("<!--", "<\\!--"))


def script_safe_json(value: Any) -> Markup:
    """JSON that holds no `<`, `>` or `&`, so that it can neither close its element nor open another."""
    text = json.dumps(value, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


Answer = tuple[Any, bool]
"""A text, None where it is missing, and whether the token limit cut it off."""


def exchanges(samples: Sequence[Values]) -> list[tuple[list[tuple[str, str]], list[tuple[Answer, Answer]]]]:
    """Prompts as (role, text) messages, each with its answers as (before, after)."""
    skipped = 1 if shared_system(samples) else 0
    return [
        (
            turns(sample.get("prompt"))[skipped:],
            list(zip_longest(_answers(sample, "before"), _answers(sample, "after"), fillvalue=(None, False))),
        )
        for sample in samples
    ]


def _answers(sample: Values, when: str) -> list[Answer]:
    texts, reasons = as_list(sample.get(when)), as_list(section(sample, "finish_reasons").get(when))
    return [(text, reason == "length") for text, reason in zip_longest(texts, reasons[: len(texts)])]


def shared_system(samples: Sequence[Values]) -> str:
    """The system message that every prompt begins with, to be shown once; empty if there is none."""
    firsts = {tuple(turns(sample.get("prompt"))[:1]) for sample in samples}
    first = firsts.pop() if len(firsts) == 1 else ()
    return first[0][1] if first and first[0][0] == "system" else ""


def sampled(run: RunRecord) -> list[tuple[Values, Values, Values]]:
    """For the first, the middle and the last recorded step, the group whose rewards differ most, with its worst and its
    best completion: they show whether the reward is being gamed."""
    by_step: dict[str, list[tuple[Values, Values, Values]]] = {}
    for group in run.rollouts:
        completions = objects(group.get("completions"))
        judged = [completion for completion in completions if finite(completion.get("reward")) is not None]
        if len(judged) > 1:
            judged.sort(key=lambda completion: float(completion["reward"]))
            by_step.setdefault(str(group.get("step")), []).append((group, judged[0], judged[-1]))
    steps = list(by_step.values())
    shown = dict.fromkeys((0, len(steps) // 2, len(steps) - 1)) if steps else {}
    return [max(steps[index], key=lambda row: float(row[2]["reward"]) - float(row[1]["reward"])) for index in shown]


def metric_rows(metrics: Sequence[Values]) -> dict[str, tuple[float | None, ...]]:
    """First, last, lowest and highest value of every metric that was logged."""
    rows: dict[str, tuple[float | None, ...]] = {}
    for name in sorted({name for row in metrics for name in row} - {"step"}):
        known = _known(metrics, name)
        rows[name] = (known[0], known[-1], min(known), max(known)) if known else (None,) * 4
    return rows


def _known(rows: Sequence[Values], name: str) -> list[float]:
    return [value for row in rows if (value := finite(row.get(name))) is not None]


def stage_costs(timing: Sequence[Values]) -> dict[str, tuple[float, float]]:
    """Seconds and peak memory (MB) by stage, in the order in which they ran; a stage that was resumed counts as one."""
    costs: dict[str, tuple[float, float]] = {}
    for row in timing:
        if "stage" in row:
            seconds, peak = costs.get(str(row["stage"]), (0.0, 0.0))
            seconds += finite(row.get("seconds")) or 0.0
            costs[str(row["stage"])] = (seconds, max(peak, finite(row.get("peak_memory_mb")) or 0.0))
    return costs


def step_facts(timing: Sequence[Values]) -> list[tuple[str, float, Callable[[Any], str]]]:
    """Label, value and formatting function of each fact about the optimizer steps."""
    steps = [row for row in timing if "step" in row]
    seconds, tokens = _known(steps, "seconds"), _known(steps, "tokens")
    if not seconds:
        return []
    facts = [("optimizer steps", len(steps), count), ("median step", statistics.median(seconds), duration)]
    if len(tokens) == len(seconds) and sum(seconds) > 0:
        facts.append(("tokens per second", sum(tokens) / sum(seconds), count))
    return facts
