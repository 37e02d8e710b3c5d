"""A run in a terminal of 80 columns: the verdict, before and after, and the paths of report and merged model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table

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
    if (files := _files(run_folder)).row_count:
        tables.append(files)
    return Group(*lines, *(Padding(table, (1, 0, 0, 0)) for table in tables))


def _files(run_folder: Path) -> Table:
    """The paths of the report and the merged model, if they exist."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, name in (("report", "report.html"), ("merged model", "merged")):
        path = run_folder / name
        if path.exists():
            table.add_row(plain(label), plain(readable(without_home(str(path)))))
    return table


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
