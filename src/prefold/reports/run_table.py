"""What a run says about itself in a terminal of 80 columns: the verdict, before and after, and where things lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefold.files import without_home
from prefold.reports import run_record as read
from prefold.reports.plan import size
from prefold.reports.run_record import NARROW_SPACE, Comparison, Number, Values, read_run
from prefold.reports.tasks import TaskRow, TaskTable, task_table
from prefold.reports.verdict import overall

STYLES: dict[read.Outcome, str] = {
    "better": "bold green",
    "worse": "bold red",
    "mixed": "bold yellow",
    "unclear": "bold yellow",
    "missing": "bold",
}


def summary(run_folder: Path) -> RenderableType:
    """Something for rich to print. Every text of the run is plain text in it, never rich's markup.

    Raises:
        UserError: the folder holds no recipe, or one of its files cannot be read.
    """
    run = read_run(run_folder)
    verdict = overall(run)
    parts: list[RenderableType] = [plain(verdict.headline, STYLES[verdict.outcome])]
    if verdict.evidence:
        parts.append(plain(verdict.evidence))
    parts += [
        Padding(plain(line.text, STYLES[line.outcome].removeprefix("bold").strip()), (0, 0, 0, 2))
        for line in verdict.lines
    ]
    if rows := read.comparisons_of(run):
        table = _comparison(rows, "pairs" if run.heldout else "prompts", read.columns_of(run))
        parts.append(Padding(table, (1, 0, 0, 0)))
    if tasks := task_table(run.tasks):
        parts.append(Padding(tasks_for_terminal(tasks), (1, 0, 0, 0)))
    if places := _places(run_folder):
        parts.append(Padding(places, (1, 0, 0, 0)))
    return Group(*parts)


def _comparison(rows: Sequence[Comparison], held_out: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(f"held-out {held_out}")
    for when in columns:
        table.add_column(when, justify="right")
    for row in rows:
        values = [_value(getattr(row, when), getattr(row, f"{when}_interval")) for when in columns]
        table.add_row(plain(row.name.lower()), *values)
    return table


def tasks_for_terminal(tasks: TaskTable, first: str = "before", second: str = "after", heading: str = "tasks") -> Table:
    """Groups, single tasks and averages, with intervals below the changes."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(heading, overflow="fold")
    for when in (first, second, "change"):
        table.add_column(when, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in (*tasks.rows, *tasks.averages):
        words = plain(row.words, STYLES[row.outcome].removeprefix("bold").strip())
        table.add_row(_named(row), _value(row.before, ""), _value(row.after, ""), _value(row.change, row.ends), words)
    return table


def _named(row: TaskRow) -> Text:
    return plain(row.name).append(plain("".join(f"\n{text}" for text in (row.note, row.apart) if text), "dim"))


def _value(number: Number, ends: str) -> Text:
    text = plain(number.text)
    return text.append(plain(f"\n{ends}", "dim")) if ends else text


def _places(run_folder: Path) -> Table | None:
    """Where the report and the merged model lie, of those that exist."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, name in (("report", "report.html"), ("merged model", "merged")):
        path = run_folder / name
        if path.exists():
            table.add_row(plain(label), plain(read.readable(without_home(str(path)))))
    return table if table.row_count else None


def print_published(outcome: Values) -> None:
    """Args: outcome: the content of `publish.json`, or of a dry run."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for file in outcome["files"]:
        table.add_row(plain(file["name"]), plain(size(file["bytes"])))
    total = sum(file["bytes"] for file in outcome["files"])
    table.add_row(plain("total", "dim"), plain(size(total), "dim"))
    console = Console(highlight=False)
    console.print(table)
    for label, place in (("Hub", outcome["hub_model_id"]), ("folder", outcome["folder"])):
        if place:
            console.print(plain(f"to {label}: {place}"))


def plain(text: str, style: str = "") -> Text:
    # Many terminal fonts lack the narrow space.
    return Text(text.replace(NARROW_SPACE, "\u00a0"), style=style)
