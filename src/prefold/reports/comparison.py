"""The result of `prefold compare`, as a page and for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.reports.page import write_page
from prefold.reports.run_files import Values, as_list, cleaned, section
from prefold.reports.tasks import score_table, task_table
from prefold.reports.templates import page_template
from prefold.reports.terminal_tables import STYLES, indented, plain, tasks_table
from prefold.reports.verdict import Line, Verdict, verdict_on_comparison


def write_comparison(path: Path, comparison: Values) -> None:
    """The result of `prefold compare` as a page of its own. Raises UserError if it cannot be written there."""
    comparison = cleaned(comparison)
    models = section(comparison, "models")
    text = page_template("compare.html.j2")(
        baseline=comparison["baseline"],
        verdict=_verdict(comparison),
        models=list(models),
        scores=score_table(models),
        tables={name: task_table(facts) for name, facts in models.items()},
        left_out={name: section(facts, "left_out") for name, facts in models.items()},
        runs=comparison["runs"],
    )
    write_page(path, text)


def summary(comparison: Values) -> RenderableType:
    """The result for rich to print, in which every text is plain text."""
    comparison = cleaned(comparison)
    lines: list[RenderableType] = []
    for name, facts in section(comparison, "models").items():
        verdict = verdict_on_comparison(facts)
        lines.append(plain(f"{name} against {comparison['baseline']}", "bold"))
        lines.append(plain(verdict.headline, STYLES[verdict.outcome]))
        if table := task_table(facts):
            lines.append(Padding(tasks_table(table, "baseline", "this one", "measured on"), (1, 0, 1, 0)))
        lines += [plain(f"not compared: {what} ({why})", "dim") for what, why in section(facts, "left_out").items()]
    for name, run in comparison["runs"].items():
        lines += [plain(name, "bold"), plain(f"  {run.get('verdict', '')}")]
        lines += [indented(plain(line, "dim")) for line in as_list(run.get("evidence")) if line]
    return Group(*lines)


def _verdict(comparison: Values) -> Verdict:
    verdicts = {name: verdict_on_comparison(facts) for name, facts in section(comparison, "models").items()}
    if len(verdicts) == 1:
        return next(iter(verdicts.values()))
    lines = [Line(verdict.outcome, f"{name}: {verdict.headline}") for name, verdict in verdicts.items()]
    return Verdict("unclear", f"{len(verdicts)} models against {comparison['baseline']}", "", tuple(lines))
