"""What `prefold compare` found, as a page and for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.errors import UserError
from prefold.files import write_text
from prefold.reports import run_record as read
from prefold.reports.page import templates
from prefold.reports.run_record import Line, Values, Verdict, section
from prefold.reports.run_table import STYLES, plain, tasks_for_terminal
from prefold.reports.tasks import TaskTable, score_table, task_table
from prefold.reports.verdict import verdict_on_tasks


class Model(NamedTuple):
    name: str
    verdict: Verdict
    table: TaskTable


class Run(NamedTuple):
    name: str
    method: str
    model: str
    outcome: str
    verdict: str
    evidence: list[str]


def write_comparison(path: Path, found: Values) -> None:
    """What `prefold.runs.comparison.compare` found as a page of its own.

    Raises:
        UserError: the page cannot be written there.
    """
    found = read.cleaned(found)
    models, comparisons = _models(found), section(found, "models")
    verdict = _headline(str(found["baseline"]), models, _runs(found))
    page = templates().get_template("compare.html.j2")
    text = page.render(
        baseline=found["baseline"],
        headline=verdict.headline,
        outcome=verdict.outcome,
        lines=verdict.lines,
        scores=score_table(comparisons) if len(models) > 1 else None,
        models=models,
        runs=_runs(found),
    )
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from None


def summary(found: Values) -> RenderableType:
    """Something for rich to print, in which every text is plain text."""
    found = read.cleaned(found)
    parts: list[RenderableType] = []
    for model in _models(found):
        parts.append(plain(f"{model.name} against {found['baseline']}", "bold"))
        parts.append(plain(model.verdict.headline, STYLES[model.verdict.outcome]))
        parts.append(Padding(tasks_for_terminal(model.table, "baseline", "this one"), (1, 0, 1, 0)))
        parts += [plain(f"not compared: {name} ({reason})", "dim") for name, reason in model.table.left_out]
    for run in _runs(found):
        parts += [plain(run.name, "bold"), plain(f"  {run.verdict}")]
        parts += [Padding(plain(line, "dim"), (0, 0, 0, 2)) for line in run.evidence]
    return Group(*parts)


def _models(found: Values) -> list[Model]:
    tables = {name: task_table(comparison) for name, comparison in section(found, "models").items()}
    return [
        Model(name, verdict_on_tasks(section(found, "models")[name]), table) for name, table in tables.items() if table
    ]


def _runs(found: Values) -> list[Run]:
    return [
        Run(
            name=name,
            method=str(run.get("method", "")),
            model=str(run.get("model", "")),
            outcome=str(run.get("outcome", "")),
            verdict=str(run.get("verdict", "")),
            evidence=[str(line) for line in read.as_list(run.get("evidence")) if line],
        )
        for name, run in section(found, "runs").items()
    ]


def _headline(baseline: str, models: Sequence[Model], runs: Sequence[Run]) -> Verdict:
    if len(models) == 1:
        return models[0].verdict
    if models:
        lines = tuple(Line(one.verdict.outcome, f"{one.name}: {one.verdict.headline}") for one in models)
        return Verdict("unclear", f"{len(models)} models against {baseline}", "", lines)
    return Verdict("unclear", f"{len(runs)} run{'' if len(runs) == 1 else 's'}, asked no tasks")
