"""What `prefold compare` found, as a page and for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.reports.page import write_page
from prefold.reports.run_files import Values, as_list, cleaned, section
from prefold.reports.tasks import TaskTable, score_table, task_table
from prefold.reports.templates import page_template
from prefold.reports.terminal_tables import STYLES, indented, plain, tasks_table
from prefold.reports.verdict import Line, Verdict, verdict_on_tasks


def write_comparison(path: Path, comparison: Values) -> None:
    """The result of `prefold compare` as a page of its own. Raises UserError if it cannot be written there."""
    comparison = cleaned(comparison)
    text = page_template("compare.html.j2")(
        baseline=comparison["baseline"],
        verdict=_verdict(comparison),
        models=list(comparison["models"]),
        scores=score_table(comparison["models"]),
        tables=_tables(comparison),
        runs=comparison["runs"],
    )
    write_page(path, text)


def summary(comparison: Values) -> RenderableType:
    """Something for rich to print, in which every text is plain text."""
    comparison = cleaned(comparison)
    lines: list[RenderableType] = []
    for name, table in _tables(comparison).items():
        verdict = verdict_on_tasks(comparison["models"][name])
        lines.append(plain(f"{name} against {comparison['baseline']}", "bold"))
        lines.append(plain(verdict.headline, STYLES[verdict.outcome]))
        lines.append(Padding(tasks_table(table, "baseline", "this one"), (1, 0, 1, 0)))
        lines += [plain(f"not compared: {task} ({reason})", "dim") for task, reason in table.left_out.items()]
    for name, run in comparison["runs"].items():
        lines += [plain(name, "bold"), plain(f"  {run.get('verdict', '')}")]
        lines += [indented(plain(line, "dim")) for line in as_list(run.get("evidence")) if line]
    return Group(*lines)


def _tables(comparison: Values) -> dict[str, TaskTable]:
    tables = {name: task_table(facts) for name, facts in section(comparison, "models").items()}
    return {name: table for name, table in tables.items() if table}


def _verdict(comparison: Values) -> Verdict:
    verdicts = {name: verdict_on_tasks(comparison["models"][name]) for name in _tables(comparison)}
    if len(verdicts) == 1:
        return next(iter(verdicts.values()))
    if verdicts:
        lines = [Line(verdict.outcome, f"{name}: {verdict.headline}") for name, verdict in verdicts.items()]
        return Verdict("unclear", f"{len(verdicts)} models against {comparison['baseline']}", "", tuple(lines))
    number = len(comparison["runs"])
    return Verdict("unclear", f"{number} run{'' if number == 1 else 's'}, asked no tasks")
