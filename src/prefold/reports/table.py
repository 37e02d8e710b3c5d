"""What a run says about itself in a terminal of 80 columns: the verdict, before and after, and where things lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefold.files import without_home
from prefold.reports import read
from prefold.reports.read import NARROW_SPACE, Comparison, Number, Values, read_run

STYLES: dict[read.Outcome, str] = {
    "better": "bold green",
    "worse": "bold red",
    "unclear": "bold yellow",
    "missing": "bold",
}


def summary(run_folder: Path) -> RenderableType:
    """Something for rich to print. Every text of the run is plain text in it, never rich's markup.

    Raises:
        UserError: the folder holds no recipe, or one of its files cannot be read.
    """
    run = read_run(run_folder)
    verdict = read.verdict_of(run)
    parts: list[RenderableType] = [_text(verdict.headline, STYLES[verdict.outcome])]
    if verdict.evidence:
        parts.append(_text(verdict.evidence))
    if rows := read.comparisons_of(run):
        parts.append(Padding(_comparison(rows, "pairs" if run.heldout else "prompts"), (1, 0, 0, 0)))
    if places := _places(run_folder):
        parts.append(Padding(places, (1, 0, 0, 0)))
    return Group(*parts)


def _comparison(rows: Sequence[Comparison], held_out: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(f"held-out {held_out}")
    for when in ("before", "after", "change"):
        table.add_column(when, justify="right")
    for row in rows:
        table.add_row(
            _text(row.name.lower()),
            _value(row.before, row.before_interval),
            _value(row.after, row.after_interval),
            _value(row.change, row.change_interval),
        )
    return table


def _value(number: Number, ends: str) -> Text:
    text = _text(number.text)
    return text.append(_text(f"\n{ends}", "dim")) if ends else text


def _places(run_folder: Path) -> Table | None:
    """Where the report and the merged model lie, of those that exist."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, name in (("report", "report.html"), ("merged model", "merged")):
        path = run_folder / name
        if path.exists():
            table.add_row(_text(label), _text(read.readable(without_home(str(path)))))
    return table if table.row_count else None


def print_published(outcome: Values) -> None:
    """Args: outcome: the content of `publish.json`, or of a dry run."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for file in outcome["files"]:
        table.add_row(_text(file["name"]), _text(_size(file["bytes"])))
    total = sum(file["bytes"] for file in outcome["files"])
    table.add_row(_text("total", "dim"), _text(_size(total), "dim"))
    console = Console(highlight=False)
    console.print(table)
    for label, place in (("Hub", outcome["hub_model_id"]), ("folder", outcome["folder"])):
        if place:
            console.print(_text(f"to {label}: {place}"))


def _size(number: int) -> str:
    for unit, large in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= large:
            return f"{number / large:.1f} {unit}"
    return f"{number} B"


def _text(text: str, style: str = "") -> Text:
    # Many terminal fonts lack the narrow space.
    return Text(text.replace(NARROW_SPACE, "\u00a0"), style=style)
