"""A run in a terminal of 80 columns: the verdict, before and after, and the paths of report and merged model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding

from prefold.files import without_home
from prefold.reports.held_out import columns_of, rows_of
from prefold.reports.numbers import size
from prefold.reports.run_files import Values, read_run, readable
from prefold.reports.tasks import task_table
from prefold.reports.terminal_tables import STYLES, coloured, grid, held_out_table, indented, plain, tasks_table
from prefold.reports.verdict import overall


def summary(run_folder: Path) -> RenderableType:
    """The run for rich to print. Raises UserError: see `read_run`."""
    run = read_run(run_folder)
    verdict = overall(run)
    lines: list[RenderableType] = [plain(run.description)] if run.description else []
    lines.append(plain(verdict.headline, STYLES[verdict.outcome]))
    lines += [plain(verdict.evidence)] if verdict.evidence else []
    lines += [indented(coloured(line.text, line.outcome)) for line in verdict.lines]
    lines += [plain(run.precision, "dim")] if run.precision else []
    tables = []
    if rows := rows_of(run):
        tables.append(held_out_table(rows, f"held-out {run.held_out}", columns_of(run)))
    if tasks := task_table(run.tasks):
        tables.append(tasks_table(tasks))
    files = grid("", "", header=False, justify="left")
    for label, path in (("report", run_folder / "report.html"), ("merged model", run_folder / "merged")):
        if path.exists():
            files.add_row(plain(label, "dim"), plain(readable(without_home(str(path)))))
    tables += [files] if files.row_count else []
    return Group(*lines, *(Padding(table, (1, 0, 0, 0)) for table in tables))


def print_published(outcome: Values) -> None:
    """Args: outcome: the content of `publish.json`, or of a dry run."""
    table = grid("", "", header=False)
    for file in outcome["files"]:
        table.add_row(plain(file["name"]), plain(size(file["bytes"])))
    table.add_row(plain("total", "dim"), plain(size(sum(file["bytes"] for file in outcome["files"])), "dim"))
    console = Console(highlight=False)
    console.print(table)
    for label, target in (("Hub", outcome["hub_model_id"]), ("folder", outcome["folder"])):
        if target:
            console.print(plain(f"to {label}: {target}"))
