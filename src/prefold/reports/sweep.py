"""What `prefold sweep` found, as a page and for a terminal of 80 columns: the best of many runs, and how far to believe
it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.files import write_text
from prefold.reports import run_record as read
from prefold.reports.page import templates
from prefold.reports.run_record import NARROW_SPACE, Line, Outcome, Values, Verdict, finite, interval, read_run, section
from prefold.reports.run_table import STYLES, plain, tasks_for_terminal
from prefold.reports.tasks import ScoreTable, TaskTable, score_table, task_table
from prefold.reports.verdict import change, difference, outcome_of, overall, value

PAGE = "sweep.html"
NAMED = 3
"""Runs that a sentence names."""


class Run(NamedTuple):
    """`link`: of its report, relative to the page; empty where there is none."""

    name: str
    link: str
    outcome: Outcome
    verdict: str


def write_sweep(folder: Path, found: Values) -> Path:
    """The page in a sweep's folder, from the content of `sweep.json` and the folders of the runs; returns its path."""
    found = read.cleaned(found)
    runs = {str(point["name"]): read_run(folder / point["name"]) for point in _points(found, "done")}
    tasks: dict[str, Values] = {name: run.tasks for name, run in runs.items() if run.tasks}
    page = templates().get_template("sweep.html.j2")
    text = page.render(
        recipe=found["recipe"],
        verdict=verdict(found),
        table=_table(found),
        scores=_scores(tasks),
        runs=[
            Run(_spaced(name), f"{quote(name)}/report.html", overall(run).outcome, overall(run).headline)
            for name, run in runs.items()
        ],
        failed=[(_spaced(str(point["name"])), str(point.get("error", ""))) for point in _points(found, "failed")],
        waiting=[_spaced(str(point["name"])) for point in _points(found, "waiting")],
        confirm=found.get("confirm"),
        advice=CONFIRM,
    )
    path = folder / PAGE
    write_text(path, text)
    return path


def summary(found: Values) -> RenderableType:
    """Something for rich to print, in which every text is plain text."""
    found = read.cleaned(found)
    said = verdict(found)
    parts: list[RenderableType] = [plain(said.headline, STYLES[said.outcome])]
    parts += [Padding(plain(line.text), (0, 0, 0, 2)) for line in said.lines]
    if table := _table(found):
        parts.append(Padding(tasks_for_terminal(table, heading="runs"), (1, 0, 1, 0)))
    for point in _points(found, "failed"):
        parts.append(plain(f"failed: {_spaced(str(point['name']))}", STYLES["worse"]))
        parts.append(Padding(plain(str(point.get("error", ""))), (0, 0, 0, 2)))
    if found.get("confirm"):
        parts.append(plain(f"{CONFIRM}:"))
        parts.append(Padding(plain(str(found["confirm"])), (0, 0, 1, 2)))
    parts.append(plain(f"comparison  {found['folder']}/{PAGE}", "dim"))
    return Group(*parts)


CONFIRM = "Before you rely on it, measure it on data that did not choose it"


def verdict(found: Values) -> Verdict:
    """Which run is best, what that is worth, and which others may be as good."""
    runs = len(_measured(found))
    best = next((point for point in _measured(found) if point["name"] == found.get("best")), None)
    if best is None:
        return Verdict("missing", _without_best(found))
    facts, name = section(best, "held_out"), _spaced(str(best["name"]))
    outcome = outcome_of(facts)
    headline = {
        "better": f"Best of {runs}: {name}",
        "worse": f"The best of {runs}, {name}, is worse than before training",
    }.get(outcome, f"Best of {runs}, but not clearly better than before training: {name}")
    lines = [Line(outcome, f"Held-out {_metric(facts)}: {_changed(facts)}")]
    if runs > 1:
        lines += [Line("mixed", _chosen_by_luck(found, facts, runs)), _others(found)]
    return Verdict(outcome, headline, "", tuple(lines))


def _without_best(found: Values) -> str:
    runs, failed = len(read.objects(found.get("points"))), len(_points(found, "failed"))
    if failed == runs:
        return "The only run failed" if runs == 1 else f"All {runs} runs failed"
    return "No run could be measured" if _points(found, "done") else "No run is done yet"


def _metric(facts: Values) -> str:
    return "accuracy" if facts.get("shares") else "reward"


def _changed(facts: Values) -> str:
    # A model that scores answers was none before.
    return value(facts.get("after"), bool(facts.get("shares"))) if facts.get("before") is None else change(facts)


def _chosen_by_luck(found: Values, facts: Values, runs: int) -> str:
    shares = bool(facts.get("shares"))
    by = difference(found.get("luck"), shares).lstrip("+") + (" points" if shares else "")
    text = f"Chosen by the {_units(found)} that it is measured on: the best of {runs} equally good runs would look {by}"
    text += " too good, by luck alone"
    low, high = interval(facts.get("after_ci_of_all"))
    if low is None or high is None:
        return text
    ends = f"{value(low, shares)} to {value(high, shares)}"
    return f"{text}. With allowance for the choice, its {_metric(facts)} is {ends} (95{NARROW_SPACE}% interval)"


def _others(found: Values) -> Line:
    alike = [_spaced(str(name)) for name in found.get("as_good") or ()]
    if not alike:
        return Line("better", "Better than each of the others, after correction for all comparisons")
    named = "; ".join([*alike[:NAMED], *([f"{len(alike) - NAMED} more"] if len(alike) > NAMED else [])])
    return Line("unclear", f"{_units(found)} do not show it to be better than {named}")


def _units(found: Values) -> str:
    held_out = section(found, "held_out")
    number = finite(held_out.get("number"))
    return f"{read.count(number).text} {held_out.get('unit', 'pair')}{'' if number == 1 else 's'}"


# ---- tables -----------------------------------------------------------------------------------------------------


def _table(found: Values) -> TaskTable | None:
    """The runs as tasks are shown: before, after, change. Below each name what is between it and the best run."""
    points = _measured(found)
    facts = {_spaced(str(point["name"])): section(point, "held_out") for point in points}
    table = task_table({"tasks": facts})
    if table is None:
        return None
    rows = [row._replace(note=_to_best(facts[row.name]), smallest="") for row in table.rows]
    return table._replace(rows=rows)


def _to_best(facts: Values) -> str:
    if "to_best" not in facts:
        return ""
    found = section(facts, "to_best")
    if not found:
        return "best"
    shares = bool(facts.get("shares"))
    by = difference(found.get("difference"), shares) + (" points" if shares else "")
    return f"{by} to the best, {read.p_value(found.get('p_adjusted')).text}"


def _scores(tasks: dict[str, Values]) -> ScoreTable | None:
    """The tasks of all runs beside the model before training, if it is the same for all."""
    baselines = [
        {name: facts.get("before") for name, facts in section(one, "tasks").items() if isinstance(facts, dict)}
        for one in tasks.values()
    ]
    if any(one != baselines[0] for one in baselines):
        return None
    return score_table({_spaced(name): one for name, one in tasks.items()})


def _spaced(name: str) -> str:
    """`learning_rate=1e-5, beta=0.1`, which may be broken where it is too long for a line."""
    return name.replace(",", ", ")


def _points(found: Values, status: str) -> list[Values]:
    return [point for point in read.objects(found.get("points")) if point.get("status") == status]


def _measured(found: Values) -> Sequence[Values]:
    return [point for point in read.objects(found.get("points")) if section(point, "held_out")]
