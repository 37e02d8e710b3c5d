"""What a run says about itself in a terminal of 80 columns: the verdict, before and after, and where things lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prefold.files import without_home
from prefold.reports import read
from prefold.reports.read import NARROW_SPACE, Comparison, Number, read_run

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
        table = _comparison(rows, "pairs" if run.heldout else "prompts", read.columns_of(run))
        parts.append(Padding(table, (1, 0, 0, 0)))
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
        table.add_row(_text(row.name.lower()), *values)
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


def _text(text: str, style: str = "") -> Text:
    # Many terminal fonts lack the narrow space.
    return Text(text.replace(NARROW_SPACE, "\u00a0"), style=style)
